"""A group whose ranks are threads of this process, over one condition variable.

Each call, a rank lays a copy of its tensor out and waits until all have. There are two rounds of
places: a rank is at most one call ahead, because it needs everybody's tensor of the last one.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from shoal.comm import NativeReduce
from shoal.comm.parts import checked_parts
from shoal.comm.stretch import Stretch
from shoal.comm.sums import sum_in_rank_order
from shoal.core.errors import CommError


def in_process_groups(size: int, deadline_s: float = 30) -> list[InProcessGroup]:
    """A group of `size` ranks, one end for each."""
    meeting = _Meeting(size)
    return [InProcessGroup(meeting, rank, deadline_s) for rank in range(size)]


_Part = tuple[tuple[Tensor, ...], Hashable]


class _Meeting:
    """What the ranks share, under one condition.

    Attributes:
        arrived: the last (incarnation, round) of each rank.
        parts: what each rank laid out, and what must be alike in it, in even and in odd rounds.
        valid_from: incarnations before it have failed.
    """

    def __init__(self, size: int) -> None:
        self.changed = threading.Condition()
        self.arrived = [(0, 0)] * size
        self.parts: tuple[list[_Part], list[_Part]] = ([((), None)] * size, [((), None)] * size)
        self.valid_from = 0

    def fail_before(self, incarnation: int) -> None:
        with self.changed:
            self.valid_from = max(self.valid_from, incarnation)
            self.changed.notify_all()


class InProcessGroup:
    """One rank's end."""

    def __init__(self, meeting: _Meeting, rank: int, deadline_s: float) -> None:
        self._meeting = meeting
        self._rank = rank
        self._deadline_s = deadline_s
        self._incarnation = 0
        self._round = 0
        self._stretch = Stretch()

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._meeting.arrived)

    @property
    def native(self) -> NativeReduce | None:
        return None

    def set_speed(self, speed: float) -> None:
        """Stretch what this rank's thread computes between collectives; for the lab."""
        self._stretch.set_speed(speed)

    def pay(self) -> None:
        """Sleep off what was computed since the last collective, rather than in the next."""
        self._stretch.pay()
        self._stretch.begin()

    def all_reduce(self, tensor: Tensor) -> None:
        if self.size > 1:
            sum_in_rank_order(self._exchange_one(tensor), tensor)
            self._stretch.begin()

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = torch.stack(self._exchange_one(tensor))
        self._stretch.begin()
        return gathered

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        rest, dtype = checked_parts(parts, self.size)
        arrived = self._exchange(parts, ("parts", rest, dtype))
        self._stretch.begin()
        return [theirs[self._rank] for theirs in arrived]

    def abort(self) -> None:
        self._meeting.fail_before(self._incarnation + 1)

    def reset(self, incarnation: int) -> None:
        self._incarnation = incarnation
        self._round = 0
        self._meeting.fail_before(incarnation)

    def close(self) -> None:
        """Nothing is held. The others may still be reading this rank's last tensor: no abort."""

    def _exchange_one(self, tensor: Tensor) -> list[Tensor]:
        return [one for (one,) in self._exchange([tensor], (tuple(tensor.shape), tensor.dtype))]

    def _exchange(self, parts: Sequence[Tensor], kind: Hashable) -> list[tuple[Tensor, ...]]:
        self._stretch.pay()
        meeting, part = self._meeting, (tuple(each.detach().clone() for each in parts), kind)
        with meeting.changed:
            self._round += 1
            places, now = meeting.parts[self._round % 2], (self._incarnation, self._round)
            places[self._rank] = part
            meeting.arrived[self._rank] = now
            meeting.changed.notify_all()
            came = meeting.changed.wait_for(
                lambda: self._has_failed() or min(meeting.arrived) >= now, self._deadline_s
            )
            late = [rank for rank, last in enumerate(meeting.arrived) if last < now]
            if came and not self._has_failed():
                return self._alike(list(places))
        self.abort()
        if came:
            raise CommError(f"the collectives of incarnation {now[0]} were aborted")
        raise CommError(f"ranks {late} did not come to a collective within {self._deadline_s} s")

    def _has_failed(self) -> bool:
        return self._meeting.valid_from > self._incarnation

    def _alike(self, parts: list[_Part]) -> list[tuple[Tensor, ...]]:
        kinds = [kind for _, kind in parts]
        if len(set(kinds)) > 1:
            self._meeting.fail_before(self._incarnation + 1)
            raise CommError(f"the ranks came with {kinds}; a collective takes one shape and dtype")
        return [tensors for tensors, _ in parts]
