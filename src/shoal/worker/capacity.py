"""How long a request may be, and how many KV blocks are of use. Loads no torch."""

from __future__ import annotations

from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.options import EngineOptions
from shoal.core.step import BLOCK_SIZE


def useful_blocks(options: EngineOptions, spec: ModelSpec) -> int:
    """More than twice what every sequence at full length takes would hardly be used."""
    longest = options.max_model_len or spec.max_positions
    return 2 * options.max_num_seqs * (longest // BLOCK_SIZE + 1)


def settle_max_model_len(
    options: EngineOptions, spec: ModelSpec, num_blocks: int, holder: str = "the KV cache"
) -> int:
    """What a request may have of tokens, given the blocks of whoever holds the fewest.

    Raises:
        ConfigError: the options ask for more than the model or the KV cache allows.
    """
    room = num_blocks * BLOCK_SIZE
    if options.max_model_len is None:
        return min(spec.max_positions, room)
    if options.max_model_len > spec.max_positions:
        raise ConfigError(
            f"--max-model-len is {options.max_model_len}; this model was made for "
            f"{spec.max_positions} tokens at most; lower it, or leave it out"
        )
    if options.max_model_len > room:
        raise ConfigError(
            f"--max-model-len is {options.max_model_len}, but {holder} holds {room} tokens; "
            f"lower it, or raise --kv-cache-memory-bytes"
        )
    return options.max_model_len


def size_text(num_bytes: int) -> str:
    """For people."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def kv_text(size_bytes: int, num_blocks: int, max_model_len: int, max_num_seqs: int) -> str:
    """What a KV cache holds, for people."""
    tokens = num_blocks * BLOCK_SIZE
    at_full_length = min(tokens // max_model_len, max_num_seqs)
    line = (
        f"KV cache   {size_text(size_bytes)} for {tokens:,} tokens: {at_full_length} requests of "
        f"{max_model_len:,} tokens at once"
    )
    if at_full_length == max_num_seqs:
        return line
    most = min(max_num_seqs, num_blocks)
    return f"{line}, or {most} of {num_blocks // most * BLOCK_SIZE:,}"
