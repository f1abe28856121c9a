"""Numbers that are free, the longest free first: a doubly linked list in two arrays.

    after   [ .. 4 .. ]     of each number, the next one; of the end mark, the first
    before  [ .. 1 .. ]     and the one before; of the end mark, the last

Eight bytes a number, as a simulation has those of a thousand engines. Knows nothing of blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np


class FreeList:
    """
    Args:
        length: numbers from 0 on, all of them free.
        order: in which they are to be taken; empty: as they are.
    """

    __slots__ = ("_after", "_before", "_end", "_len")

    def __init__(self, length: int, order: Sequence[int] = ()) -> None:
        self._end = self._len = length
        self._after = array("i", np.arange(1, length + 2, dtype=np.intc).tobytes())
        self._after[length] = 0
        self._before = array("i", np.arange(-1, length, dtype=np.intc).tobytes())
        self._before[0] = length
        for number, following in pairwise((length, *order, length) if order else ()):
            self._after[number], self._before[following] = following, number

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[int]:
        number = self._after[self._end]
        while number != self._end:
            yield number
            number = self._after[number]

    def take(self, count: int) -> list[int]:
        """The first so many, which there are."""
        after, end = self._after, self._end
        taken, number = [], after[end]
        for _ in range(count):
            taken.append(number)
            number = after[number]
        after[end], self._before[number] = number, end
        self._len -= count
        return taken

    def remove(self, number: int) -> None:
        """One that is free."""
        before, after = self._before[number], self._after[number]
        self._after[before], self._before[after] = after, before
        self._len -= 1

    def add_first(self, number: int) -> None:
        """One that was not free."""
        end, after = self._end, self._after[self._end]
        self._after[end] = self._before[after] = number
        self._before[number], self._after[number] = end, after
        self._len += 1

    def add_last(self, numbers: Sequence[int]) -> None:
        """These, which were not free, in this order."""
        after, before, end = self._after, self._before, self._end
        last = before[end]
        for number in numbers:
            after[last], before[number] = number, last
            last = number
        after[last], before[end] = end, last
        self._len += len(numbers)
