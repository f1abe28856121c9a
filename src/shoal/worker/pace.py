"""How fast a worker computes and codes, measured once when it starts.

For whoever decides in which form hidden states cross its links. Knows nothing of links.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from shoal.comm import Group
from shoal.comm.codec import decode, encode
from shoal.core.request import SamplingParams
from shoal.core.step import BLOCK_SIZE, SequenceStart, Step, StepRow
from shoal.wire.worker_messages import PaceFacts
from shoal.worker.runner import Worker

_ROUNDS = 3
_STEP_TOKENS = BLOCK_SIZE
_CODED_TOKENS = 64
_GATHERED_BYTES = (64, 128 << 10)


def measure_pace(
    worker: Worker, hidden_size: int, group: Group | None, *, route: int, num_hops: int, hop: int
) -> PaceFacts:
    """Every rank of an instance calls it at once: they run Steps together.

    Args:
        group: whose collectives are to be measured too; None: they cross no network.
        route, num_hops, hop: one that the worker is on.
    """
    step = _step(route, num_hops)
    hidden_TE = worker.zeros(step.num_tokens) if hop else None
    itemsize = 0

    def run_step() -> None:
        nonlocal itemsize
        launched = worker.launch(step, hop, hidden_TE)
        if launched.hidden_TE is None:
            launched.wait()
        else:
            launched.hidden_TE[:1].cpu()
            itemsize = launched.hidden_TE.element_size()

    step_s = _least(run_step)
    worker.reset()
    sizes = _GATHERED_BYTES if group is not None else ()
    return PaceFacts(
        step_s=step_s,
        step_tokens=_STEP_TOKENS,
        coding_s=_coding_s(hidden_size),
        itemsize=itemsize or torch.float32.itemsize,
        gather_s=tuple(_gather_s(group, size) for size in sizes if group is not None),
        gather_bytes=sizes,
    )


def _step(route: int, num_hops: int) -> Step:
    """A prompt that fills a block, and samples nothing."""
    token_ids = (0,) * _STEP_TOKENS
    start = SequenceStart(
        token_ids=token_ids,
        prompt_len=_STEP_TOKENS,
        sampling=SamplingParams(temperature=0.0),
        eos_token_ids=(),
    )
    row = StepRow(
        sequence_id=0,
        start=0,
        token_ids=token_ids,
        block_ids=((0,),) * num_hops,
        samples=False,
        start_state=start,
    )
    return Step(step_id=0, route=route, rows=(row,))


def _coding_s(hidden_size: int) -> float:
    numbers_TE = torch.randn(_CODED_TOKENS, hidden_size)

    def code() -> None:
        data = encode(numbers_TE, "int8")
        decode(data, "int8", _CODED_TOKENS, hidden_size, numbers_TE.dtype)

    return _least(code) / numbers_TE.numel()


def _gather_s(group: Group, num_bytes: int) -> float:
    part = torch.zeros(num_bytes, dtype=torch.uint8)
    return _least(lambda: group.all_gather(part))


def _least(run: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs: what disturbs them only adds."""
    taken = []
    for _ in range(_ROUNDS):
        began_s = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began_s)
    return min(taken)
