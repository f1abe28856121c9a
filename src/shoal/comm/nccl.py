"""A group whose ranks are NVIDIA GPUs: NCCL. Untested on hardware.

Sums are queued on the current stream, and the host goes on. `all_gather` waits on the host,
because its result is read there next: whatever was queued before it has happened, or it raises. A
stage that hands on hidden states calls `finish` before it does. NCCL adds up each part once and
hands it on: all ranks have the same bits. Its ports listen on the interface that
NCCL_SOCKET_IFNAME names, without authentication: that must be a private one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from shoal.comm import NativeReduce
from shoal.comm.backend import RestartableBackend
from shoal.comm.parts import checked_parts, joined_bytes, parted, row_bytes
from shoal.comm.store import Store
from shoal.core.errors import CommError


class NcclGroup:
    """One rank's end.

    Args:
        store: reaches all ranks (comm/store.py).
        device: this rank's GPU; each rank has one of its own.
        deadline_s: how long a collective waits for the other ranks.

    Raises:
        CommError: a torch without NCCL, or the ranks did not find each other.
    """

    def __init__(
        self, store: Store, rank: int, size: int, device: torch.device, *, deadline_s: float = 30
    ) -> None:
        if not torch.distributed.is_nccl_available():
            raise CommError("this torch has no NCCL; install a CUDA build of torch, or use gloo")
        self._rank, self._size, self._device = rank, size, device

        def make(own_store: Store) -> Any:
            nccl: Any = torch.distributed.ProcessGroupNCCL
            options = nccl.Options()
            options._timeout = timedelta(seconds=deadline_s)
            return nccl(own_store, rank, size, options)

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
        """In the tensor's own dtype."""
        # Its wait is one of streams: the host does not stop.
        self._backend.begin(lambda backend: backend.allreduce([tensor]).wait())

    def all_gather(self, tensor: Tensor) -> Tensor:
        mine = tensor.contiguous()
        gathered = torch.empty((self._size, *mine.shape), dtype=mine.dtype, device=mine.device)
        self._backend.begin(lambda backend: backend._allgather_base(gathered, mine).wait())
        self.finish()
        return gathered

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The host waits for the lengths only; sends and receives are one group call of NCCL."""
        rest, dtype = checked_parts(parts, self._size)
        leaving = [len(part) for part in parts]
        lengths = self.all_gather(torch.tensor(leaving, device=parts[0].device))
        coming, one = lengths[:, self._rank].tolist(), row_bytes(rest, dtype)
        mine = joined_bytes(parts)
        taken = torch.empty(sum(coming) * one, dtype=torch.uint8, device=mine.device)
        splits = [count * one for count in coming], [count * one for count in leaving]
        self._backend.begin(lambda backend: backend.alltoall_base(taken, mine, *splits).wait())
        return parted(taken, coming, rest, dtype)

    def finish(self) -> None:
        """Wait on the host for all that was queued; raises `CommError` as a collective does."""
        queued = torch.cuda.Event()  # type: ignore[no-untyped-call]
        queued.record(torch.cuda.current_stream(self._device))
        self._backend.poll(queued.query)

    def abort(self) -> None:
        self._backend.abort()

    def reset(self, incarnation: int) -> None:
        self._backend.reset(incarnation)

    def close(self) -> None:
        self._backend.close()
