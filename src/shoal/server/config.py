"""What one HTTP app is told, and what it holds: two apps can live side by side."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from shoal.core.clock import Clock
from shoal.core.errors import ConfigError, RequestError
from shoal.core.request import MAX_COMPLETIONS, GenerateRequest, Output
from shoal.core.stats import EngineInfo, EngineStats, EntranceStats, HedgeStats, ReplicaView
from shoal.core.step_times import ReplicaSteps
from shoal.observe import ServingMetrics
from shoal.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Limits and names of one app.

    Attributes:
        served_model_names: the first is what responses say; all are accepted.
        api_keys: any of them opens the door; none: it stands open.
        max_body_bytes: a longer request body is refused with 413.
        max_choices: prompts x n of one request at most.
        request_timeout_s: from submission to the last token; None: no limit.
        stall_timeout_s: a client that takes nothing for this long is dropped.
        default_sampling: sampling fields the model's generation_config asks for.
        ready_window_s: a token this recent proves that the server can generate.
        probe_timeout_s, probe_ttl_s: of the one-token probe behind /ready.
        continuation: names what a stream's tokens mean: servers that say the same can go on with
            each other's; "": none can.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    max_choices: int = MAX_COMPLETIONS
    request_timeout_s: float | None = None
    stall_timeout_s: float = 60.0
    default_sampling: Mapping[str, float] = field(default_factory=dict)
    ready_window_s: float = 10.0
    probe_timeout_s: float = 5.0
    probe_ttl_s: float = 3.0
    continuation: str = ""

    def __post_init__(self) -> None:
        if not self.served_model_names:
            raise ConfigError("served_model_names is empty; give at least one name")
        if not all(self.api_keys):
            raise ConfigError("api_keys holds an empty key, which would let anyone in; remove it")


class Router(Protocol):
    """What the server asks of `router/`: own engines now, any upstream later."""

    @property
    def info(self) -> EngineInfo | None:
        """What a replica can carry; None until one is ready."""
        ...

    @property
    def ready(self) -> bool:
        """A replica is alive and requests are admitted (False while draining)."""
        ...

    @property
    def last_token_s(self) -> float | None:
        """When the last token came, on the app's clock."""
        ...

    def generate(
        self, request: GenerateRequest, take: Callable[[Output, float], bool] | None = None
    ) -> AsyncGenerator[Output, None]:
        """Outputs, the last of which has `finish`; closing it early cancels the request.

        Args:
            take: asked about each output that comes while the reader waits, and told when that
                is on the app's clock; what it says True to, the reader does not get.
        """
        ...

    def why_full(self, salt: str, priority: int) -> RequestError | None:
        """Why a request of that tenant would be refused now, before it is known what it asks."""
        ...

    @property
    def entrance(self) -> EntranceStats:
        """What came of requests before they had a replica."""
        ...

    def stats(self) -> Mapping[str, EngineStats]:
        """By replica name."""
        ...

    def steps(self, name: str) -> ReplicaSteps:
        """What a replica's latest Steps took."""
        ...

    @property
    def hedges(self) -> HedgeStats:
        """Counters of second attempts."""
        ...

    def replicas(self) -> Mapping[str, ReplicaView]:
        """How each stands to requests, by name."""
        ...

    def drain_replica(self, name: str) -> None:
        """Move what runs there elsewhere, and send nothing more."""
        ...

    def resume_replica(self, name: str) -> None: ...

    def drain_instance(self, name: str, instance: int, *, is_drained: bool) -> None:
        """Move what runs on an instance of a replica to its stand-ins; or use it again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeContext:
    """What the endpoints of one app share, whoever turns text into tokens.

    Attributes:
        wall_clock: seconds since 1970, for `created`.
    """

    config: ServerConfig
    router: Router
    metrics: ServingMetrics
    clock: Clock
    rng: random.Random
    wall_clock: Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerContext(EdgeContext):
    """Of an app that turns text into tokens itself."""

    tokenizer: Tokenizer
