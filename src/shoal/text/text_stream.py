"""`TextStream`: the tokens of one request to text, as they come, up to its stop strings.

    tokens → bytes → UTF-8 (a character's bytes may come token by token) → stop search → text

What it hands out does not depend on how the tokens were grouped, and a stream that is rebuilt
from the outputs of another continues it to the letter. Work is linear in the output. Knows
nothing of HTTP or sampling.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass

from shoal.core.request import SamplingParams
from shoal.text.stop_search import StopSearch
from shoal.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """News of a stream.

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
        self._tokenizer = tokenizer
        self._params = params
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._search = StopSearch(params.stop)
        self._num_tokens = 0
        self._num_chars = 0
        self._held = ""
        self._stop: str | None = None
        self._strip_next = tokenizer.strips_leading_space and not any(map(self._shows, prompt_ids))
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
        ids = list(token_ids)
        hidden = len(ids) - 1 if stop_token and not self._params.include_stop_str_in_output else -1
        texts: list[str] = []
        offsets: list[int] = []
        for index, token_id in enumerate(ids):
            if self._stop is not None:
                break
            self._num_tokens += 1
            offsets.append(self._num_chars)
            if index != hidden and self._shows(token_id):
                texts.append(self._take(self._utf8.decode(self._bytes(token_id))))
        return TextDelta("".join(texts), len(offsets), tuple(offsets), self._stop)

    def finish(self) -> TextDelta:
        """Hands out what was held back; the stream takes no more tokens."""
        text = ""
        if self._stop is None:
            text = self._take(self._utf8.decode(b"", final=True))
        if self._stop is None:
            text, self._held = text + self._held, ""
        return TextDelta(text, stop=self._stop)

    def _shows(self, token_id: int) -> bool:
        return not (self._params.skip_special_tokens and self._tokenizer.is_special(token_id))

    def _bytes(self, token_id: int) -> bytes:
        spelled = self._tokenizer.token_bytes(token_id)
        if self._strip_next:
            self._strip_next = False
            return spelled.removeprefix(b" ")
        return spelled

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
