"""What an engine is told once: its capacity and limits. Knows nothing of devices."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from shoal.core.errors import ConfigError
from shoal.core.options import Batching
from shoal.core.plan import Hop, Route
from shoal.core.split import Range
from shoal.core.stats import EngineInfo
from shoal.core.step import BLOCK_SIZE

_ONE_DEVICE: tuple[Route, ...] = ((Hop(0, Range(0, 1)),),)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Capacity and limits of one engine.

    Attributes:
        instance_blocks: KV blocks of 16 tokens of each instance.
        rank_blocks: of each instance, how many of them each of its ranks has to itself, one after
            another; empty: its ranks share all of them, as of all instances where it is left out.
        routes: chains of instances that a request may take; the default: all layers on instance 0.
        kv_kinds: of each instance, what the bytes of its KV follow from beside tokens and weights:
            it is copied between instances of one kind. "", or empty for all: it stays.
        max_model_len: prompt and output tokens of one request at most.
        vocab_size: token ids lie in [0, vocab_size).
        eos_token_ids: ids that end a generation unless it ignores EOS.
        max_num_seqs: sequences that run at once, and rows in one Step, at most.
        max_num_batched_tokens: tokens in one Step at most; longer prompts go in chunks.
        batching: how much of prompts, and how many sequences, go into a Step.
        tpot_target_s: that chunks of prompts leave to those who decode; None: little more than
            they take alone.
        max_waiting: requests that may wait for a row; one more is refused.
        max_steps_in_flight: Steps handed out before the first one's result is back; of each
            route, and of a pipeline never fewer than keep all of its stages busy.
        prefix_caching: reuse KV blocks across requests.
        model_digest: names the weights, precision and KV type in block names.
        grammar_timeout_s: a grammar that takes longer to compile is refused.
        max_step_failures: a request whose Steps failed this often ends in an error.
    """

    instance_blocks: tuple[int, ...]
    max_model_len: int
    vocab_size: int
    routes: tuple[Route, ...] = _ONE_DEVICE
    rank_blocks: tuple[tuple[int, ...], ...] = ()
    kv_kinds: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    batching: Batching = "even"
    tpot_target_s: float | None = None
    max_waiting: int = 256
    max_steps_in_flight: int = 2
    prefix_caching: bool = True
    model_digest: str = ""
    grammar_timeout_s: float = 10.0
    max_step_failures: int = 2

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_steps_in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}), so a Step could not hold a token of every sequence; "
                f"raise --max-num-batched-tokens or lower --max-num-seqs"
            )
        if self.tpot_target_s is not None and not 0 < self.tpot_target_s < math.inf:
            raise ConfigError(
                f"the TPOT target is {self.tpot_target_s} s; it must be more than 0: raise "
                "--tpot-target, or leave it out"
            )
        self._check_routes()
        room = max(self.route_tokens(route) for route in range(len(self.routes)))
        if self.max_model_len > room:
            raise ConfigError(
                f"max_model_len is {self.max_model_len} tokens, but the KV cache holds only "
                f"{room}; lower --max-model-len or give it more memory "
                f"with --kv-cache-memory-bytes"
            )

    @property
    def num_stages(self) -> int:
        """Hops of the longest route."""
        return max(map(len, self.routes))

    @property
    def steps_per_route(self) -> int:
        """Steps of one route in flight at most: one for each stage, and one that waits."""
        if self.num_stages == 1:
            return self.max_steps_in_flight
        return max(self.max_steps_in_flight, self.num_stages + 1)

    @property
    def filling_tokens(self) -> int:
        """Of prompts, that keep all instances busy: a Step for each, and one that waits."""
        num = len(self.instance_blocks)
        return (num + 1) * self.max_num_batched_tokens if num > 1 else 0

    def route_tokens(self, route: int) -> int:
        """Tokens that one sequence may have on a route: its smallest instance binds."""
        return min(self.instance_blocks[hop.instance] for hop in self.routes[route]) * BLOCK_SIZE

    @property
    def num_kv_blocks(self) -> int:
        """Blocks that sequences of all routes together have at least: each route gets as much of an
        instance as any other that goes through it."""
        through = Counter(hop.instance for route in self.routes for hop in route)
        return sum(
            min(self.instance_blocks[hop.instance] // through[hop.instance] for hop in route)
            for route in self.routes
        )

    def info(
        self, *, device: str, dtype: str, kv_block_bytes: int, load_s: float = 0.0
    ) -> EngineInfo:
        """What an engine so configured says of itself when it is ready.

        Args:
            kv_block_bytes: of one that can lend its KV; else 0.
        """
        return EngineInfo(
            max_model_len=self.max_model_len,
            num_kv_blocks=self.num_kv_blocks,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            filling_tokens=self.filling_tokens,
            is_even=self.batching == "even",
            tpot_target_s=self.tpot_target_s,
            max_waiting=self.max_waiting,
            device=device,
            dtype=dtype,
            kv_digest=self.model_digest,
            kv_block_bytes=kv_block_bytes if self.prefix_caching else 0,
            load_s=load_s,
        )

    def can_copy(self, source: int, target: int) -> bool:
        """Whether KV of one instance can be copied to another."""
        kinds = self.kv_kinds
        return bool(kinds) and kinds[source] != "" and kinds[source] == kinds[target]

    def _check_routes(self) -> None:
        for instance, num_blocks in enumerate(self.instance_blocks):
            if num_blocks < 1:
                raise ConfigError(
                    f"instance {instance} has {num_blocks} KV blocks; it needs at least 1: give "
                    "it more memory with --kv-cache-memory-bytes"
                )
        if not self.routes or not self.routes[0]:
            raise ConfigError("an engine has no route; name at least one, of at least one hop")
        for number, route in enumerate(self.routes):
            instances = [hop.instance for hop in route]
            if not route or len(set(instances)) != len(route):
                raise ConfigError(
                    f"route {number} goes through instances {instances}; name each of them once"
                )
            if not 0 <= min(instances) <= max(instances) < len(self.instance_blocks):
                raise ConfigError(
                    f"route {number} goes through instances {instances}; there are "
                    f"{len(self.instance_blocks)}, counted from 0: name one of them"
                )
