"""What a router keeps of its replicas and of its requests, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.core.plan import Role
from shoal.core.request import GenerateRequest
from shoal.core.stats import EngineInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Limits of a router.

    Attributes:
        replicas: their names.
        max_homeless: requests that may wait while no replica is alive.
        homeless_timeout_s: how long they may.
        max_attempts: replicas a request may lose before it ends in an error.
        roles: of replicas that are not for all of a request.
        moves_kv: replicas can exchange KV; otherwise requests move without it.
        move_timeout_s: how long KV may take to get from one to another.
        max_moves: at once from one replica.
        balance_gap: how many more requests than another a replica has before one moves; 0: none.
    """

    replicas: tuple[str, ...]
    max_homeless: int = 256
    homeless_timeout_s: float = 120.0
    max_attempts: int = 3
    roles: Mapping[str, Role] = field(default_factory=dict)
    moves_kv: bool = False
    move_timeout_s: float = 10.0
    max_moves: int = 4
    balance_gap: int = 4


@dataclass(slots=True)
class Replica:
    name: str
    role: Role = "any"
    is_drained: bool = False
    incarnation: int = -1
    info: EngineInfo | None = None
    gone_for_good: bool = False
    outstanding: dict[str, None] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        return self.info is not None

    def is_meant_for(self, has_begun: bool) -> bool:
        return self.role in ("any", "decode" if has_begun else "prefill")


@dataclass(slots=True)
class Entry:
    request: GenerateRequest
    deadline: float | None
    output_ids: list[int]
    replica: str | None = None
    homeless_since: float = 0.0
    num_attempts: int = 0
    num_moves: int = 0

    @property
    def has_begun(self) -> bool:
        """Whether tokens of it have been delivered."""
        return len(self.output_ids) > len(self.request.output_ids)

    @property
    def sent_id(self) -> str:
        """By which its replica knows it; another each time, so that what a replica still says of
        a request that left it is not taken for what it says when the request is back."""
        request_id = self.request.request_id
        return f"{request_id}~{self.num_moves}" if self.num_moves else request_id
