"""What a model's files say of its tokenizer, whichever files they are."""

from __future__ import annotations

from dataclasses import dataclass

import tokenizers


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """What `Tokenizer` is made of.

    Attributes:
        special_tokens: text by role ("bos_token", "eos_token", ...).
        eos_token_ids: every id that ends a generation.
        chat_template: Jinja text; None: the model has none.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
