"""The compiled CPU path on shards of any size, against one rank that holds everything.

Ranks are threads of this process; each has its own team of one or two threads.
"""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB_SIZE, tiny_checkpoint
from compiled_chain import Chain, Stage, load_rank, one_stage, random_split, ranges
from paging import Paged, PagedRun, open_decoder, run_mixed_steps
from test_architectures import CASES
from test_compiled import ISAS, SESSIONS
from torch.distributed import HashStore

from shoal.comm import NativeReduce
from shoal.comm.gloo import GlooGroup
from shoal.comm.in_process import in_process_groups
from shoal.comm.memory import create_memory, is_available
from shoal.comm.shared_memory import SharedMemoryGroup
from shoal.core.errors import CommError
from shoal.core.split import Range, Split, shards
from shoal.kernels.cpu.reduce import PythonReduce
from shoal.kernels.cpu.step import HostBatch, Session
from shoal.model.draw import add_noise
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.spec import read_spec
from shoal.worker.kv_pool import allocate

TOLERANCE = 1e-4

LAYOUTS = ((9, 3), (14, 2), (32, 8), (8, 8))


def differences(ones: Sequence[Paged], others: Sequence[Paged]) -> list[torch.Tensor]:
    return [
        logits - other.logits[position]
        for one, other in zip(ones, others, strict=True)
        for position, logits in one.logits.items()
    ]


def worst(ones: Sequence[Paged], others: Sequence[Paged]) -> float:
    return max(float(each.abs().max()) for each in differences(ones, others))


# --- whole models ---


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
def test_any_split_gives_the_logits_of_one_rank(
    heads: int, kv_heads: int, num_ranks: int, isa: str, tmp_path: Path
) -> None:
    rng = random.Random(f"{heads}/{kv_heads} {num_ranks}")
    biases = {"attention_bias": True, "mlp_bias": True}
    folder = tiny_checkpoint(
        tmp_path, "LlamaForCausalLM", heads, kv_heads, tie_word_embeddings=num_ranks > 2, **biases
    )
    expected = run_mixed_steps(open_decoder(folder, kernels=SESSIONS[isa]))
    for _ in range(3):
        split = random_split(read_spec(folder), num_ranks, rng)
        chain = Chain(folder, one_stage(read_spec(folder), split), isa)
        assert worst(expected, run_mixed_steps(chain)) < TOLERANCE, split


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_architecture(case: str, tmp_path: Path) -> None:
    """Biases of one rank, norms of heads, norms after a sum, windows, caps, ropes."""
    architecture, heads, kv_heads, overrides = CASES[case]
    folder = tiny_checkpoint(tmp_path, architecture, heads, kv_heads, **overrides)
    expected = run_mixed_steps(open_decoder(folder, kernels=Session(1)))
    spec, rng = read_spec(folder), random.Random(case)
    for num_ranks in (2, 3):
        chain = Chain(folder, one_stage(spec, random_split(spec, num_ranks, rng)), None)
        assert worst(expected, run_mixed_steps(chain)) < TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(14, 2, 16), (32, 8, 8), (9, 3, 64)])
def test_precisions(
    heads: int, kv_heads: int, size: int, weights: str, isa: str, tmp_path: Path
) -> None:
    """What one rank rounds is what all round, but in a group that heads of two ranks share."""
    folder = tiny_checkpoint(
        tmp_path, "LlamaForCausalLM", heads, kv_heads, head_dim=size, intermediate_size=192
    )
    options: dict[str, Any] = {"quantize": "none" if weights == "bfloat16" else weights}
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    expected = run_mixed_steps(open_decoder(folder, dtype, kernels=SESSIONS[isa], **options))
    rng = random.Random(f"{heads} {weights}")
    for num_ranks in (2, 3):
        split = random_split(read_spec(folder), num_ranks, rng)
        chain = Chain(folder, one_stage(read_spec(folder), split), isa, dtype=dtype, **options)
        assert {rank.precision for rank in chain.ranks[0]} == {weights}
        errors = differences(expected, run_mixed_steps(chain))
        # Measured: at most 0.03 of logits whose deviation is 1, less than rounding itself costs.
        assert torch.stack([error.std() for error in errors]).mean() < 0.05, split


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "ends"), [(35, 5, (3, 18)), (9, 3, (4, 4)), (14, 2, (6, 8)), (8, 8, (7,))]
)
def test_long_contexts(
    heads: int,
    kv_heads: int,
    ends: tuple[int, ...],
    kv_dtype: torch.dtype,
    isa: str,
    tmp_path: Path,
) -> None:
    """Rows cut in parts, where an item has several KV heads and some lack query heads."""
    sizes = {"max_position_embeddings": 2048, "num_hidden_layers": 1}
    folder = tiny_checkpoint(tmp_path, "LlamaForCausalLM", heads, kv_heads, **sizes)
    spec = read_spec(folder)
    split = Split(
        heads=ranges(spec.num_heads, *ends),
        ffn=ranges(spec.ffn_size, *[16 for _ in ends]),
        vocab=ranges(spec.vocab_size, *[64 for _ in ends]),
    )
    found = []
    for decoder in (
        open_decoder(folder, kernels=SESSIONS[isa]),
        Chain(folder, one_stage(spec, split), isa),
    ):
        run = PagedRun(decoder, 120, kv_dtype)
        ids = torch.randint(3, 90, (1330,), generator=torch.Generator().manual_seed(5)).tolist()
        sequence, other = run.add(ids), run.add(ids[:300])
        run.step((sequence, 0, 700), (other, 0, 298))
        run.step((other, 298, 300), (sequence, 700, 1324))
        run.step((sequence, 1324, 1327))
        run.step((sequence, 1327, 1328))
        found.append([sequence, other])
    assert worst(*found) < (TOLERANCE if kv_dtype == torch.float32 else 0.05)


# --- ranks that lack a part ---


@pytest.mark.parametrize("case", ["llama-biases", "gemma3", "qwen3", "smollm2"])
@pytest.mark.parametrize("first_has", ["nothing", "heads", "ffn", "vocabulary"])
def test_ranks_without_heads_columns_or_token_ids(
    first_has: str, case: str, tmp_path: Path
) -> None:
    """Rank 0, which adds the biases, has one kind of thing; the rest is rank 1's, rank 2 idles."""
    architecture, heads, kv_heads, overrides = CASES[case]
    folder = tiny_checkpoint(tmp_path, architecture, heads, kv_heads, **overrides)
    spec = read_spec(folder)

    def share(kind: str, total: int) -> tuple[Range, ...]:
        return ranges(total, total if first_has == kind else 0, total)

    split = Split(
        heads=share("heads", spec.num_heads),
        ffn=share("ffn", spec.ffn_size),
        vocab=share("vocabulary", spec.vocab_size),
    )
    expected = run_mixed_steps(open_decoder(folder, kernels=Session(1)))
    chain = Chain(folder, one_stage(spec, split), None)
    assert worst(expected, run_mixed_steps(chain)) < TOLERANCE


# --- ranges of layers ---


@pytest.mark.parametrize("case", ["llama-biases", "gemma3", "mistral-window", "smollm2"])
def test_stages(case: str, tmp_path: Path) -> None:
    """Neighbours that hold more than they run; ends without layers; ranks of their own."""
    architecture, heads, kv_heads, overrides = CASES[case]
    folder = tiny_checkpoint(
        tmp_path, architecture, heads, kv_heads, **{**overrides, **_layers(overrides, 6)}
    )
    spec, rng = read_spec(folder), random.Random(case)
    expected = run_mixed_steps(open_decoder(folder, kernels=Session(1)))
    everything = Range(0, 6)
    plans = [
        [(Range(0, 2), Range(0, 2)), (Range(1, 6), Range(2, 5)), (Range(3, 6), Range(5, 6))],
        [(Range(0, 0), Range(0, 0)), (everything, everything), (Range(6, 6), Range(6, 6))],
        [(everything, Range(0, 4)), (everything, Range(4, 6))],
        [(everything, Range(0, 0)), (everything, everything)],
    ]
    for plan in plans:
        stages = [
            Stage(held, run, random_split(spec, rng.randint(1, 3), rng)) for held, run in plan
        ]
        assert worst(expected, run_mixed_steps(Chain(folder, stages, None))) < TOLERANCE, stages


def _layers(overrides: dict[str, Any], count: int) -> dict[str, Any]:
    kinds = overrides.get("layer_types")
    return {
        "num_hidden_layers": count,
        **({"layer_types": (kinds * count)[:count]} if kinds else {}),
    }


def test_one_rank_in_parts_gives_the_same_bits(tmp_path: Path) -> None:
    spec = read_spec(tiny_checkpoint(tmp_path))
    alone = Split(
        heads=ranges(spec.num_heads), ffn=ranges(spec.ffn_size), vocab=ranges(spec.vocab_size)
    )
    everything = Range(0, spec.num_layers)
    stages = [Stage(everything, Range(0, 1), alone), Stage(everything, Range(1, 3), alone)]
    expected = run_mixed_steps(open_decoder(tmp_path, kernels=Session(2)))
    assert worst(expected, run_mixed_steps(Chain(tmp_path, stages, None))) == 0


# --- what a step gives ---


def test_steps_give_logits_of_a_ranks_own_token_ids(tmp_path: Path) -> None:
    """Candidates with indices of the own range; nothing where there is nothing."""
    architecture, heads, kv_heads, overrides = CASES["gemma3-softcap"]
    folder = tiny_checkpoint(tmp_path, architecture, heads, kv_heads, **overrides)
    spec = read_spec(folder)
    split = Split(
        heads=ranges(spec.num_heads, 3, 3),
        ffn=ranges(spec.ffn_size, 16, 32),
        vocab=ranges(spec.vocab_size, 37, 37),
    )
    chain = Chain(folder, one_stage(spec, split), None)
    (expected,) = _steps([open_decoder(folder, kernels=Session(1))])  # type: ignore[list-item]
    found = _steps(chain.ranks[0])
    assert [tuple(logits.shape) for logits, _ in found] == [(2, 37), (2, 0), (2, VOCAB_SIZE - 37)]
    together = torch.cat([logits for logits, _ in found], dim=1)
    assert (together - expected[0]).abs().max() < TOLERANCE
    for logits, best in found:
        wanted = logits.argmax(dim=1) if logits.shape[1] else torch.zeros(2, dtype=torch.int64)
        assert best.equal(wanted)


def _steps(ranks: Sequence[PackedDecoder]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    def run(rank: PackedDecoder) -> tuple[torch.Tensor, torch.Tensor]:
        kv = allocate(rank.spec, rank.shard, 4, torch.float32, rank.device).cache
        batch = HostBatch(
            array("q", [3, 2]), array("q", [3, 2]), [array("q", [2]), array("q", [1])]
        )
        out = rank.step(array("q", [5, 60, 7, 120, 9]), batch, kv, array("q", [2, 4]))
        return out.logits_NV.clone(), out.best_N.clone()

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(run, ranks))


@pytest.mark.parametrize("isa", ISAS)
def test_noise_of_any_token_ids(isa: str) -> None:
    seeds, positions = [3, 2**63 + 5], [7, 2**33]
    expected, size = torch.zeros(2, 9000), 4321
    add_noise(expected, seeds, positions)
    for first in (0, 1, 2, 3, 4, 63, 64, 1001, 4097):
        got = torch.zeros(2, size)
        SESSIONS[isa].add_noise(got, seeds, positions, first)
        assert (expected[:, first : first + size] - got).abs().max() < 1e-5


# --- sums ---


@pytest.mark.skipif(not is_available(), reason="needs the compiled group")
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sums_over_shared_memory(num_ranks: int, tmp_path: Path) -> None:
    """The library calls the library: no Python in between."""

    def make_groups(size: int) -> list[SharedMemoryGroup]:
        fd = create_memory(size)
        groups = [SharedMemoryGroup(fd, rank, size) for rank in range(size)]
        os.close(fd)
        return groups

    spec = read_spec(tiny_checkpoint(tmp_path))
    expected = run_mixed_steps(open_decoder(tmp_path, kernels=Session(1)))
    stages = one_stage(spec, random_split(spec, num_ranks, random.Random(num_ranks)))
    chain = Chain(tmp_path, stages, None, make_groups)
    assert worst(expected, run_mixed_steps(chain)) < TOLERANCE
    for group in chain.groups:
        group.close()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sums_over_gloo(num_ranks: int, tmp_path: Path) -> None:
    """The library calls back into Python, which calls gloo."""

    def make_groups(size: int) -> list[GlooGroup]:
        store = HashStore()
        with ThreadPoolExecutor(size) as pool:  # each waits for the others
            make = partial(GlooGroup, store, size=size, interface="127.0.0.1")
            return list(pool.map(lambda rank: make(rank=rank), range(size)))

    spec = read_spec(tiny_checkpoint(tmp_path))
    expected = run_mixed_steps(open_decoder(tmp_path, kernels=Session(1)))
    stages = one_stage(spec, random_split(spec, num_ranks, random.Random(num_ranks)))
    chain = Chain(tmp_path, stages, None, make_groups)
    assert worst(expected, run_mixed_steps(chain)) < TOLERANCE
    for group in chain.groups:
        group.close()


# --- when ranks do not come ---


class _Native:
    """A group whose sum the library calls by address; it fails at the call `fails_at`."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size
        self.fails_at = 0
        self.num_calls = 0
        self._reduce = PythonReduce(self.all_reduce)
        self.native = NativeReduce(self._reduce.address, 0)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.num_calls += 1
        if self.num_calls == self.fails_at:
            self._group.abort()
        self._group.all_reduce(tensor)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_failed_sum_ends_the_step_and_the_next_is_right(
    num_threads: int, native: bool, tmp_path: Path
) -> None:
    spec = read_spec(tiny_checkpoint(tmp_path))
    rng = random.Random(1)
    groups: list[Any] = [_Native(group) for group in in_process_groups(2, 20)]
    if not native:
        for group in groups:
            group.native = None
    held = shards(
        random_split(spec, 2, rng), Range(0, spec.num_layers), has_embedding=True, has_head=True
    )
    ranks = [
        load_rank(tmp_path, spec, shard, group, Session(num_threads))
        for shard, group in zip(held, groups, strict=True)
    ]
    expected = torch.cat([logits for logits, _ in _steps(ranks)], dim=1)
    num_sums = 1 + 2 * spec.num_layers
    assert groups[0].num_calls == num_sums
    said = "not come in time, or the step" if native else "aborted"
    for number in range(1, num_sums + 1):
        groups[0].num_calls, groups[0].fails_at = 0, number
        with pytest.raises(CommError, match=said):
            _steps(ranks)
        groups[0].fails_at = 0
        for group in groups:
            group._group.reset(number)
        assert torch.cat([logits for logits, _ in _steps(ranks)], dim=1).equal(expected)
