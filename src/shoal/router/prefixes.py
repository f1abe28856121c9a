"""Which replica has computed which blocks, as far as the router can know, and what they are worth.

What a replica was seen to compute or get is remembered by name, as many blocks as it has room for;
it may have dropped them since, so it is asked before anyone relies on it. Knows nothing of how KV
gets from one replica to another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.core.step import BLOCK_SIZE
from shoal.engine.blocks import BlockName, block_name, root_name
from shoal.policy.waiting import FIRST_BANDWIDTH_BYTES_PER_S, Waiting, bandwidth, updated
from shoal.router.records import Attempt, Entry, Move, Replica

_FEWEST_TOKENS = 64
"""Prompts that say something of how fast prompts are computed, transfers of how fast links are."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Blocks that a request would find at another replica than its own.

    Attributes:
        names: of its first blocks.
        patience_s: how long they may be waited for.
    """

    source: str
    names: tuple[BlockName, ...]
    patience_s: float


class Prefixes:
    """Of one router.

    Args:
        is_on: whether KV gets from one replica to another at all.
    """

    def __init__(self, is_on: bool) -> None:
        self._is_on = is_on
        self._known: dict[str, OrderedDict[BlockName, None]] = {}
        self._bandwidths: dict[tuple[str, str], float] = {}

    # --- who has what ---

    def note(self, replica: Replica, entry: Entry) -> None:
        """A replica has the KV of all that is known of a request."""
        if not self._is_on or replica.info is None or not replica.info.kv_block_bytes:
            return
        known = self._known.setdefault(replica.name, OrderedDict())
        # The head of a sequence last: it is shared with others, and the last to be dropped.
        for name in reversed(_names(entry, replica.info.kv_digest)):
            known[name] = None
            known.move_to_end(name)
        while len(known) > replica.info.num_kv_blocks:
            known.popitem(last=False)

    def lacks(self, replica: str, names: Iterable[BlockName]) -> None:
        """It said that it has not got these."""
        known = self._known.get(replica, OrderedDict())
        for name in names:
            known.pop(name, None)

    def forget(self, replica: str) -> None:
        """It is gone, with all it had; where it is next, links may be others."""
        self._known.pop(replica, None)
        for link in [each for each in self._bandwidths if replica in each]:
            del self._bandwidths[link]

    def held(self, replica: Replica, entry: Entry) -> int:
        """Blocks of a request, from the first on, that a replica has."""
        if replica.info is None or not self._known.get(replica.name):
            return 0
        return self._num_held(replica.name, _names(entry, replica.info.kv_digest))

    def worth_getting(
        self, entry: Entry, target: Replica, others: Iterable[Replica]
    ) -> Prefix | None:
        """What a request that is sent to `target` had better wait for."""
        info, token_s = target.info, target.token_s
        if info is None or token_s is None or not info.kv_block_bytes:
            return None
        if entry.request.sampling.prompt_logprobs is not None and not entry.has_begun:
            return None  # its whole prompt is computed anyway
        alike = [
            each
            for each in others
            if each is not target
            and each.info is not None
            and each.info.kv_digest == info.kv_digest
            and self._known.get(each.name)
        ]
        if not alike:
            return None
        # The last token is computed in any case.
        names = _names(entry, info.kv_digest)[: (entry.num_tokens - 1) // BLOCK_SIZE]
        source = max(alike, key=lambda each: self._num_held(each.name, names))
        num = self._num_held(source.name, names)
        waiting = Waiting(
            num_blocks=num - self._num_held(target.name, names),
            block_bytes=info.kv_block_bytes,
            bandwidth_bytes_per_s=self._bandwidths.get(
                (source.name, target.name), FIRST_BANDWIDTH_BYTES_PER_S
            ),
            token_s=token_s,
        )
        if not waiting.pays:
            return None
        return Prefix(source.name, tuple(names[:num]), waiting.computing_s)

    # --- how fast it goes ---

    def note_computed(
        self, replica: Replica, entry: Entry, attempt: Attempt, num_cached: int, now: float
    ) -> None:
        """The first token of a request came: all before it is there."""
        self.note(replica, entry)
        num = entry.num_tokens - num_cached
        if attempt.was_alone and len(replica.outstanding) == 1 and num >= _FEWEST_TOKENS:
            replica.token_s = updated(replica.token_s, (now - attempt.sent_s) / num)

    def note_got(
        self, entry: Entry, move: Move, target: Replica, num_blocks: int, now: float
    ) -> None:
        """A request's first blocks are at `target` now, or those that came in time."""
        if target.info is None:
            return
        ran_out = num_blocks < move.num_offered and now >= move.deadline
        num_new = max(num_blocks - self.held(target, entry), 0)
        if ran_out or num_new * BLOCK_SIZE >= _FEWEST_TOKENS:
            seen = bandwidth(num_new * target.info.kv_block_bytes, now - move.pulled_s)
            link = move.source, move.target
            known = None if ran_out else self._bandwidths.get(link)
            self._bandwidths[link] = max(updated(known, seen), 1.0)

    def _num_held(self, replica: str, names: Sequence[BlockName]) -> int:
        known = self._known.get(replica, OrderedDict())
        return next((i for i, name in enumerate(names) if name not in known), len(names))


def _names(entry: Entry, digest: str) -> list[BlockName]:
    """Of all full blocks of what is known of a request; worked out once."""
    if entry.named_for != digest:
        entry.named_for, entry.names = digest, []
    tokens = [*entry.request.prompt_ids, *entry.output_ids]
    parent = entry.names[-1] if entry.names else root_name(digest, entry.request.salt)
    for start in range(len(entry.names) * BLOCK_SIZE, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
        parent = block_name(parent, tokens[start : start + BLOCK_SIZE])
        entry.names.append(parent)
    return entry.names
