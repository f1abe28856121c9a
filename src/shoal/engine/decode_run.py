"""Runs of decode Steps, taken at once: for a driver that knows when each Step will come back.

    stepwise   result, Tick, result, Tick, ...   rows of every Step are made, and taken back
    a run      StepsDecoded(n results)           only the Steps in flight after it are made; tokens
                                                 go straight to sequences and blocks

While nobody can be admitted, preempted or finished, each Step is its predecessor one token further,
and both leave the same behind, but for the numbers of blocks; `tests/property/test_simulator.py`
holds them together. Only of engines with one instance. Knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.core.step import BLOCK_SIZE, Step, StepRow, TokenRef
from shoal.engine.blocks import blocks_for
from shoal.engine.config import EngineConfig
from shoal.engine.flight import Flight
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence as TokenSequence


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """What comes next if nothing but results does.

    Attributes:
        request_ids: of a Step's rows, in order.
        lengths: positions that each row of the next Step attends to; one more in every Step after.
        num_steps: results that may come back like this, each followed by a Tick; no run takes
            fewer than one more than are in flight.
    """

    request_ids: tuple[str, ...]
    lengths: tuple[int, ...]
    num_steps: int


def find_run(config: EngineConfig, scheduler: Scheduler, flight: Flight) -> DecodeRun | None:
    """The run that an engine is in, if it is in one."""
    running, depth = scheduler.running, flight.depth
    if len(flight) != depth or not running:
        return None
    if len(config.routes) > 1 or len(config.routes[0]) > 1:
        return None
    # Those that came last are the likeliest not to.
    if scheduler.leaving or not all(_only_decodes(each, depth) for each in reversed(running)):
        return None
    if scheduler.waiting and not _must_wait(scheduler, scheduler.waiting[0]):
        return None
    num_steps = min(each.max_len - each.total_len for each in running)
    num_steps = min(num_steps, _steps_until_full(running, scheduler.pools.of_instance[0].num_free))
    if num_steps <= depth:
        return None
    return DecodeRun(
        tuple(each.request.request_id for each in running),
        tuple(each.total_len for each in running),
        num_steps,
    )


def take_run(
    scheduler: Scheduler, flight: Flight, num_steps: int, token_ids: Sequence[int]
) -> list[Step]:
    """Move every running sequence on by as many tokens; the Steps in flight then, oldest first.

    Args:
        token_ids: of each sequence, which it sampled in all of these Steps.
    """
    assert num_steps > len(flight), f"{num_steps} results of {len(flight)} Steps in flight"
    for sequence, token_id in zip(scheduler.running, token_ids, strict=True):
        _move_on(scheduler, sequence, num_steps, token_id)
    batches = flight.skip(num_steps)
    for index, batch in enumerate(batches):
        ahead = len(batches) - index
        batch.rows = [
            (sequence, _row(sequence, TokenRef(batch.step_id - 1, row), ahead))
            for row, sequence in enumerate(scheduler.running)
        ]
    for row, sequence in enumerate(scheduler.running):
        sequence.last_ref = TokenRef(batches[-1].step_id, row)
    return [flight.step(batch, scheduler.take_released()) for batch in batches]


def _move_on(scheduler: Scheduler, sequence: TokenSequence, num_steps: int, token_id: int) -> None:
    assert len(sequence.token_ids) + num_steps < sequence.max_len
    sequence.token_ids += [token_id] * num_steps
    sequence.num_scheduled = sequence.total_len - 1
    sequence.num_returned = len(sequence.token_ids) - 1
    blocks = sequence.hops[0].block_ids
    if (missing := blocks_for(sequence.num_scheduled) - len(blocks)) > 0:
        blocks += scheduler.pools.of_instance[0].allocate(missing)
    scheduler.publish(sequence)


def _row(sequence: TokenSequence, before: TokenRef, ahead: int) -> StepRow:
    """Of the Step with `ahead` - 1 more behind it in flight."""
    start = sequence.num_scheduled - ahead
    return StepRow(
        sequence_id=sequence.sequence_id,
        start=start,
        token_ids=(),
        token_ref=before,
        block_ids=(tuple(sequence.hops[0].block_ids[: blocks_for(start + 1)]),),
        samples=True,
    )


def _only_decodes(sequence: TokenSequence, depth: int) -> bool:
    """Whether it has a row that samples in every Step in flight, and no token may end it early.

    Its first token is out: whoever waits for that hears of it when it comes.
    """
    params = sequence.request.sampling
    return (
        sequence.in_flight == sequence.num_pending == depth
        and sequence.num_output > len(sequence.request.output_ids)
        and sequence.matcher is None
        and not sequence.is_paused
        and not sequence.num_failures
        and not params.stop_token_ids
        and params.logprobs is None
        and (params.ignore_eos or not sequence.eos_token_ids)
    )


def _must_wait(scheduler: Scheduler, first: TokenSequence) -> bool:
    """Whether the next one in the queue finds no room; while others only grow, it never will."""
    may_displace = scheduler.running[-1].request.priority > first.request.priority
    return not may_displace and not scheduler.has_place(first)


def _steps_until_full(running: Sequence[TokenSequence], num_free: int) -> int:
    """Steps that can be handed out before one lacks a block.

    Every sequence needs one more block in the Step whose row is the first beyond its own, and in
    every 16th after.
    """
    first = sorted(
        len(each.hops[0].block_ids) * BLOCK_SIZE + 1 - each.total_len for each in running
    )
    rounds, rest = divmod(num_free, len(first))
    return first[rest] + rounds * BLOCK_SIZE
