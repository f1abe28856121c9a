"""A group whose ranks are processes (or threads) of one host, over memory they inherit.

The memory is a file descriptor without a name: nobody else can open it, and it is gone with the
last process that has it. Copies, sums and waits are compiled (csrc/group.cpp). Tensors are on the
CPU; who makes the memory and starts the ranks is known elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.comm import NativeReduce
from shoal.comm.library import load_library
from shoal.comm.parts import checked_parts, joined_bytes, parted, row_bytes
from shoal.comm.stretch import checked_speed
from shoal.comm.sums import sum_in_rank_order
from shoal.core.errors import CommError

_MAX_INCARNATION = (1 << 20) - 1
_FAILURES = {
    1: "the collectives of this incarnation were aborted",
    2: "a rank did not come to a collective within {deadline_s} s",
    3: "the ranks came to different collectives, or with tensors of different sizes",
}


class SharedMemoryGroup:
    """One rank's end.

    Args:
        fd: of `create_memory`; mapped here, and no longer needed after that.
        deadline_s: how long a collective waits for the other ranks.
        behind: size of the group whose memory lies before this one's; 0: none.
        speed: below 1.0, what this rank's thread computes between collectives is stretched.

    Raises:
        OSError: no library, or memory that is too small.
    """

    def __init__(
        self,
        fd: int,
        rank: int,
        size: int,
        *,
        behind: int = 0,
        deadline_s: float = 30,
        speed: float = 1.0,
    ) -> None:
        library = self._library = load_library()
        self._rank, self._size, self._deadline_s = rank, size, deadline_s
        offset = library.shoal_group_bytes(behind) if behind else 0
        deadline_ns = round(deadline_s * 1e9)
        context = library.shoal_group_create(fd, offset, rank, size, deadline_ns)
        if context is None:
            error = ctypes.get_errno()
            raise OSError(error, f"the shared memory of rank {rank}: {os.strerror(error)}")
        self._context: int | None = context
        # Held by what other threads may call, so that none of it meets freed memory.
        self._closing = threading.Lock()
        self._native = NativeReduce(
            function=_address(self._library.shoal_group_all_reduce), context=context
        )
        self.set_speed(speed)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def native(self) -> NativeReduce | None:
        return self._native

    @property
    def waited_s(self) -> float:
        """Spent in collectives since it began, most of it waiting for other ranks."""
        return int(self._library.shoal_group_waited_ns(self._open())) / 1e9

    def set_speed(self, speed: float) -> None:
        """From any thread."""
        checked_speed(speed)
        with self._closing:
            if self._context is not None:
                self._library.shoal_group_set_speed(self._context, speed)

    def pay(self) -> None:
        """Sleep off what was computed since the last collective, rather than in the next."""
        self._library.shoal_group_pay(self._open())

    def all_reduce(self, tensor: Tensor) -> None:
        _check(tensor)
        if tensor.dtype == torch.float32:
            self._reduce(tensor)
        elif tensor.dtype in (torch.bfloat16, torch.float16):
            wide = tensor.float()
            self._reduce(wide)
            tensor.copy_(wide)
        else:
            sum_in_rank_order(list(self.all_gather(tensor)), tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        mine = tensor.contiguous()
        _check(mine)
        gathered = torch.empty((self._size, *mine.shape), dtype=mine.dtype)
        num_bytes = mine.numel() * mine.element_size()
        status = self._library.shoal_group_all_gather(
            self._open(), mine.data_ptr(), num_bytes, gathered.data_ptr()
        )
        self._raise_unless_done(status)
        return gathered

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        rest, dtype = checked_parts(parts, self._size)
        mine, num_bytes = joined_bytes(parts), ctypes.c_int64 * self._size
        _check(mine)
        leaving = num_bytes(*(part.numel() * part.element_size() for part in parts))
        coming = num_bytes()
        context = self._open()
        self._raise_unless_done(
            self._library.shoal_group_send_parts(context, mine.data_ptr(), leaving, coming)
        )
        taken = torch.empty(sum(coming), dtype=torch.uint8)
        self._raise_unless_done(self._library.shoal_group_take_parts(context, taken.data_ptr()))
        one = row_bytes(rest, dtype)
        if any(count % one for count in coming):
            self.abort()
            raise CommError(f"{list(coming)} bytes came, of rows of {one}: {_FAILURES[3]}")
        return parted(taken, [count // one for count in coming], rest, dtype)

    def abort(self) -> None:
        with self._closing:
            if self._context is not None:
                self._library.shoal_group_abort(self._context)

    def reset(self, incarnation: int) -> None:
        if not 0 <= incarnation <= _MAX_INCARNATION:
            raise CommError(f"incarnation {incarnation}; 0 to {_MAX_INCARNATION} are possible")
        self._library.shoal_group_reset(self._open(), incarnation)

    def close(self) -> None:
        """Let go of the memory; no collective of this rank may be under way."""
        with self._closing:
            if self._context is not None:
                self._library.shoal_group_destroy(self._context)
            self._context = None

    def _reduce(self, tensor: Tensor) -> None:
        self._raise_unless_done(
            self._library.shoal_group_all_reduce(self._open(), tensor.data_ptr(), tensor.numel())
        )

    def _open(self) -> int:
        if self._context is None:
            raise CommError("the group is closed")
        return self._context

    def _raise_unless_done(self, status: int) -> None:
        if status:
            raise CommError(_FAILURES[status].format(deadline_s=self._deadline_s))


def _address(function: object) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return address


def _check(tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise CommError(
            f"a tensor on {tensor.device} with strides {tensor.stride()}; collectives in shared "
            "memory take contiguous ones on the CPU"
        )
