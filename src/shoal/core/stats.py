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
        kv_digest: of KV, which replicas can exchange if it is the same.
        kv_block_bytes: of one block, over all layers; 0: it stays where it is.
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
    kv_digest: str = ""
    kv_block_bytes: int = 0
    load_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStats:
    """How an instance of a replica with several routes stands; `num_running` have KV on it."""

    instance: int
    stage: int
    is_down: bool
    is_drained: bool
    num_running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges now, and counters since the engine began.

    `num_blocks`, `num_blocks_used` are of the instance whose share in use is the largest;
    `recovering`: an instance is down, so that no Step coming back is no sign of a hang;
    `route_moves`, `copied_tokens`: sequences that went on on another route, and tokens whose KV
    went along; `instances`: where there are several routes.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_used: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    busy_s: float = 0.0
    recovering: bool = False
    route_moves: int = 0
    copied_tokens: int = 0
    instances: tuple[InstanceStats, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """How a replica stands to requests.

    Attributes:
        num_requests: that it has; of one that is drained, 0 when it may be stopped.
    """

    is_alive: bool
    is_drained: bool
    num_requests: int
