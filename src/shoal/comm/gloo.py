"""A group whose ranks are on several hosts, on CPUs: gloo over TCP.

Three ranks and more gather all parts up to 64 KiB, and add them up in rank order: half the steps.
Otherwise they go round the ring: each part is added up once and handed on, so all have the same
bits too.

gloo listens on ports of its own, on the interface it is given, without authentication: that must
be a private one. An abort ends the calls of this process only; a rank that hangs inside gloo for
another reason is restarted by the executor.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from shoal.comm import NativeReduce
from shoal.comm.backend import RestartableBackend
from shoal.comm.parts import checked_parts, joined_bytes, parted, row_bytes
from shoal.comm.store import Store
from shoal.comm.sums import sum_in_rank_order
from shoal.core.errors import CommError

_ONE_SHOT_BYTES = 64 << 10


class GlooGroup:
    """One rank's end.

    Args:
        store: reaches all ranks (comm/store.py).
        interface: its name or its address.
        deadline_s: how long a collective waits for the other ranks.

    Raises:
        CommError: no such interface, or the ranks did not find each other.
    """

    def __init__(
        self, store: Store, rank: int, size: int, interface: str, *, deadline_s: float = 30
    ) -> None:
        self._rank, self._size = rank, size
        self._buffers: dict[torch.dtype, Tensor] = {}

        def make(own_store: Store) -> ProcessGroupGloo:
            gloo: Any = ProcessGroupGloo  # its options are not in torch's stubs
            options = gloo._Options()
            options._devices = [_device(interface)]
            options._timeout = timedelta(seconds=deadline_s)
            group: ProcessGroupGloo = gloo(own_store, rank, size, options)
            return group

        self._backend = RestartableBackend(make, store, deadline_s)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def native(self) -> NativeReduce | None:
        return None

    def all_reduce(self, tensor: Tensor) -> None:
        if self._size > 2 and tensor.numel() * tensor.element_size() <= _ONE_SHOT_BYTES:
            sum_in_rank_order(self._gather(tensor).unbind(), tensor)
            return
        narrow = tensor.dtype in (torch.bfloat16, torch.float16)
        total = self._scratch(torch.float32 if narrow else tensor.dtype, tensor.numel())
        total.copy_(tensor.view(-1))
        self._backend.run(lambda backend: backend.allreduce([total]))
        tensor.copy_(total.view_as(tensor))

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._gather(tensor).clone()

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        rest, dtype = checked_parts(parts, self._size)
        leaving = torch.tensor([len(part) for part in parts])
        coming = self._gather(leaving)[:, self._rank].tolist()
        one = row_bytes(rest, dtype)
        mine, taken = joined_bytes(parts), torch.empty(sum(coming) * one, dtype=torch.uint8)
        splits = [count * one for count in coming], (leaving * one).tolist()
        self._backend.run(lambda backend: backend.alltoall_base(taken, mine, *splits))
        return parted(taken, coming, rest, dtype)

    def abort(self) -> None:
        self._backend.abort()

    def reset(self, incarnation: int) -> None:
        self._buffers = {}  # what was aborted may still write to the old ones
        self._backend.reset(incarnation)

    def close(self) -> None:
        self._backend.close()

    def _gather(self, tensor: Tensor) -> Tensor:
        """Valid until the next collective."""
        both = self._scratch(tensor.dtype, (self._size + 1) * tensor.numel())
        mine, gathered = both[: tensor.numel()], both[tensor.numel() :].view(self._size, -1)
        mine.copy_(tensor.reshape(-1))
        self._backend.run(lambda backend: backend.allgather([list(gathered.unbind())], [mine]))
        return gathered.view(self._size, *tensor.shape)

    def _scratch(self, dtype: torch.dtype, count: int) -> Tensor:
        """Kept, because fresh pages cost more than the exchange."""
        if (buffer := self._buffers.get(dtype)) is None or len(buffer) < count:
            buffer = self._buffers[dtype] = torch.empty(count, dtype=dtype)
        return buffer[:count]


def _device(interface: str) -> ProcessGroupGloo.Device:
    try:
        if _is_address(interface):
            return ProcessGroupGloo.create_device(hostname=interface)
        return ProcessGroupGloo.create_device(interface=interface)
    except RuntimeError as error:
        raise CommError(
            f"gloo cannot use the interface {interface!r}: {error}; name one of this host, or "
            "its address"
        ) from error


def _is_address(interface: str) -> bool:
    try:
        ipaddress.ip_address(interface)
    except ValueError:
        return False
    return True
