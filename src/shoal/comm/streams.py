"""The ranks of an instance where some have experts only: two groups that look like one.

    all ranks                     all_to_all: tokens to experts, and what these give back
    ranks with hidden states      all_reduce, all_gather

Knows nothing of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from shoal.comm import Group, NativeReduce
from shoal.core.errors import CommError


@runtime_checkable
class _Slow(Protocol):
    """A group that stretches what its rank computes, for the lab."""

    def pay(self) -> None: ...


@runtime_checkable
class _Timed(Protocol):
    """A group that knows how long its collectives took."""

    @property
    def waited_s(self) -> float: ...


@runtime_checkable
class _Queueing(Protocol):
    """A group whose collectives are only queued when they return."""

    def finish(self) -> None: ...


class StreamGroup:
    """One rank's end.

    Args:
        everyone: all ranks of the instance.
        streams: those with hidden states; None: this one has none.
    """

    def __init__(self, everyone: Group, streams: Group | None) -> None:
        self._everyone, self._streams = everyone, streams

    @property
    def rank(self) -> int:
        """Among those with hidden states."""
        return 0 if self._streams is None else self._streams.rank

    @property
    def size(self) -> int:
        """Of those with hidden states."""
        return 1 if self._streams is None else self._streams.size

    @property
    def native(self) -> NativeReduce | None:
        return None if self._streams is None else self._streams.native

    @property
    def measuring(self) -> Group:
        """The one of the two that stretches what is computed: the one that kernels call too."""
        return self._everyone if self._streams is None else self._streams

    def finish(self) -> None:
        """Wait for what is queued; raises `CommError` as a collective does."""
        for group in self._both():
            queueing: object = group
            if isinstance(queueing, _Queueing):
                queueing.finish()

    def all_reduce(self, tensor: Tensor) -> None:
        self._sharing().all_reduce(tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._sharing().all_gather(tensor)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Among all ranks."""
        computing: object = self._streams
        if isinstance(computing, _Slow):
            computing.pay()
        return self._everyone.all_to_all(parts)

    def abort(self) -> None:
        for group in self._both():
            group.abort()

    def reset(self, incarnation: int) -> None:
        for group in self._both():
            group.reset(incarnation)

    def close(self) -> None:
        for group in self._both():
            group.close()

    def _both(self) -> list[Group]:
        return [self._everyone] if self._streams is None else [self._everyone, self._streams]

    def _sharing(self) -> Group:
        if self._streams is None:
            raise CommError("this rank has experts only: it has no hidden states to exchange")
        return self._streams


class TimedStreamGroup(StreamGroup):
    """Of groups that know how long their collectives took."""

    def __init__(self, everyone: Group, streams: Group | None) -> None:
        super().__init__(everyone, streams)
        self._timed: list[_Timed] = []
        for group in self._both():
            timed: object = group
            assert isinstance(timed, _Timed), "groups of another kind"
            self._timed.append(timed)

    @property
    def waited_s(self) -> float:
        """Spent in collectives since it began, most of it waiting for other ranks."""
        return sum(group.waited_s for group in self._timed)
