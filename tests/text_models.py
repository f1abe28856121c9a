"""Tiny vocabularies for tests: the metadata a GGUF file would carry, and such a file."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.core.gguf_tokens import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from shoal.text.token_bytes import byte_of_character

SMALL_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def byte_level_metadata(**overrides: Any) -> dict[str, Any]:
    """Every byte, three merges and three added tokens, spelled as GPT-2 does."""
    alphabet = {byte: character for character, byte in byte_of_character().items()}
    merges = ["h e", "he l", "Ġ he"]
    tokens = [alphabet[byte] for byte in range(256)]
    tokens += ["he", "hel", "Ġhe", "<s>", "</s>", "<think>"]
    types = [NORMAL] * 259 + [CONTROL, CONTROL, USER_DEFINED]
    return _metadata(
        {
            "model": "gpt2",
            "pre": "gpt-2",
            "tokens": tokens,
            "token_type": types,
            "merges": merges,
            "bos_token_id": 259,
            "eos_token_id": 260,
        },
        overrides,
    )


def sentencepiece_metadata(**overrides: Any) -> dict[str, Any]:
    """Byte fallback for everything but the letters of "hello" and their merges."""
    special = [("<unk>", UNKNOWN, 0.0), ("<s>", CONTROL, 0.0), ("</s>", CONTROL, 0.0)]
    byte_tokens = [(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)]
    pieces = ["he", "ll", "▁he", "▁hell", "▁hello", "▁", "h", "e", "l", "o"]
    normal = [(piece, NORMAL, -float(rank)) for rank, piece in enumerate(pieces)]
    rows = [*special, *byte_tokens, *normal]
    return _metadata(
        {
            "model": "llama",
            "tokens": [token for token, _, _ in rows],
            "token_type": [kind for _, kind, _ in rows],
            "scores": [score for _, _, score in rows],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
        },
        overrides,
    )


def _metadata(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**fields, **overrides}
    return {f"tokenizer.ggml.{name}": value for name, value in merged.items() if value is not None}


def gguf_bytes(
    metadata: Mapping[str, Any], tensors: Sequence[tuple[str, tuple[int, ...]]] = ()
) -> bytes:
    """A GGUF file of version 3: strings, bools, ints, floats and lists of them; fp32 tensors."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, packed = _packed(value)
        head += _string(key) + struct.pack("<I", kind) + packed
    offset = 0
    for name, dims in tensors:
        head += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)
        offset += 64
    return head + bytes(-len(head) % 32) + bytes(offset)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _packed(value: Any) -> tuple[int, bytes]:
    match value:
        case bool():
            return 7, struct.pack("<?", value)
        case int():
            return 4, struct.pack("<I", value)
        case float():
            return 6, struct.pack("<f", value)
        case str():
            return 8, _string(value)
        case list():
            kind = _packed(value[0])[0] if value else 8
            items = b"".join(_packed(item)[1] for item in value)
            return 9, struct.pack("<IQ", kind, len(value)) + items
    raise TypeError(type(value))
