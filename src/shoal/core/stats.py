"""What an engine says of itself: once when it is ready, then with its news; and how it stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine can carry, said once when it is ready.

    Attributes:
        max_model_len: prompt and output tokens of one request at most.
        num_kv_blocks: KV blocks of 16 tokens on the device.
        max_num_seqs: rows in one Step at most.
        max_num_batched_tokens: tokens in one Step at most.
        max_waiting: requests that may queue.
        filling_tokens: of prompts that wait there, below which some of its devices may be idle.
        is_even, tpot_target_s: prompts are cut so that those who decode go on evenly, and how.
        kv_digest: of KV, which replicas can exchange if it is the same.
        kv_block_bytes: of one block, over all layers; 0: it stays where it is.
        restarts: it cannot go on with what another one began, nor another one with what it began.
        device, dtype: for people.
        load_s: seconds from process start until ready.
    """

    max_model_len: int
    num_kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int
    device: str
    dtype: str
    filling_tokens: int = 0
    is_even: bool = False
    tpot_target_s: float | None = None
    kv_digest: str = ""
    kv_block_bytes: int = 0
    restarts: bool = False
    load_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStats:
    """How an instance of a replica with several routes stands; `num_running` have KV on it."""

    instance: int
    stage: int
    is_down: bool
    is_drained: bool
    num_running: int


@dataclass(frozen=True, slots=True)
class Computed:
    """What the Steps of an engine that came back have computed, since it began.

    Attributes:
        prompt_tokens: in chunks; those computed again after a preemption count again.
        prompt_pairs: of each such token and those before it.
    """

    steps: int = 0
    prompt_tokens: int = 0
    prompt_pairs: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges now, and counters since the engine began.

    `num_blocks`, `num_blocks_used` are of the instance whose share in use is the largest;
    `recovering`: an instance is down, so that no Step coming back is no sign of a hang;
    `route_moves`, `copied_tokens`: sequences that went on on another route, and tokens whose KV
    went along; `instances`: where there are several routes; `slow`: instances whose Steps lately
    take so many times as long as usual.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_used: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    computed: Computed = Computed()
    busy_s: float = 0.0
    recovering: bool = False
    route_moves: int = 0
    copied_tokens: int = 0
    instances: tuple[InstanceStats, ...] = ()
    slow: tuple[tuple[int, float], ...] = ()

    @property
    def is_stuck(self) -> bool:
        """Nothing goes on until what is down is back: there is one route."""
        return self.recovering and not self.instances


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """What a router expects of a replica.

    Attributes:
        prompts, decoding: how many times as long as predicted it takes, for prompts and the rest.
        share: of all new requests, lately.
        ttft_s: of a request like most, were it sent there now.
    """

    prompts: float
    decoding: float
    share: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Lag:
    """How slow a replica has been for long.

    Attributes:
        p50, p95: times as long as usual that it took, of the last seconds.
        lasted_s: for so long by now.
    """

    p50: float
    p95: float
    lasted_s: float


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """How a replica stands to requests.

    Attributes:
        num_requests: that it has; of one that is drained, 0 when it may be stopped.
        prospect: None of one that is not alive.
        lag: of one that has been slow for so long that another plan would carry more.
        num_sent: requests that were sent there so far, second attempts too.
    """

    is_alive: bool
    is_drained: bool
    num_requests: int
    prospect: Prospect | None = None
    lag: Lag | None = None
    num_sent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EntranceStats:
    """What came of requests before they had a replica.

    Attributes:
        num_waiting: now; the others are counted since the router began.
        num_refused: as they would have waited too long, or too many do.
        num_collapsed: that shared the computation of another one.
    """

    num_waiting: int = 0
    num_refused: int = 0
    num_collapsed: int = 0


@dataclass(slots=True)
class HedgeStats:
    """Counters of second attempts, since a router began.

    Attributes:
        hedged: made since a token was late or a stream stalled; `unpaid`: not made, since they
            would have cost too much.
        rescued: made since a replica was in doubt.
        won: that said the next token first.
        retried: requests that went elsewhere after a replica failed at them.
        doubted: times that a replica was silent for too long.
        computed_tokens: prompts and outputs that requests needed.
        extra_tokens: on top of them, of `hedged` attempts, and what ended attempts still said;
            `rescued_tokens`: of `rescued` ones.
    """

    hedged: int = 0
    unpaid: int = 0
    rescued: int = 0
    won: int = 0
    retried: int = 0
    doubted: int = 0
    computed_tokens: int = 0
    extra_tokens: int = 0
    rescued_tokens: int = 0
