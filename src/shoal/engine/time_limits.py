"""Requests that time alone may end: past their own limit, or with a grammar that takes too long.

They are looked at when the first of them may be due, and not with every Step. Knows nothing of
what they compute.
"""

from __future__ import annotations

import math

from shoal.core.errors import InvalidRequestError, RequestError, RequestTimeoutError
from shoal.core.request import ErrorInfo
from shoal.engine.sequence import Sequence


class TimeLimits:
    """Of one engine.

    Args:
        grammar_timeout_s: that compiling a grammar may take.
    """

    def __init__(self, grammar_timeout_s: float) -> None:
        self._grammar_timeout_s = grammar_timeout_s
        self._sequences: dict[str, Sequence] = {}
        self._due_at = math.inf  # none is due before; the first one may have ended since

    def __bool__(self) -> bool:
        return bool(self._sequences)

    def follow(self, sequence: Sequence) -> None:
        """It is new, or has a limit more."""
        self._sequences[sequence.request.request_id] = sequence
        self._due_at = min(self._due_at, _deadline(sequence))

    def forget(self, request_id: str) -> None:
        """It has ended."""
        self._sequences.pop(request_id, None)
        if not self._sequences:
            self._due_at = math.inf

    def next_deadline(self) -> float | None:
        """When to look, at the latest."""
        return None if self._due_at == math.inf else self._due_at

    def late(self, now: float) -> list[tuple[Sequence, ErrorInfo]]:
        """Those that must end, each with what it is told; they are to be forgotten."""
        if now < self._due_at:
            return []
        found = [each for each in self._sequences.values() if now >= _deadline(each)]
        left = (_deadline(each) for each in self._sequences.values() if now < _deadline(each))
        self._due_at = min(left, default=math.inf)
        return [(each, ErrorInfo.of(self._error(each, now))) for each in found]

    def _error(self, sequence: Sequence, now: float) -> RequestError:
        if sequence.deadline is not None and now >= sequence.deadline:
            return RequestTimeoutError(
                f"the request ran past its limit of {sequence.request.timeout_s:g} s with "
                f"{sequence.num_output} tokens produced; raise the limit or lower max_tokens",
                code="timeout",
            )
        return InvalidRequestError(
            f"the schema took more than {self._grammar_timeout_s:g} s to compile; simplify it",
            code="grammar_timeout",
            param="response_format",
        )


def _deadline(sequence: Sequence) -> float:
    deadline = sequence.next_deadline
    return math.inf if deadline is None else deadline
