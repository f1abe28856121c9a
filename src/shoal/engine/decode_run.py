"""Runs of decode Steps, taken at once: for a driver that knows when each Step will come back.

    stepwise   result, Tick, result, Tick, ...   rows of every Step are made, and taken back
    a run      StepsDecoded(n results)           only the Steps in flight after it are made; tokens
                                                 go straight to sequences and blocks

While nobody can be admitted, preempted or finished, each Step is its predecessor one token further,
and both leave the same behind, but for the numbers of blocks; `tests/property/test_simulator.py`
holds them together. A prompt may be computed beside, up to its last chunk
(`engine/prompt_ahead.py`). Only of engines with one instance. Knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from shoal.core.step import BLOCK_SIZE, Step, StepRow, TokenRef
from shoal.engine.batch import Batch
from shoal.engine.blocks import blocks_for
from shoal.engine.config import EngineConfig
from shoal.engine.events import StepsDecoded
from shoal.engine.flight import Flight
from shoal.engine.prompt_ahead import PromptAhead
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence as TokenSequence
from shoal.engine.tally import Tally


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """What comes next if nothing but results does.

    Attributes:
        request_ids: of a Step's rows that decode, in order.
        lengths: positions that each of them attends to in the next Step; one more in every Step
            after.
        num_steps: results that may come back like this, each followed by a Tick; no run takes
            fewer than one more than are in flight.
        prompt: that the next Steps hold chunks of; the run is over when it says so.
    """

    request_ids: tuple[str, ...]
    lengths: tuple[int, ...]
    num_steps: int
    prompt: PromptAhead | None = None

    def num_new_blocks(self, num_steps: int) -> int:
        """Blocks that so many of its results take."""
        # All but the last position of a row that is in flight have one; a prompt has all of its.
        return sum(blocks_for(each - 1 + num_steps) - blocks_for(each - 1) for each in self.lengths)


def find_run(config: EngineConfig, scheduler: Scheduler, flight: Flight) -> DecodeRun | None:
    """The run that an engine is in, if it is in one."""
    running, depth = scheduler.running, flight.depth
    if len(flight) != depth or not running or scheduler.leaving:
        return None
    if len(config.routes) > 1 or len(config.routes[0]) > 1:
        return None
    # Those that came last are the likeliest to do neither.
    if not all(_only_decodes(each, depth) or _is_prompt(each) for each in reversed(running)):
        return None
    decoding = decoding_of(scheduler)
    num_prompts = len(running) - len(decoding)
    if not decoding or (scheduler.waiting and (num_prompts or not _must_wait(scheduler))):
        return None
    num_steps = min(each.max_len - each.total_len for each in decoding)
    num_steps = min(num_steps, _steps_until_full(decoding, scheduler.pools.of_instance[0].num_free))
    if num_steps <= depth:
        return None
    prompt = None
    if num_prompts:
        prompt = scheduler.chunks.ahead(_prompt_of(scheduler), flight.batches, running, num_prompts)
        if prompt is None:
            return None
    return DecodeRun(
        tuple([each.request.request_id for each in decoding]),
        tuple([each.total_len for each in decoding]),
        num_steps,
        prompt,
    )


def decoding_of(scheduler: Scheduler) -> list[TokenSequence]:
    """Those of a run that decode, in order."""
    return [each for each in scheduler.running if each.num_pending]


def note_run(scheduler: Scheduler, flight: Flight, tally: Tally, run: StepsDecoded) -> None:
    """What its Steps took, and held of prompts; before it is taken."""
    batches, num_running = flight.batches, len(scheduler.running)
    prompts = [each.prompts for each in batches]
    if run.chunks:
        scheduler.chunks.computed(batches, run.chunks, num_running, run.compute_s)
        starts = accumulate(run.chunks, initial=_prompt_of(scheduler).num_scheduled)
        handed_out = [(n, n * (at + n / 2)) for at, n in zip(starts, run.chunks, strict=False)]
        prompts += handed_out[: len(run.chunks) - len(batches)]
    else:
        scheduler.chunks.decoded(batches, num_running, run.compute_s)
    tally.note(prompts, run.compute_s)


def take_run(scheduler: Scheduler, flight: Flight, run: StepsDecoded) -> list[Step]:
    """Move every running sequence on by as many tokens, and a prompt by its chunks; the Steps in
    flight then, oldest first."""
    num_steps, decoding = len(run.compute_s), decoding_of(scheduler)
    assert num_steps > len(flight), f"{num_steps} results of {len(flight)} Steps in flight"
    for batch in flight.batches if run.chunks else ():
        for sequence, row in batch.rows:
            if not row.samples:
                scheduler.note_returned(sequence, row)
    for sequence, token_id in zip(decoding, run.token_ids, strict=True):
        _move_on(scheduler, sequence, num_steps, token_id)
    batches = flight.skip(num_steps)
    for index, batch in enumerate(batches):
        ahead = len(batches) - index
        batch.rows = [
            (sequence, _row(sequence, TokenRef(batch.step_id - 1, number), ahead))
            for number, sequence in enumerate(decoding)
        ]
    if run.chunks:
        _move_prompt_on(scheduler, batches, run.chunks)
    for number, sequence in enumerate(decoding):
        sequence.last_ref = TokenRef(batches[-1].step_id, number)
    return [flight.step(batch, scheduler.take_released()) for batch in batches]


def _move_on(scheduler: Scheduler, sequence: TokenSequence, num_steps: int, token_id: int) -> None:
    assert len(sequence.token_ids) + num_steps < sequence.max_len
    sequence.token_ids += [token_id] * num_steps
    sequence.num_losses = 0
    sequence.num_scheduled = sequence.total_len - 1
    sequence.num_returned = len(sequence.token_ids) - 1
    blocks = sequence.hops[0].block_ids
    if (missing := blocks_for(sequence.num_scheduled) - len(blocks)) > 0:
        blocks += scheduler.pools.of_instance[0].allocate(missing)
    scheduler.publish(sequence)


def _move_prompt_on(scheduler: Scheduler, batches: Sequence[Batch], chunks: Sequence[int]) -> None:
    """By so many tokens in each Step that was handed out; the last of them are in flight."""
    prompt, num_back = _prompt_of(scheduler), len(chunks) - len(batches)
    prompt.num_scheduled += sum(chunks[:num_back])
    prompt.num_returned = max(prompt.num_returned, prompt.num_scheduled)
    for batch, num_tokens in zip(batches, chunks[num_back:], strict=True):
        if num_tokens:
            batch.num_prompt_tokens = num_tokens
            batch.num_prompt_pairs = num_tokens * (prompt.num_scheduled + num_tokens / 2)
            row = prompt.make_row(num_tokens)
            prompt.note_scheduled(row, batch.step_id, len(batch.rows), batch.turn)
            batch.rows.append((prompt, row))
    scheduler.publish(prompt)


def _row(sequence: TokenSequence, before: TokenRef, ahead: int) -> StepRow:
    """Of the Step with `ahead` - 1 more behind it in flight."""
    start = sequence.num_scheduled - ahead
    return StepRow(
        sequence_id=sequence.sequence_id,
        start=start,
        token_ids=(),
        token_ref=before,
        block_ids=(sequence.hops[0].first(blocks_for(start + 1)),),
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


def _is_prompt(sequence: TokenSequence) -> bool:
    """Whether all that it does is to be computed, in more than one chunk, as workers know."""
    return (
        not sequence.num_pending
        and sequence.num_hops_told > 0
        and not sequence.runs
        and sequence.num_in_run > 1
        and sequence.matcher is None
        and not sequence.is_paused
        and not sequence.num_failures
        and not sequence.wants_prompt_logprobs
    )


def _prompt_of(scheduler: Scheduler) -> TokenSequence:
    """Of a run: the first one goes on; others get nothing before it is complete."""
    return next(each for each in scheduler.running if not each.num_pending)


def _must_wait(scheduler: Scheduler) -> bool:
    """Whether the first in the queue finds no room; while others only grow, it never will."""
    first = scheduler.waiting[0]
    may_displace = scheduler.running[-1].request.priority > first.request.priority
    return not may_displace and not scheduler.has_place(first)


def _steps_until_full(decoding: Sequence[TokenSequence], num_free: int) -> int:
    """Steps that can be handed out before one lacks a block.

    Every sequence needs one more block in the Step whose row is the first beyond its own, and in
    every 16th after.
    """
    first = sorted(
        len(each.hops[0].block_ids) * BLOCK_SIZE + 1 - each.total_len for each in decoding
    )
    rounds, rest = divmod(num_free, len(first))
    return first[rest] + rounds * BLOCK_SIZE
