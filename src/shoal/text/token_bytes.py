"""The bytes each token stands for, by the vocabulary's own way of spelling them.

    byte-level    "Ġthe"  -> b" the"     every character is a byte (GPT-2's alphabet)
    sentencepiece "▁the"  -> b" the"     ▁ is a space, <0xE2> is a byte

Text is then the UTF-8 of the joined bytes, each invalid byte sequence giving U+FFFD. Where the
bytes are valid this is what `tokenizers` decodes to; where they are not, it turns a whole run
of byte tokens into U+FFFD, which can't be known while streaming. Knows nothing of requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import tokenizers

from shoal.core.errors import UnsupportedModelError


class TokenBytes(dict[int, bytes]):
    """Token id -> bytes, computed when first asked for.

    Attributes:
        strips_leading_space: text that begins at position 0 loses one leading space, the
            one that encoding put there (sentencepiece).
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._backend = backend
        decoders = list(_flatten(_decoder_json(backend)))
        kinds = {decoder["type"] for decoder in decoders}
        self._byte_level = kinds == {"ByteLevel"}
        if not self._byte_level and not (kinds and all(map(_is_sentencepiece, decoders))):
            raise UnsupportedModelError(
                f"the tokenizer decodes with {', '.join(sorted(kinds)) or 'nothing'}; shoal reads "
                "byte-level BPE and sentencepiece vocabularies"
            )
        self.strips_leading_space = any(_strips(decoder) for decoder in decoders)
        self._alphabet = byte_of_character()

    def __missing__(self, token_id: int) -> bytes:
        """Bytes of a token; none for an id the vocabulary does not have."""
        text = self._backend.id_to_token(token_id)
        if text is None:
            return b""
        spelled = self[token_id] = self._spell(text)
        return spelled

    def _spell(self, text: str) -> bytes:
        if self._byte_level:
            spelled = [self._alphabet.get(character) for character in text]
            # Added tokens are written as they are; any other character gives them away.
            return (
                text.encode()
                if None in spelled
                else bytes(byte for byte in spelled if byte is not None)
            )
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes.fromhex(text[3:5])
        return text.replace("▁", " ").encode()


def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


def _flatten(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _flatten(part)
    else:
        yield decoder


def _is_sentencepiece(decoder: dict[str, Any]) -> bool:
    match decoder:
        case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
            return True
        case {"type": "Metaspace", "replacement": "▁"}:
            return True
        case {"type": "ByteFallback" | "Fuse"}:
            return True
    return _strips(decoder)


def _strips(decoder: dict[str, Any]) -> bool:
    match decoder:
        case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
            return True
        case {"type": "Metaspace", "prepend_scheme": "always" | "first"}:
            return True
    return False


def _decoder_json(backend: tokenizers.Tokenizer) -> dict[str, Any] | None:
    # The whole tokenizer as JSON would take half a second for a large vocabulary.
    if backend.decoder is None:
        return None
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return state
