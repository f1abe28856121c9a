"""Experts that are brought into memory by Python, as the compiled library asks for them.

Knows nothing of where they come from.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import pairwise

from shoal.kernels.cpu import library as c

Bring = Callable[[int, int, Sequence[int]], tuple[int, Sequence[tuple[int, int, int]]]]
"""Of (layer, first share, tokens of each share): up to which share all are in memory, and of those
with tokens the share, where its gate and up lie, and where its down lies."""


class PythonBring:
    """A `shoal_bring`; lives as long as who may call it.

    Nothing may be raised through C: an error is kept for the caller to raise.
    """

    def __init__(self, bring: Bring) -> None:
        self._errors: list[BaseException] = []
        self._function = c.BRING(_carrying(bring, self._errors))

    @property
    def address(self) -> int:
        return ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def take_error(self) -> BaseException | None:
        """What made the last call fail."""
        return self._errors.pop() if self._errors else None


def _carrying(
    bring: Bring, errors: list[BaseException]
) -> Callable[[int | None, ctypes._Pointer[c.Experts], int, int], int]:
    # A function of its own, not a method: what it refers to is freed with the last who does.
    def run(
        _context: int | None, pointer: ctypes._Pointer[c.Experts], first: int, starts_at: int
    ) -> int:
        experts = pointer.contents
        try:
            starts = (ctypes.c_int64 * (experts.num_shares + 1)).from_address(starts_at)[:]
            until, places = bring(experts.layer, first, [b - a for a, b in pairwise(starts)])
            for share, gate_up, down in places:
                experts.weights[2 * share].data = gate_up
                experts.weights[2 * share + 1].data = down
        except BaseException as error:  # noqa: BLE001
            errors[:] = [error]
            return -1
        return until

    return run
