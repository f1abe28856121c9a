"""After workers failed: what of the KV is still there, and who goes on from where.

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

from shoal.core.step import BLOCK_SIZE, StepRow
from shoal.engine.batch import Batch
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence

Blocks = defaultdict[int, set[int]]
"""Of each instance."""


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
