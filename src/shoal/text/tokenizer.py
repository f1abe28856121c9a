"""`Tokenizer`: text to token ids and back, from a model's folder or its GGUF file.

Knows nothing of requests, HTTP or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path

import tokenizers

from shoal.core.errors import InvalidRequestError
from shoal.text.chat_template import ChatTemplate
from shoal.text.gguf_tokenizer import read_gguf
from shoal.text.token_bytes import TokenBytes
from shoal.text.tokenizer_folder import read_folder


def load_tokenizer(path: Path, *, chat_template: str | None = None) -> Tokenizer:
    """Loads the tokenizer of a model.

    Args:
        path: a `.gguf` file, or a folder with tokenizer.json (and, where present,
            tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json,
            chat_template.jinja or chat_template.json).
        chat_template: Jinja text to use instead of the model's own.

    Raises:
        ModelError: missing or malformed files.
        UnsupportedModelError: a kind of tokenizer that shoal does not read.
    """
    parts = read_folder(path) if path.is_dir() else read_gguf(path)
    source = parts.chat_template if chat_template is None else chat_template
    return Tokenizer(
        parts.backend,
        special_tokens=parts.special_tokens,
        eos_token_ids=parts.eos_token_ids,
        chat_template=None if source is None else ChatTemplate(source, parts.special_tokens),
    )


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        bos_token_id: begins a text, if the model has such a token.
        eos_token_ids: every id that ends a generation.
        special_tokens: text by role ("bos_token", "eos_token", ...), as chat templates see them.
        chat_template: None if the model came without one.
        token_bytes: token id -> the bytes it stands for, its leading space included.
        is_special: token id -> whether `skip_special_tokens` leaves it out.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: tuple[int, ...],
        chat_template: ChatTemplate | None,
    ) -> None:
        self._backend = backend
        self._bytes = TokenBytes(backend)
        special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        # Asked for every token of every stream, hence no methods around them.
        self.token_bytes: Callable[[int], bytes] = self._bytes.__getitem__
        self.is_special: Callable[[int], bool] = special_ids.__contains__
        bos = special_tokens.get("bos_token")
        self.bos_token_id = None if bos is None else backend.token_to_id(bos)
        self.eos_token_ids = eos_token_ids
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template

    def require_chat_template(self) -> ChatTemplate:
        """The chat template, or an `InvalidRequestError` that says what to do without."""
        if self.chat_template is None:
            raise InvalidRequestError(
                "the model has no chat template, and chat needs one; start the server with "
                "--chat-template FILE, or use /v1/completions",
                code="no_chat_template",
                param="messages",
            )
        return self.chat_template

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary; the model's logits may be wider (padding)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def json(self) -> str:
        """The whole tokenizer as the text of a tokenizer.json."""
        return self._backend.to_str()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it become their ids."""
        try:
            # The plain `encode` keeps the GIL: a second and more for megabytes of text.
            (encoded,) = self._backend.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        except TypeError as error:  # what tokenizers makes of a lone surrogate
            raise InvalidRequestError(
                "the text holds a lone surrogate, which is not Unicode text; send valid UTF-8",
                code="invalid_unicode",
            ) from error
        ids: list[int] = encoded.ids
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; invalid UTF-8 becomes U+FFFD, ids beyond the vocabulary nothing."""
        pieces = [
            self._bytes[token_id]
            for token_id in token_ids
            if not (skip_special_tokens and self.is_special(token_id))
        ]
        if pieces and self.strips_leading_space:
            pieces[0] = pieces[0].removeprefix(b" ")
        return b"".join(pieces).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        r"""A token's text for people; bytes that are no text alone as OpenAI shows them:
        ``bytes:\xe2\x82``."""
        spelled = self._bytes[token_id]
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    @property
    def strips_leading_space(self) -> bool:
        """Whether text that begins at the first token loses one leading space."""
        return self._bytes.strips_leading_space

    def fewest_tokens(self, text: str) -> int:
        """A lower bound on `len(encode(text))`, in no time: for refusing what can't fit.

        The fourfold slack is for normal form C, which shortens decomposed text.
        """
        return len(text) // (4 * self._max_token_chars)

    @cached_property
    def _max_token_chars(self) -> int:
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))
