"""`TextStream`: the tokens of one request to text, as they come, up to its stop strings.

    tokens → bytes → UTF-8 (a character's bytes may come token by token) → stop search → text

What it hands out does not depend on how the tokens were grouped, and a stream that is rebuilt
from the outputs of another continues it to the letter. Work is linear in the output. Knows
nothing of HTTP or sampling.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

import msgspec

from shoal.core.request import SamplingParams
from shoal.text.stop_search import StopSearch
from shoal.text.tokenizer import Tokenizer


class TextDelta(msgspec.Struct, frozen=True, gc=False):
    """News of a stream. A msgspec struct, since one is made for every token.

    Attributes:
        text: to append to what was handed out before.
        num_tokens: how many of the tokens pushed count; those behind a stop string don't.
        offsets: one for each token that counts: where its text begins in the whole output, in
            characters (a token that only adds bytes of an unfinished character begins there).
        stop: the stop string that ended the output.
    """

    text: str
    num_tokens: int = 0
    offsets: tuple[int, ...] = ()
    stop: str | None = None


def _never(token_id: int) -> bool:
    return False


_UTF8Decoder = codecs.getincrementaldecoder("utf-8")


class TextStream:
    """Detokenises one output and searches it for stop strings.

    Args:
        params: stop, min_tokens, include_stop_str_in_output and skip_special_tokens are used.
            A stop string counts when the token that completes it is at least the
            `min_tokens`-th of the output.
        prompt_ids: they decide whether the output begins the text (sentencepiece then drops
            one leading space).
        output_ids: outputs already handed out by another stream; taken in silence.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_ids: Iterable[int],
        output_ids: Iterable[int] = (),
    ) -> None:
        self._params = params
        self._bytes = tokenizer.token_bytes
        self._hides = tokenizer.is_special if params.skip_special_tokens else _never
        self._utf8 = _UTF8Decoder(errors="replace")
        self._in_character = False
        self._search = StopSearch(params.stop)
        self._num_tokens = 0
        self._num_chars = 0
        self._held = ""
        self._stop: str | None = None
        self._strip_next = tokenizer.strips_leading_space and all(map(self._hides, prompt_ids))
        self.push(output_ids)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the output, if one has."""
        return self._stop

    def push(self, token_ids: Iterable[int], *, stop_token: bool = False) -> TextDelta:
        """Takes the next tokens of the output.

        Args:
            stop_token: the last id ended the output (EOS or one of `stop_token_ids`): it
                counts, but shows only with `include_stop_str_in_output`.
        """
        ids = tuple(token_ids)
        last_hides = stop_token and not self._params.include_stop_str_in_output
        if len(ids) == 1 and self._stop is None:
            return self._push_one(ids[0], last_hides)
        deltas: list[TextDelta] = []
        for index, token_id in enumerate(ids, start=1):
            if self._stop is not None:
                break
            deltas.append(self._push_one(token_id, last_hides and index == len(ids)))
        return deltas[0] if len(deltas) == 1 else self._joined(deltas)

    def finish(self) -> TextDelta:
        """Hands out what was held back; the stream takes no more tokens."""
        text = ""
        if self._stop is None:
            text = self._take(self._utf8.decode(b"", True))
        if self._stop is None:
            text, self._held = text + self._held, ""
        return TextDelta(text, stop=self._stop)

    def _push_one(self, token_id: int, hides: bool) -> TextDelta:
        self._num_tokens += 1
        offsets = (self._num_chars,)
        if hides or self._hides(token_id):
            return TextDelta("", 1, offsets)
        text = self._take(self._decode(self._bytes(token_id)))
        return TextDelta(text, 1, offsets, self._stop)

    def _joined(self, deltas: Sequence[TextDelta]) -> TextDelta:
        return TextDelta(
            "".join(delta.text for delta in deltas),
            len(deltas),
            tuple(offset for delta in deltas for offset in delta.offsets),
            self._stop,
        )

    def _decode(self, spelled: bytes) -> str:
        if self._strip_next:
            self._strip_next = False
            spelled = spelled.removeprefix(b" ")
        if not self._in_character and spelled.isascii():
            return spelled.decode("ascii")  # as nearly all tokens are, in a fifth of the time
        text = self._utf8.decode(spelled)
        self._in_character = bool(self._utf8.getstate()[0])
        return text

    def _take(self, text: str) -> str:
        """Appends decoded text; returns what need not be held back any longer."""
        self._num_chars += len(text)
        if not self._params.stop:
            return text
        counts = self._num_tokens >= self._params.min_tokens
        pending = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            stop = self._search.advance(character, counts=counts)
            if stop is not None:
                self._stop, self._held = stop, ""
                whole = self._params.include_stop_str_in_output
                return pending[: position if whole else position - len(stop)]
        cut = len(pending) - self._search.num_held
        self._held = pending[cut:]
        return pending[:cut]
