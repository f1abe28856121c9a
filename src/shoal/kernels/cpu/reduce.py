"""A sum over ranks that is written in Python, as the compiled library calls it.

Knows nothing of who the ranks are or how they meet.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from shoal.kernels.cpu import library as c


class PythonReduce:
    """`all_reduce` of fp32, in place, as a `shoal_reduce`; lives as long as who may call it.

    Nothing may be raised through C: an error is kept for the caller to raise.
    """

    def __init__(self, all_reduce: Callable[[Tensor], None]) -> None:
        self._all_reduce = all_reduce
        self._error: BaseException | None = None
        self._function = c.REDUCE(self._run)

    @property
    def address(self) -> int:
        return ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def take_error(self) -> BaseException | None:
        """What made the last call fail."""
        error, self._error = self._error, None
        return error

    def _run(self, _context: int | None, data: int, count: int) -> int:
        floats = (ctypes.c_float * count).from_address(data)
        try:
            self._all_reduce(torch.frombuffer(floats, dtype=torch.float32))
        except BaseException as error:  # noqa: BLE001
            self._error = error
            return 1
        return 0
