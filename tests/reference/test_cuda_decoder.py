"""A whole decoder and a worker on the set "cuda", held to the reference: eager and in graphs.

Marked gpu; like test_cuda_kernels.py, also run in Triton's interpreter, where a graph is the
same computation on the same buffers, only not recorded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kernel_cases import GEMMA_LIKE, random_decoder
from paging import Paged, run_mixed_steps

from shoal.core.request import SamplingParams
from shoal.core.step import SequenceStart, Step, StepRow, TokenRef
from shoal.kernels import select
from shoal.worker.graphs import DecodeGraphs, graph_sizes
from shoal.worker.kv_pool import allocate
from shoal.worker.peak import step_bytes
from shoal.worker.runner import Worker

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
gpu_only = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")

MAX_LEN = 64
PROMPT = 12


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be recorded, replaying is running again."""
    if INTERPRETED:

        def record(self: DecodeGraphs, size: int) -> Callable[[], None]:
            return partial(self._compute, size)

        monkeypatch.setattr(DecodeGraphs, "_record", record)


def worst(got: list[Paged], want: list[Paged]) -> float:
    """Largest difference of any logit, relative to the largest logit."""
    pairs = [
        (one.logits[position], other.logits[position])
        for one, other in zip(got, want, strict=True)
        for position in one.logits
    ]
    largest = max(float(other.abs().max()) for _, other in pairs)
    return max(float((one - other).abs().max()) for one, other in pairs) / largest


@pytest.mark.parametrize("weight_format", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_mixed_steps_give_the_logits_of_the_reference(
    weight_format: Any, kv_dtype: torch.dtype | None
) -> None:
    if INTERPRETED and (weight_format, kv_dtype) != ("int4", torch.int8):
        pytest.skip("the interpreter is slow")
    got, want = (
        run_mixed_steps(
            random_decoder(GEMMA_LIKE, select(name), DEVICE, weight_format=weight_format), kv_dtype
        )
        for name in ("cuda", "reference")
    )
    # KV codes that fall to their neighbour weigh more than sums in another order.
    assert worst(got, want) < (1e-4 if kv_dtype is None else 2e-2)


def make_worker(kernels: str, num_graph_rows: int | None = None, device: str = DEVICE) -> Worker:
    decoder = random_decoder(GEMMA_LIKE, select(kernels), device)
    kv = allocate(GEMMA_LIKE, decoder.shard, 40, decoder.dtype, decoder.device)
    worker = Worker(decoder, kv)
    if num_graph_rows is not None:
        if INTERPRETED:
            worker._graphs = DecodeGraphs(
                decoder, kv, max_num_seqs=num_graph_rows, max_model_len=MAX_LEN
            )
            worker._graphs.record_all()
        else:
            assert worker.record_graphs(max_num_seqs=num_graph_rows, max_model_len=MAX_LEN) > 0
    return worker


def decode_together(worker: Worker, num_rows: int, num_steps: int) -> list[list[int]]:
    """Prompts of different lengths, then decode steps that name tokens still in flight."""
    sampling = [
        SamplingParams(temperature=0.0 if i % 2 else 0.8, seed=i, top_p=0.9)
        for i in range(num_rows)
    ]
    prompts = [tuple((7 * i + j) % 101 for j in range(PROMPT - i % 3)) for i in range(num_rows)]
    blocks = [tuple(range(3 * i, 3 * i + 3)) for i in range(num_rows)]
    starts = [
        SequenceStart(token_ids=prompt, prompt_len=len(prompt), sampling=params, eos_token_ids=())
        for prompt, params in zip(prompts, sampling, strict=True)
    ]
    first = Step(
        step_id=0,
        rows=tuple(
            StepRow(
                sequence_id=i,
                start=0,
                token_ids=prompts[i],
                block_ids=(blocks[i],),
                samples=True,
                start_state=starts[i],
            )
            for i in range(num_rows)
        ),
    )
    steps = [first]
    for step_id in range(1, num_steps):
        rows = tuple(
            StepRow(
                sequence_id=i,
                start=len(prompts[i]) + step_id - 1,
                token_ids=(),
                token_ref=TokenRef(step_id - 1, i),
                block_ids=(blocks[i],),
                samples=True,
            )
            for i in range(num_rows)
        )
        steps.append(Step(step_id=step_id, rows=rows))
    launched = [worker.launch(step) for step in steps]
    return [[row.token_id or 0 for row in each.wait().rows] for each in launched]


@pytest.mark.parametrize("num_rows", [4] if INTERPRETED else [1, 3, 8, 11])
def test_graphs_give_the_tokens_of_eager_steps(graphs: None, num_rows: int) -> None:
    num_steps = 3 if INTERPRETED else 8
    want = decode_together(make_worker("reference"), num_rows, num_steps)
    if not INTERPRETED:
        assert decode_together(make_worker("cuda"), num_rows, num_steps) == want
    with_graphs = make_worker("cuda", num_graph_rows=num_rows)
    assert decode_together(with_graphs, num_rows, num_steps) == want
    with_graphs.reset()
    fewer = max(1, num_rows - 1)  # rows that were full are padding now
    assert decode_together(with_graphs, fewer, 2) == [step[:fewer] for step in want[:2]]


def test_padding_rows_store_nothing(graphs: None) -> None:
    worker = make_worker("cuda", num_graph_rows=4)
    before = [layer.keys_NBHD.clone() for layer in worker._kv.cache.layers]
    decode_together(worker, 3, 2)
    used = 9
    for layer, old in zip(worker._kv.cache.layers, before, strict=True):
        assert torch.equal(layer.keys_NBHD[used:], old[used:])
        assert not torch.equal(layer.keys_NBHD[:used], old[:used])


def test_steps_that_no_graph_takes(graphs: None) -> None:
    worker = make_worker("cuda", num_graph_rows=2)
    assert worker._graphs is not None
    row = StepRow(sequence_id=0, start=5, token_ids=(1,), block_ids=((0,),), samples=True)
    assert worker._graphs.take(Step(step_id=0, rows=(row, row)))
    assert not worker._graphs.take(Step(step_id=0, rows=(row, row, row)))
    two = StepRow(sequence_id=0, start=5, token_ids=(1, 2), block_ids=((0,),), samples=True)
    silent = StepRow(sequence_id=0, start=5, token_ids=(1,), block_ids=((0,),))
    long = StepRow(sequence_id=0, start=70, token_ids=(1,), block_ids=((0,) * 5,), samples=True)
    for other in (two, silent, long):
        assert not worker._graphs.take(Step(step_id=0, rows=(other,)))


def test_sizes_of_graphs() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(5) == (1, 2, 4, 5)
    assert graph_sizes(8) == (1, 2, 4, 8)
    assert graph_sizes(30) == (1, 2, 4, 8, 16, 24, 30)


@gpu_only
@pytest.mark.parametrize("num_graph_rows", [None, 8], ids=["eager", "graphs"])
def test_the_decode_loop_never_waits_for_the_device(num_graph_rows: int | None) -> None:
    worker = make_worker("cuda", num_graph_rows)
    decode_together(worker, 5, 4)  # compiles, and fills the allocators' caches
    worker.reset()
    launch = worker.launch

    def strictly(step: Step) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    worker.launch = strictly  # type: ignore[method-assign]
    decode_together(worker, 5, 8)


@gpu_only
def test_a_step_that_samples_nothing_is_done_when_the_device_is() -> None:
    worker = make_worker("cuda")
    start = SequenceStart(
        token_ids=(1,) * 40, prompt_len=40, sampling=SamplingParams(), eos_token_ids=()
    )
    row = StepRow(
        sequence_id=0, start=0, token_ids=(1,) * 20, block_ids=((0, 1),), start_state=start
    )
    torch.cuda._sleep(200_000_000)
    launched = worker.launch(Step(step_id=0, rows=(row,)))
    assert not launched.done
    launched.wait()
    assert launched.done


@gpu_only
def test_the_largest_step_is_measured() -> None:
    decoder = random_decoder(GEMMA_LIKE, select("cuda"), DEVICE)
    small, large = (
        step_bytes(decoder, decoder.dtype, num_tokens=tokens, max_num_seqs=4)
        for tokens in (64, 4096)
    )
    assert large > small + 4096 * GEMMA_LIKE.ffn_size * 4
