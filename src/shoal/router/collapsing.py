"""Requests that would give the same tokens share one computation, as long as it runs.

    a ─────────► entry ─► replica            a asks; its entry is computed
         b ──┘ (what a got so far, at once)  b asks the same while that runs
    a leaves                                 the entry goes on: b wants it
    tokens, end                              each gets its own

Only where chance is settled beforehand (greedy, or with a seed) and of one tenant (one salt): the
time an answer takes says nothing of others. Each has its own time limit, which the router keeps;
replicas are told of none. Knows nothing of where an entry runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from shoal.core.request import GenerateRequest, Output
from shoal.router import refusals
from shoal.router.events import Deliver, Effect
from shoal.router.records import Entry


@dataclass(frozen=True, slots=True)
class _Member:
    request: GenerateRequest
    deadline: float | None


@dataclass(slots=True)
class _Group:
    """
    Attributes:
        num_cached: tokens of the prompt, as its first output said.
    """

    key: Hashable
    entry: Entry
    members: dict[str, _Member] = field(default_factory=dict)
    num_cached: int | None = None


class Collapsing:
    """Of one router.

    Attributes:
        num_collapsed: requests that joined others.
    """

    def __init__(self, *, is_on: bool) -> None:
        self._is_on = is_on
        self._groups: dict[Hashable, _Group] = {}
        self._by_entry: dict[str, _Group] = {}
        self._by_member: dict[str, _Group] = {}
        self._own: list[Effect] = []
        self.num_collapsed = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_member

    @property
    def num_beside(self) -> int:
        """Requests that have no entry of their own."""
        return len(self._by_member) - len(self._by_entry)

    def can_share(self, request: GenerateRequest) -> bool:
        sampling = request.sampling
        return (
            self._is_on
            and type(request) is GenerateRequest
            and (sampling.temperature == 0 or sampling.seed is not None)
            and sampling.logprobs is None
            and sampling.prompt_logprobs is None
        )

    def join(self, request: GenerateRequest, now: float) -> bool:
        """Whether it is computed already; then it gets what there is of it."""
        group = self._groups.get(_key(request)) if self.can_share(request) else None
        if group is None:
            return False
        self.num_collapsed += 1
        self._add(group, request, now)
        said = tuple(group.entry.output_ids[len(request.output_ids) :])
        if said:
            request_id, num_cached = request.request_id, group.num_cached
            output = Output(request_id=request_id, token_ids=said, num_cached_tokens=num_cached)
            self._own.append(Deliver([output]))
        return True

    def open(self, entry: Entry, request: GenerateRequest, now: float) -> None:
        """An entry that others may join begins.

        Args:
            request: as it came.
        """
        group = _Group(_key(request), entry)
        self._groups[group.key] = self._by_entry[request.request_id] = group
        self._add(group, request, now)

    def left(self, request_id: str) -> str | None:
        """Nobody wants this request any more; the entry that nobody wants then."""
        group = self._by_member.get(request_id)
        if group is None:
            return request_id
        if len(group.members) == 1:
            return group.entry.request.request_id
        self._drop(group, request_id)
        self._own.append(Deliver([Output(request_id=request_id, finish="cancelled")]))
        return None

    def overdue(self, now: float) -> list[tuple[str, GenerateRequest]]:
        """Entries whose last request is out of time, and that one; others just end."""
        last = []
        for group in self._by_entry.values():
            late = [
                each.request
                for each in group.members.values()
                if each.deadline is not None and now >= each.deadline
            ]
            if len(late) == len(group.members):
                last.append((group.entry.request.request_id, late.pop()))
            for request in late:
                self._drop(group, request.request_id)
                error = refusals.out_of_time(request)
                self._own.append(refusals.failed(request.request_id, error))
        return last

    def spread(self, effects: list[Effect]) -> list[Effect]:
        """News of entries as news of all who wait for them; and what is for single ones."""
        if self._by_entry:
            effects = [
                dataclasses.replace(each, outputs=self._copies(each.outputs))
                if isinstance(each, Deliver)
                else each
                for each in effects
            ]
        if self._own:
            effects, self._own = [*effects, *self._own], []
        return effects

    def check_integrity(self) -> None:
        """For tests."""
        for group in self._by_entry.values():
            assert group.members, "an entry that nobody wants"
            assert self._groups[group.key] is group
            assert all(self._by_member[each] is group for each in group.members)
        assert len(self._groups) == len(self._by_entry)
        assert len(self._by_member) == sum(len(g.members) for g in self._by_entry.values())

    def _copies(self, outputs: Sequence[Output]) -> list[Output]:
        copies = []
        for output in outputs:
            group = self._by_entry.get(output.request_id)
            if group is None:
                copies.append(output)
                continue
            if output.num_cached_tokens is not None:
                group.num_cached = output.num_cached_tokens
            copies += [
                output
                if member == output.request_id
                else dataclasses.replace(output, request_id=member)
                for member in group.members
            ]
            if output.finish is not None:
                self._end(group)
        return copies

    def _add(self, group: _Group, request: GenerateRequest, now: float) -> None:
        deadline = None if request.timeout_s is None else now + request.timeout_s
        group.members[request.request_id] = _Member(request, deadline)
        self._by_member[request.request_id] = group

    def _drop(self, group: _Group, request_id: str) -> None:
        del group.members[request_id], self._by_member[request_id]

    def _end(self, group: _Group) -> None:
        del self._groups[group.key], self._by_entry[group.entry.request.request_id]
        for request_id in list(group.members):
            self._drop(group, request_id)


def _key(request: GenerateRequest) -> Hashable:
    """What its tokens follow from, and how soon they are wanted."""
    sampling = request.sampling
    if sampling.temperature == 0 and sampling.seed is not None:
        sampling = dataclasses.replace(sampling, seed=None)
    return request.salt, request.priority, request.prompt_ids, request.output_ids, sampling
