"""Which token ids end a generation, by a GGUF file's metadata. Standard library only.

A GGUF file has no generation_config.json: it names one end-of-sequence id, sometimes an
end-of-turn id too, and leaves the others (Gemma's <end_of_turn>, Llama 3's <|eom_id|>) to be
known by their text, as llama.cpp does (`llama_vocab::impl::load`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from shoal.core.gguf_header import Value


def gguf_eos_token_ids(metadata: Mapping[str, Value]) -> tuple[int, ...]:
    """Ids that end a generation: the file's own end-of-sequence id first, the rest ascending."""
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    types = metadata.get("tokenizer.ggml.token_type", ())
    if not isinstance(tokens, Sequence) or not isinstance(types, Sequence):
        return ()
    named = [
        token_id
        for key in ("eos", "eot", "eom")
        if isinstance(token_id := metadata.get(f"tokenizer.ggml.{key}_token_id"), int)
        and 0 <= token_id < len(tokens)
    ]
    # Some converters forgot what kind a turn's end is: llama.cpp too goes by its text then.
    by_text = [
        token_id
        for token_id, (token, kind) in enumerate(zip_longest(tokens, types[: len(tokens)]))
        if token in _END_TEXTS and (kind == CONTROL or token in _UNMISTAKABLE)
    ]
    return tuple(dict.fromkeys(named + by_text))


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of `tokenizer.ggml.token_type` (`llama_token_type`)."""

_END_TEXTS = frozenset(
    (
        "</s>",
        "<eos>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "[EOT]",
        "[EOS]",
        "<｜end▁of▁sentence｜>",
    )
)
_UNMISTAKABLE = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")
)
