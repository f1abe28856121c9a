"""What a router keeps of its replicas, requests and what moves; and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from shoal.core.latency import Slo
from shoal.core.plan import Role
from shoal.core.request import GenerateRequest
from shoal.core.speed import Speed
from shoal.core.stats import EngineInfo
from shoal.engine.blocks import BlockName
from shoal.policy.admission import Promise
from shoal.router.prefix_index import Granules

Why = Literal["needed", "balance", "ahead", "prefix"]

_PROGRESS_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Limits of a router.

    Attributes:
        replicas: their names.
        max_waiting: requests that may wait until a replica can begin them soon.
        homeless_timeout_s: how long they may while no replica is alive.
        stranded_timeout_s: how long one that has begun may while none of those that are alive can
            go on with it.
        max_lost: replicas a request may lose before it ends in an error.
        roles: of replicas that are not for all of a request.
        moves_kv: replicas can exchange KV; otherwise requests move without it.
        move_timeout_s: how long KV may take to get from one to another.
        push_timeout_s: how long a prompt may take whose KV is sent on while it is computed; 0: it
            is sent when it is complete.
        max_moves: at once from one replica; as many prompts are sent on at once.
        balance_gap: how many more requests than another a replica has before one moves; 0: none.
        policy: by which a replica is chosen (`policy/routing`).
        speeds: of replicas, as they are expected; of others they are learned.
        slo: what requests are to keep to.
        collapse: requests that would give the same tokens share one computation.
        hedging: a request that is late or stalls may go on at a second replica too.
    """

    replicas: tuple[str, ...]
    max_waiting: int = 256
    homeless_timeout_s: float = 120.0
    stranded_timeout_s: float = 5.0
    max_lost: int = 3
    roles: Mapping[str, Role] = field(default_factory=dict)
    moves_kv: bool = False
    move_timeout_s: float = 10.0
    push_timeout_s: float = 60.0
    max_moves: int = 4
    balance_gap: int = 4
    policy: str = "predicted"
    speeds: Mapping[str, Speed] = field(default_factory=dict)
    slo: Slo | None = None
    collapse: bool = True
    hedging: bool = True


@dataclass(slots=True)
class Replica:
    """
    Attributes:
        token_s: that a token of a prompt takes, once that was seen.
        allowance: requests that it may have for now, as it is in doubt (0), tried again (1), or
            trusted again by and by; None: as many as it takes.
        restarts: it cannot go on with what another one began, as it said when it was ready.
        is_stuck: it said that nothing goes on there for now.
    """

    name: str
    role: Role = "any"
    is_drained: bool = False
    incarnation: int = -1
    info: EngineInfo | None = None
    gone_for_good: bool = False
    outstanding: dict[str, None] = field(default_factory=dict)
    token_s: float | None = None
    allowance: int | None = None
    restarts: bool = False
    is_stuck: bool = False

    @property
    def alive(self) -> bool:
        return self.info is not None

    @property
    def is_sound(self) -> bool:
        """It runs, and nothing says that it does not go on."""
        return self.info is not None and self.allowance != 0 and not self.is_stuck

    @property
    def may_go_on(self) -> bool:
        """With what another one began: it can, or could once it is back."""
        return not (self.restarts or self.gone_for_good)

    def is_meant_for(self, has_begun: bool) -> bool:
        return self.role in ("any", "decode" if has_begun else "prefill")


@dataclass(slots=True)
class Attempt:
    """A stay of a request at a replica.

    Attributes:
        sent_id: by which the replica knows it; another each time, so that what a replica still
            says of a request that left it is not taken for what it says when the request is back.
        sent_s: when it was sent; `was_alone`: to a replica that had nothing else then.
        was_pushed: KV of it was asked for ahead, which is tried once.
        predicted_s: until its first token, or a whole answer, as predicted when it was sent.
        first_s, heard_s: when it said its first and its latest token; None: it has not.
        num_said: tokens.
        is_held: what it says is not read for now, so that its silence says nothing.
        restarts: when it was sent, nobody could go on with what its replica began.
    """

    replica: str
    sent_id: str
    sent_s: float = 0.0
    was_alone: bool = False
    was_pushed: bool = False
    predicted_s: float | None = None
    first_s: float | None = None
    heard_s: float | None = None
    num_said: int = 0
    is_held: bool = False
    restarts: bool = False


@dataclass(slots=True)
class Entry:
    """
    Attributes:
        lead: the attempt whose tokens are delivered; None: it waits for a replica.
        rival: another one, from the same last token; who says the next token leads, and the
            other one ends. There is none without a lead.
        num_lost: replicas that were lost under it, or failed at it, since it last got on.
        num_lost_at: its tokens when one was lost last, or what happened before was forgotten.
        failed_at: replicas that failed at it, of the same.
        num_rivals: that were made for it.
        waits_since_s: for a replica (`router/waiting_room.py`); None: it has one.
        charged: weighted tokens, to its tenant.
        due_s: when its first token would be late for what is to be kept; None: it never is.
        promise: of its first token, if it had to wait; None: it came, or nothing was promised.
        names: of its full blocks, as far as they were asked for, at replicas whose KV is
            `named_for`.
        granules: of its tokens, as far as they were asked for (`router/prefix_index.py`).
    """

    request: GenerateRequest
    deadline: float | None
    output_ids: list[int]
    lead: Attempt | None = None
    rival: Attempt | None = None
    waits_since_s: float | None = None
    charged: float = 0.0
    due_s: float | None = None
    promise: Promise | None = None
    num_lost: int = 0
    num_lost_at: int = 0
    failed_at: tuple[str, ...] = ()
    num_attempts: int = 0
    num_rivals: int = 0
    named_for: str | None = None
    names: list[BlockName] = field(default_factory=list)
    granules: Granules = field(default_factory=list)

    @property
    def replica(self) -> str | None:
        """Where its tokens come from."""
        return None if self.lead is None else self.lead.replica

    def waited_until_s(self, seconds: float) -> float:
        """When it will have waited for a replica for so long."""
        return (self.waits_since_s or 0.0) + seconds

    @property
    def attempts(self) -> list[Attempt]:
        """The lead first."""
        return [each for each in (self.lead, self.rival) if each is not None]

    def attempt_at(self, replica: str) -> Attempt:
        """A new one, which neither leads nor is a rival yet."""
        request_id, number = self.request.request_id, self.num_attempts
        self.num_attempts += 1
        return Attempt(replica, f"{request_id}~{number}" if number else request_id)

    @property
    def num_tokens(self) -> int:
        """That are known of it."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    def note_lost(self) -> None:
        """A replica was lost under it, or failed at it."""
        self._count_anew()
        self.num_lost += 1
        self.num_lost_at = len(self.output_ids)

    def note_failed(self, replica: str) -> None:
        """It failed at this request."""
        self._count_anew()
        self.failed_at = (*self.failed_at, replica)

    def _count_anew(self) -> None:
        """Who got on meanwhile is not what ends replicas."""
        if len(self.output_ids) - self.num_lost_at >= _PROGRESS_TOKENS:
            self.num_lost, self.num_lost_at, self.failed_at = 0, len(self.output_ids), ()

    @property
    def has_begun(self) -> bool:
        """Whether tokens of it have been delivered."""
        return len(self.output_ids) > len(self.request.output_ids)

    def rest(self, attempt: Attempt, now: float) -> GenerateRequest:
        """What a replica is sent: to go on from the last token that was delivered."""
        is_first = attempt.sent_id == self.request.request_id and not self.has_begun
        if is_first and self.deadline is None:
            return self.request
        sampling = self.request.sampling
        if self.has_begun:
            # They came with the first token.
            sampling = replace(sampling, prompt_logprobs=None)
        return replace(
            self.request,
            request_id=attempt.sent_id,
            sampling=sampling,
            output_ids=tuple(self.output_ids),
            timeout_s=None if self.deadline is None else max(self.deadline - now, 0.001),
        )


@dataclass(slots=True)
class Move:
    """
    Attributes:
        why: the old replica is to be rid of the request; or it is only for balance; or that will
            be once the request has begun; or the request waits, at `target`, for KV alone.
        names: of blocks that are asked for, of a prefix.
        pulled_s: since when KV is got.
        num_offered: blocks.
        is_here: of a move ahead: all of it has come.
    """

    move_id: int
    request_id: str
    source: str
    target: str
    deadline: float
    why: Why
    names: tuple[bytes, ...] = ()
    pulled_s: float = 0.0
    num_offered: int = 0
    is_here: bool = False


def can_go_on(entry: Entry, replicas: Mapping[str, Replica]) -> bool:
    """Whether a request can go on at another replica than those where it is."""
    if not entry.has_begun:
        return True
    restarts = any(each.restarts or replicas[each.replica].restarts for each in entry.attempts)
    return entry.request.may_go_on and not restarts
