"""After workers failed: whose fault it may be, what of the KV is left, and who goes on from where.

    a Step that is named   its sequences are suspects: each runs alone until it samples
    a worker that ends     nobody is, the first time; those under whom one ends again, before they
                           got a token, are, and who then is alone with it has failed
    lost instance          its pool finds nothing any more
    Step not come back     the blocks it wrote can't be trusted, whoever found them already
    sequence
      lost no KV           goes on where its last Step came back
      lost some, or its    waits for a place; what is left of its KV is found by name, and
      route is down        `policy/cost.py` decides what is computed again, and on which route

Knows nothing of why they failed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from shoal.core.step import BLOCK_SIZE, StepFailure, StepRow
from shoal.engine.batch import Batch
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence

Blocks = defaultdict[int, set[int]]
"""Of each instance."""

_TOGETHER_S = 2.0
"""Workers that are lost within it are lost by one thing: a machine's, say."""
_LOSSES_BY_CHANCE = 1


def blame(
    scheduler: Scheduler, abandoned: Iterable[Batch], failure: StepFailure, now: float
) -> None:
    """Count it against the sequences whose doing it may have been."""
    if failure.step_id is not None:
        for batch in abandoned:
            for sequence, _row in batch.rows:
                sequence.num_failures += batch.step_id == failure.step_id
        return
    lost = set(failure.lost or ())
    under = {
        sequence
        for batch in abandoned
        if not lost.isdisjoint(scheduler.places.instances(batch.route)[: batch.num_hops])
        for sequence, _row in batch.rows
    }
    for sequence in under:
        if now - sequence.lost_at >= _TOGETHER_S:
            sequence.num_losses, sequence.lost_at = sequence.num_losses + 1, now
            is_known = sequence.num_failures > 0 and len(under) > 1
            if sequence.num_losses > _LOSSES_BY_CHANCE and not is_known:
                sequence.num_failures += 1


def recover(scheduler: Scheduler, abandoned: Iterable[Batch], lost: Collection[int]) -> None:
    """Go on without the Steps in flight and without the KV of the lost instances."""
    untrusted = _forget(scheduler, abandoned, lost)
    for batch in abandoned:
        for sequence, _row in batch.rows:
            sequence.num_pending = 0
            scheduler.note_gone(sequence)
    for sequence in list(scheduler.running):
        sequence.note_abandoned()
        if _lost_some(scheduler, sequence, untrusted, lost):
            scheduler.preempt(sequence)
    scheduler.leave_unusable()
    scheduler.forget_workers()


def _forget(scheduler: Scheduler, abandoned: Iterable[Batch], lost: Collection[int]) -> Blocks:
    """Make what is not there unfindable; the blocks that abandoned Steps were to write."""
    untrusted: Blocks = defaultdict(set)
    for batch in abandoned:
        instances = scheduler.places.instances(batch.route)
        for sequence, row in batch.rows:
            for hop in range(batch.num_hops):
                untrusted[instances[hop]].update(_written(sequence, row, hop))
    for instance, pool in enumerate(scheduler.pools.of_instance):
        if instance in lost:
            pool.forget_all()
        else:
            pool.forget(untrusted[instance])
    return untrusted


def _written(sequence: Sequence, row: StepRow, hop: int) -> tuple[int, ...]:
    """Blocks in which a row makes KV that was not there; what it writes again does no harm."""
    first = max(row.start // BLOCK_SIZE, sequence.hops[hop].num_found)
    return row.block_ids[hop][first:]


def _lost_some(
    scheduler: Scheduler, sequence: Sequence, untrusted: Blocks, lost: Collection[int]
) -> bool:
    instances = scheduler.places.instances(sequence.route)
    return any(
        instance in lost or not untrusted[instance].isdisjoint(hop.block_ids[: hop.num_found])
        for instance, hop in zip(instances, sequence.hops, strict=True)
    )
