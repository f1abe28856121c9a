"""Searches a growing text for stop strings, one character at a time.

One Knuth-Morris-Pratt automaton a string: after every character its state is the length of
the longest suffix of the text that begins the string. So no text is looked at twice, and the
largest state is exactly what must be held back. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopSearch:
    """Where the text ends.

    Attributes:
        num_held: characters at the end of the text that may begin a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # Longest first: of strings that end at the same character, the longest begins first.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failure_links(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self.num_held = 0

    def advance(self, character: str, *, counts: bool) -> str | None:
        """Takes the next character; returns the stop string it completes, if `counts`."""
        matched = None
        for index, stop in enumerate(self._stops):
            failures = self._failures[index]
            state = self._states[index]
            while state and stop[state] != character:
                state = failures[state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                if counts and matched is None:
                    matched = stop
                state = failures[state - 1]
            self._states[index] = state
        self.num_held = max(self._states, default=0)
        return matched


def _failure_links(stop: str) -> list[int]:
    """links[i]: length of the longest proper prefix of `stop[:i + 1]` that is its suffix too."""
    links = [0] * len(stop)
    length = 0
    for position in range(1, len(stop)):
        while length and stop[position] != stop[length]:
            length = links[length - 1]
        length += stop[position] == stop[length]
        links[position] = length
    return links
