"""KV split over ranks by token ranges, against one rank that has all of it: the same logits.

Ranks are threads; each holds a range of the block ids, any number of heads, columns and token ids.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from paging import BLOCK, NUM_BLOCKS, Paged, PagedRun, fill_with_garbage, run_mixed_steps
from ranks import on_ranks, random_cut
from test_shards import CASES, all_logits, random_split

from shoal.comm import Group
from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.split import Range, Split, shards
from shoal.core.step import Step, StepRow
from shoal.kernels import KernelSet, select
from shoal.kernels.cpu.step import Session
from shoal.model.decoder import Decoder
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.spec import read_spec
from shoal.model.weights import load_decoder
from shoal.worker.batch import HostBatches, make_batch
from shoal.worker.kv_pool import allocate, token_bytes

CPU = torch.device("cpu")
TOLERANCE = 1e-4

KERNELS: dict[str, Callable[[], KernelSet | Session]] = {
    "reference": lambda: select("reference"),
    "compiled": lambda: Session(2),
}
# A window that begins inside a block, and heads that share one KV head.
GEMMA: dict[str, Any] = {
    "sliding_window": 21,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
SHAPES = {**CASES, "8-1-window": ("Gemma3ForCausalLM", 8, 1, GEMMA)}


class RangedRun(PagedRun):
    """A rank that has some of the blocks, told of all by Steps, as a worker is."""

    def __init__(
        self,
        decoder: Decoder | PackedDecoder,
        held: Range,
        num_blocks: int = NUM_BLOCKS,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(decoder, num_blocks, kv_dtype)
        self._held = held
        self._host_batches = HostBatches(held)
        self._kv = allocate(
            decoder.spec, decoder.shard, len(held) or 1, kv_dtype or decoder.dtype, CPU
        ).cache
        fill_with_garbage(self._kv, torch.Generator().manual_seed(held.start))

    def _forward(
        self, token_ids: list[int], rows: Sequence[tuple[Paged, int, int]]
    ) -> torch.Tensor:
        step = Step(
            step_id=0,
            rows=tuple(
                StepRow(
                    sequence_id=id(sequence),
                    start=start,
                    token_ids=tuple(sequence.token_ids[start:stop]),
                    block_ids=(tuple(sequence.blocks[: -(-stop // BLOCK)]),),
                )
                for sequence, start, stop in rows
            ),
        )
        if isinstance(self.decoder, PackedDecoder):
            host = self._host_batches.make(step)
            return self.decoder.forward(array("q", token_ids), host, self._kv)
        batch = make_batch(step, CPU, held=self._held)
        return self.decoder.forward(torch.tensor(token_ids), batch, self._kv)


Steps = Callable[[PagedRun], torch.Tensor]


def mixed_steps(run: PagedRun) -> torch.Tensor:
    return all_logits(run_mixed_steps(run.decoder, run=run))


def long_steps(run: PagedRun) -> torch.Tensor:
    """Beyond a part of the compiled attention: chunks of a prompt, decodes, another sequence."""
    draw = random.Random(4).choices(range(run.decoder.spec.vocab_size), k=1100)
    long, short = run.add(draw), run.add(draw[:30])
    for start in range(0, 1090, 109):
        run.step((long, start, start + 109))
    run.step((short, 0, 29), (long, 1090, 1094))
    run.step((long, 1094, 1095), (short, 29, 30))
    run.step((long, 1095, 1098))
    return all_logits([long, short])


def ranged_logits(
    path: Path,
    spec: ModelSpec,
    split: Split,
    held: Sequence[Range],
    kernels: str,
    steps: Steps = mixed_steps,
    kv_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Every rank runs the same steps; their logits side by side."""
    num_blocks = held[-1].stop
    parts = shards(split, Range(0, spec.num_layers), has_embedding=True, has_head=True)

    def on_rank(rank: int, group: Group) -> torch.Tensor:
        decoder = load_decoder(
            path,
            spec,
            shard=parts[rank],
            group=group,
            device=CPU,
            dtype=torch.float32,
            kernels=KERNELS[kernels](),
        )
        return steps(RangedRun(decoder, held[rank], num_blocks, kv_dtype))

    return torch.cat(on_ranks(split.num_ranks, on_rank), -1)


def whole_logits(
    path: Path,
    spec: ModelSpec,
    kernels: str,
    steps: Steps = mixed_steps,
    num_blocks: int = NUM_BLOCKS,
    kv_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    decoder = load_decoder(path, spec, device=CPU, dtype=torch.float32, kernels=KERNELS[kernels]())
    return steps(PagedRun(decoder, num_blocks, kv_dtype))


def tokens_split(spec: ModelSpec, size: int, rng: random.Random) -> Split:
    return replace(random_split(spec, size, rng), kv="tokens")


def checkpoint(case: str, folder: Path, **overrides: Any) -> tuple[Path, ModelSpec]:
    """It caps scores too, which no architecture that is read from files does."""
    architecture, heads, kv_heads, more = SHAPES[case]
    path = tiny_checkpoint(folder, architecture, heads, kv_heads, **{**more, **overrides})
    return path, replace(read_spec(path), attention_softcap=5.0)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", SHAPES)
def test_random_ranges_over_random_splits(case: str, kernels: str, tmp_path: Path) -> None:
    path, spec = checkpoint(case, tmp_path)
    expected, rng = whole_logits(path, spec, kernels), random.Random(case)
    for size in (1, 2, 3, 4):
        split, held = tokens_split(spec, size, rng), random_cut(NUM_BLOCKS, size, rng)
        got = ranged_logits(path, spec, split, held, kernels)
        assert (got - expected).abs().max() < TOLERANCE, (split, held)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", ["9-3-tied", "8-1-window"])
def test_long_contexts(case: str, kernels: str, tmp_path: Path) -> None:
    path, spec = checkpoint(case, tmp_path, max_position_embeddings=2048)
    expected, rng = whole_logits(path, spec, kernels, long_steps, 90), random.Random(case)
    for held in (random_cut(90, 3, rng), (Range(0, 80), Range(80, 80), Range(80, 90))):
        split = tokens_split(spec, 3, rng)
        got = ranged_logits(path, spec, split, held, kernels, long_steps)
        assert (got - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("kernels", "kv_dtype", "tolerance"),
    [
        ("reference", torch.int8, TOLERANCE),
        ("compiled", torch.int8, TOLERANCE),
        # What a rank rounds is what one would round, but for last bits that fall the other way.
        ("reference", torch.bfloat16, 0.05),
        ("compiled", torch.bfloat16, 0.05),
    ],
)
def test_other_formats_of_kv(
    kernels: str, kv_dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    path, spec = checkpoint("9-3-tied", tmp_path)
    expected, rng = whole_logits(path, spec, kernels, kv_dtype=kv_dtype), random.Random(3)
    split, held = tokens_split(spec, 3, rng), random_cut(NUM_BLOCKS, 3, rng)
    got = ranged_logits(path, spec, split, held, kernels, kv_dtype=kv_dtype)
    assert (got - expected).abs().max() < tolerance


def test_a_rank_keeps_all_kv_heads_of_its_blocks(tmp_path: Path) -> None:
    spec = read_spec(tiny_checkpoint(tmp_path))
    split = Split(
        heads=(Range(0, 9), Range(9, 9)),
        ffn=(Range(0, 48), Range(48, 48)),
        vocab=(Range(0, 128), Range(128, 128)),
        kv="tokens",
    )
    layers = Range(0, spec.num_layers)
    for shard in shards(split, layers, has_embedding=True, has_head=True):
        assert token_bytes(spec, shard, torch.float32) == 2 * 3 * 3 * 8 * 4


def test_kernels_that_cannot_say_so(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    spec, kernels = read_spec(path), replace(select("reference"), partial_attention=None)
    split = tokens_split(spec, 2, random.Random(0))
    shard = shards(split, Range(0, 3), has_embedding=True, has_head=True)[0]

    def load(_rank: int, group: Group) -> None:
        load_decoder(
            path,
            spec,
            shard=shard,
            group=group,
            device=CPU,
            dtype=torch.float32,
            kernels=kernels,
        )

    with pytest.raises(ConfigError, match=r"--kernels reference, or split it by heads"):
        on_ranks(2, load)
