"""Runs of decode Steps, taken at once: for a driver that knows when each Step will come back.

    stepwise   result, Tick, result, Tick, ...      rows of every Step are made, and taken back
    a run      result, ..., result (all in flight), the Steps between are never made: their
               StepsDecoded(n), Tick                tokens go straight to sequences and blocks

While nobody can be admitted, preempted or finished, each Step is its predecessor one token further,
and both leave the same behind, but for the numbers of blocks; `tests/property/test_simulator.py`
holds them together. Only of engines with one instance. Knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.core.step import BLOCK_SIZE
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
        num_steps: results that may come back like this, each followed by a Tick.
    """

    request_ids: tuple[str, ...]
    lengths: tuple[int, ...]
    num_steps: int


def find_run(config: EngineConfig, scheduler: Scheduler, flight: Flight) -> DecodeRun | None:
    """The run that an engine is in, if it is in one."""
    running, depth = scheduler.running, config.steps_per_route
    if config.num_stages > 1 or len(config.routes) > 1 or len(flight) != depth or not running:
        return None
    if scheduler.leaving or not all(_only_decodes(each, depth) for each in running):
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


def advance(scheduler: Scheduler, num_steps: int, token_ids: Sequence[int]) -> None:
    """Move every running sequence on by as many tokens; no Step is in flight.

    Args:
        token_ids: of each sequence, which it sampled in all of these Steps.
    """
    for sequence, token_id in zip(scheduler.running, token_ids, strict=True):
        assert sequence.in_flight == 0 and len(sequence.token_ids) + num_steps < sequence.max_len
        sequence.token_ids += [token_id] * num_steps
        sequence.num_scheduled += num_steps
        sequence.num_returned = sequence.num_scheduled
        has_blocks = scheduler.grow(sequence, [])
        assert has_blocks, "a run ends before blocks do"
        scheduler.publish(sequence)


def _only_decodes(sequence: TokenSequence, depth: int) -> bool:
    """Whether it has a row that samples in every Step in flight, and no token may end it early."""
    params = sequence.request.sampling
    return (
        sequence.in_flight == sequence.num_pending == depth
        and sequence.matcher is None
        and not sequence.is_paused
        and not sequence.num_failures
        and not params.stop_token_ids
        and (params.ignore_eos or not sequence.eos_token_ids)
    )


def _must_wait(scheduler: Scheduler, first: TokenSequence) -> bool:
    """Whether the next one in the queue finds no room; while others only grow, it never will."""
    may_displace = scheduler.running[-1].request.priority > first.request.priority
    return not may_displace and scheduler.find_place(first) is None


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
