"""The group of an instance's ranks: which of `comm/`, and what it needs to be made.

Knows nothing of models or Steps.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.comm.compressed import CompressedGroup, SumForm
from shoal.comm.gloo import GlooGroup
from shoal.comm.in_process import in_process_groups
from shoal.comm.nccl import NcclGroup
from shoal.comm.shared_memory import SharedMemoryGroup
from shoal.comm.store import MessageStore, PrefixStore, Store
from shoal.comm.streams import StreamGroup, TimedStreamGroup
from shoal.core.errors import DeviceError
from shoal.wire.worker_messages import StoreGet, StoreSet

_DEADLINE_S = 60.0
"""Ranks come to a collective together; one that died is noticed elsewhere, and much sooner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlace:
    """One rank of a group.

    Attributes:
        kind: "none", or a module of `comm/`.
        streams: the ranks that keep hidden states.
        fd: of shared memory, inherited; it is closed here.
        address: of the interface that collectives use.
        sums: in which form those of hidden states cross a network.
    """

    kind: str
    rank: int
    size: int
    streams: tuple[int, ...]
    fd: int | None
    address: str
    device: str
    sums: SumForm = field(default_factory=SumForm)
    hidden_size: int = 1


class Rendezvous:
    """Values by which ranks find each other, kept by the executor that started them.

    Args:
        send: asks it.
    """

    def __init__(self, send: Callable[[StoreSet | StoreGet], None]) -> None:
        self._send = send
        self._values: dict[str, bytes] = {}
        self._came = threading.Condition()
        self.store = MessageStore(self._put, self._get, _DEADLINE_S)

    def take(self, key: str, value: bytes) -> None:
        """The executor's answer; from any thread."""
        with self._came:
            self._values[key] = value
            self._came.notify_all()

    def _put(self, key: str, value: bytes) -> None:
        self._send(StoreSet(key, value))

    def _get(self, key: str, timeout_s: float) -> bytes:
        self._send(StoreGet(key))
        with self._came:
            if not self._came.wait_for(lambda: key in self._values, timeout_s):
                raise TimeoutError(f"no rank said {key!r} within {timeout_s:g} s")
            return self._values.pop(key)


def make_group(place: GroupPlace, store: Store) -> Group | None:
    """This rank's end; None: it is alone.

    Args:
        store: of the ranks that find each other.

    Raises:
        CommError: the others did not come.
        DeviceError: shared memory that cannot be used.
    """
    if place.kind == "none":
        return None
    try:
        everyone = _make(place, place.rank, place.size, store)
        if len(place.streams) == place.size:
            return everyone
        streams = None
        if place.rank in place.streams:
            rank, size = place.streams.index(place.rank), len(place.streams)
            streams = _make(place, rank, size, PrefixStore("streams", store), behind=place.size)
        if place.kind == "shared_memory":
            return TimedStreamGroup(everyone, streams)
        return StreamGroup(everyone, streams)
    finally:
        if place.fd is not None:
            os.close(place.fd)


def groups_in_threads(size: int, streams: Sequence[int]) -> Sequence[Group | None]:
    """The same for ranks that are threads of this process, one for each."""
    if size == 1:
        return [None]
    everyone = in_process_groups(size, _DEADLINE_S)
    if len(streams) == size:
        return everyone
    sharing = dict(zip(streams, in_process_groups(len(streams), _DEADLINE_S), strict=True))
    return [StreamGroup(group, sharing.get(group.rank)) for group in everyone]


def _make(place: GroupPlace, rank: int, size: int, store: Store, behind: int = 0) -> Group:
    if place.kind == "shared_memory":
        assert place.fd is not None
        try:
            return SharedMemoryGroup(place.fd, rank, size, behind=behind, deadline_s=_DEADLINE_S)
        except OSError as error:
            raise DeviceError(str(error)) from error
    if place.kind == "nccl":
        nccl = NcclGroup(store, rank, size, torch.device(place.device), deadline_s=_DEADLINE_S)
        return CompressedGroup(nccl, place.sums, place.hidden_size)
    plain = GlooGroup(store, rank, size, place.address, deadline_s=_DEADLINE_S)
    gloo = CompressedGroup(plain, place.sums, place.hidden_size)
    return gloo if place.device == "cpu" else _OnHost(gloo)


class _OnHost:
    """A GPU among ranks that are not: what it exchanges goes through host memory, in fp32."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank, self.size, self.native = group.rank, group.size, None
        self.abort, self.reset, self.close = group.abort, group.reset, group.close

    def all_reduce(self, tensor: Tensor) -> None:
        here = tensor.float().cpu()
        self._group.all_reduce(here)
        tensor.copy_(here)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._group.all_gather(tensor.cpu()).to(tensor.device)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        arrived = self._group.all_to_all([part.cpu() for part in parts])
        return [part.to(parts[0].device) for part in arrived]
