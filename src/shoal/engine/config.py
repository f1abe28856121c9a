"""What an engine is told once: its capacity and limits. Knows nothing of devices."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.errors import ConfigError
from shoal.core.step import BLOCK_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Capacity and limits of one engine.

    Attributes:
        num_blocks: KV blocks of 16 tokens.
        max_model_len: prompt and output tokens of one request at most.
        vocab_size: token ids lie in [0, vocab_size).
        eos_token_ids: ids that end a generation unless it ignores EOS.
        max_num_seqs: rows in one Step at most.
        max_num_batched_tokens: tokens in one Step at most; longer prompts go in chunks.
        max_waiting: requests that may wait for a row; one more is refused.
        max_steps_in_flight: Steps handed out before the first one's result is back.
        prefix_caching: reuse KV blocks across requests.
        model_digest: names the weights, precision and KV type in block names.
        grammar_timeout_s: a grammar that takes longer to compile is refused.
        max_step_failures: a request whose Steps failed this often ends in an error.
    """

    num_blocks: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_waiting: int = 256
    max_steps_in_flight: int = 2
    prefix_caching: bool = True
    model_digest: str = ""
    grammar_timeout_s: float = 10.0
    max_step_failures: int = 2

    def __post_init__(self) -> None:
        for name in ("num_blocks", "max_model_len", "max_num_seqs", "max_steps_in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}), so a Step could not hold a token of every sequence; "
                f"raise --max-num-batched-tokens or lower --max-num-seqs"
            )
        if self.max_model_len > self.num_blocks * BLOCK_SIZE:
            raise ConfigError(
                f"max_model_len is {self.max_model_len} tokens, but the KV cache holds only "
                f"{self.num_blocks * BLOCK_SIZE}; lower --max-model-len or give it more memory "
                f"with --kv-cache-memory-bytes"
            )
