"""The tokenizer's fields in a GGUF file's metadata, checked as they are read.

Knows nothing of what the fields are used for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoal.core.errors import ModelError
from shoal.core.gguf_header import Value


class GGUFTokenizerFields:
    """Typed access to `tokenizer.ggml.*`; what is missing or malformed is a `ModelError`."""

    def __init__(self, metadata: Mapping[str, Value]) -> None:
        self._metadata = metadata

    def text(self, name: str, default: str | None = None) -> str:
        value = self._metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, str):
            raise self.error(name, f"is {_shown(value)}; a string is needed")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            raise self.error(name, f"is {_shown(value)}; a boolean is needed")
        return value

    def token_id(self, name: str) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.strings("tokens")):
            raise self.error(f"{name}_token_id", f"is {_shown(value)}, not an id of the vocabulary")
        return value

    def strings(self, name: str) -> list[str]:
        value = self._metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, list) or not value or not isinstance(value[0], str):
            raise self.error(name, f"is {_shown(value)}; a list of strings is needed")
        return value

    def numbers(self, name: str) -> Sequence[float]:
        value = self._metadata.get(f"tokenizer.ggml.{name}")
        count = len(self.strings("tokens"))
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
            raise self.error(name, f"is {_shown(value)}; {count} numbers are needed")
        return value  # type: ignore[return-value]

    def typed_tokens(self) -> zip[tuple[str, float]]:
        return zip(self.strings("tokens"), self.numbers("token_type"), strict=True)

    def error(self, name: str, what: str) -> ModelError:
        return ModelError(
            f"the GGUF file's tokenizer.ggml.{name} {what}; "
            "the file may be damaged or made by an old converter: fetch or convert it again"
        )


def _shown(value: Value | None) -> str:
    if value is None:
        return "missing"
    text = repr(value[:3]) if isinstance(value, Sequence) else repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
