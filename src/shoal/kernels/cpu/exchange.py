"""What Python does before and after the products of experts, as the compiled library calls it.

    T tokens   E hidden size   K experts of a token

Knows nothing of what is done, or with whom.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from shoal.kernels.cpu import library as c

Routed = Callable[[int, Tensor, Tensor, Tensor, int], None]
"""(layer, x_TE, ids_TK in int64, weights_TK, phase): ids and weights may be changed in place."""

Returned = Callable[[Tensor], None]
"""(out_TE): what it adds is added in place."""


class PythonExchange:
    """Both, as the library wants them; lives as long as who may call it.

    Nothing may be raised through C: an error is kept for the caller to raise.
    """

    def __init__(
        self, routed: Routed, returned: Returned, *, hidden_size: int, num_active: int
    ) -> None:
        self._routed, self._returned = routed, returned
        self._hidden_size, self._num_active = hidden_size, num_active
        self._error: BaseException | None = None
        self._c_routed, self._c_returned = c.ROUTED(self._before), c.RETURNED(self._after)

    @property
    def addresses(self) -> tuple[int | None, int | None]:
        """Of what comes before the products, and of what comes after them."""
        before, after = (
            ctypes.cast(each, ctypes.c_void_p).value for each in (self._c_routed, self._c_returned)
        )
        return before, after

    def take_error(self) -> BaseException | None:
        """What made the last call fail."""
        error, self._error = self._error, None
        return error

    def _before(
        self,
        _context: int | None,
        layer: int,
        num_tokens: int,
        phase: int,
        x: int,
        ids: int,
        weights: int,
    ) -> int:
        def run() -> None:
            self._routed(
                layer,
                _floats(x, num_tokens, self._hidden_size),
                _tensor(ids, ctypes.c_int64, torch.int64, num_tokens, self._num_active),
                _floats(weights, num_tokens, self._num_active),
                phase,
            )

        return self._guarded(run)

    def _after(self, _context: int | None, num_tokens: int, out: int) -> int:
        return self._guarded(lambda: self._returned(_floats(out, num_tokens, self._hidden_size)))

    def _guarded(self, run: Callable[[], None]) -> int:
        try:
            run()
        except BaseException as error:  # noqa: BLE001
            self._error = error
            return 1
        return 0


def _floats(address: int, rows: int, columns: int) -> Tensor:
    return _tensor(address, ctypes.c_float, torch.float32, rows, columns)


def _tensor(
    address: int,
    kind: type[ctypes.c_float | ctypes.c_int64],
    dtype: torch.dtype,
    rows: int,
    columns: int,
) -> Tensor:
    memory = (kind * (rows * columns)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(rows, columns)
