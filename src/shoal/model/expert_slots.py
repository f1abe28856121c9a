"""Which experts of a layer are in memory, where it has room for some of them.

    experts on disk    0 1 2 3 4 5 6 7 8 ...          the step wants 1 4 7 8
    slots              [ 4 ][ 2 ][ 8 ][ 5 ]           2 and 5 make room for 1 and 7

A step that wants more of them than there are slots runs them in rounds, in the order of their
numbers; while one round runs, experts of the next ones are read. What is used often stays, and an
old use counts less than a new one (LRFU: Lee et al. 2001). Knows nothing of files or of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

_HALF_LIFE = 64  # steps after which a use counts half
_LARGEST_WEIGHT = 1e60


@dataclass(frozen=True, slots=True)
class Round:
    """What runs next, and what is to be read.

    Attributes:
        until: experts below it run in this round, those from there on later.
        experts: that run.
        reads: (expert, slot), in the order they are wanted; of this round and of later ones.
    """

    until: int
    experts: Sequence[int]
    reads: Sequence[tuple[int, int]]


class ExpertSlots:
    """The slots of one layer.

    Args:
        num_slots: at least 1.

    Attributes:
        slot_of: of each expert; -1: it has none. It has one from the moment it is to be read.
        num_uses, num_reads: experts that steps wanted, and those that were read for it.
    """

    def __init__(self, num_experts: int, num_slots: int) -> None:
        assert 0 < num_slots <= num_experts, "no more room than there are experts, and some"
        self.slot_of = [-1] * num_experts
        self.num_uses = self.num_reads = 0
        self._expert_in: list[int | None] = [None] * num_slots
        self._scores = [0.0] * num_experts
        self._weight = 1.0  # of a use in this step
        self._wanted: Sequence[int] = ()

    def begin(self, wanted: Sequence[int]) -> None:
        """A step wants these experts, in the order of their numbers."""
        self._wanted = wanted
        self.num_uses += len(wanted)
        for expert in wanted:
            self._scores[expert] += self._weight
        self._weight *= 2 ** (1 / _HALF_LIFE)
        if self._weight > _LARGEST_WEIGHT:
            self._scores = [score / self._weight for score in self._scores]
            self._weight = 1.0

    def next_round(self, first: int) -> Round:
        """The round that begins with the first wanted expert from `first` on."""
        ahead = [expert for expert in self._wanted if expert >= first]
        if not ahead:
            return Round(len(self.slot_of), (), ())
        num_slots = len(self._expert_in)
        # Where not all fit, half of the slots are left to what is read meanwhile.
        size = len(ahead) if len(ahead) <= num_slots else max(1, num_slots // 2)
        now, wanted = frozenset(ahead[:size]), frozenset(ahead)
        reads = []
        for expert in ahead:
            if self.slot_of[expert] >= 0:
                continue
            slot = self._room(now, wanted, is_now=expert in now)
            if slot is None:
                break
            self._put(expert, slot)
            reads.append((expert, slot))
        until = len(self.slot_of) if size == len(ahead) else ahead[size - 1] + 1
        return Round(until, ahead[:size], reads)

    def forget(self, expert: int) -> None:
        """It could not be read."""
        slot = self.slot_of[expert]
        if slot >= 0:
            self._expert_in[slot], self.slot_of[expert] = None, -1

    def _room(self, now: Set[int], wanted: Set[int], *, is_now: bool) -> int | None:
        """A free slot, or one whose expert this step wants no more, or wants last.

        Args:
            now: experts of this round, which stay.
            wanted: by the rest of the step; they make room for those of this round alone.
        """
        unwanted: tuple[float, int, int] | None = None
        last: tuple[int, int] | None = None
        for slot, expert in enumerate(self._expert_in):
            if expert is None:
                return slot
            if expert not in wanted:
                # Of equals the last: a step that wants all goes through them in this order.
                value = self._scores[expert], -expert, slot
                unwanted = value if unwanted is None else min(unwanted, value)
            elif is_now and expert not in now:
                last = (expert, slot) if last is None else max(last, (expert, slot))
        if unwanted is not None:
            return unwanted[2]
        return None if last is None else last[1]

    def _put(self, expert: int, slot: int) -> None:
        before = self._expert_in[slot]
        if before is not None:
            self.slot_of[before] = -1
        self._expert_in[slot], self.slot_of[expert] = expert, slot
        self.num_reads += 1
