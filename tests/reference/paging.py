"""Runs a Decoder on sequences over a paged cache, the way a worker does, without a worker."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from shoal.core.options import Quantization
from shoal.kernels import KernelSet, KVCache, RaggedBatch, select
from shoal.kernels.cpu.step import HostBatch, Session
from shoal.model.decoder import Decoder
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.spec import read_spec
from shoal.model.weights import load_decoder
from shoal.worker.kv_pool import allocate

BLOCK = 16
NUM_BLOCKS = 64


def open_decoder(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    kernels: KernelSet | Session | None = None,
    quantize: Quantization = "none",
    **changes: Any,
) -> Decoder | PackedDecoder:
    """The checkpoint's decoder; `changes` are of its spec."""
    return load_decoder(
        path,
        replace(read_spec(path), **changes),
        device=torch.device(device),
        dtype=dtype,
        kernels=kernels or select("reference"),
        quantize=quantize,
    )


@dataclass
class Paged:
    """Tokens of one sequence and the blocks their KV lies in."""

    token_ids: Sequence[int]
    blocks: list[int]
    logits: dict[int, torch.Tensor] = field(default_factory=dict)


class PagedRun:
    """A decoder, a cache full of garbage, and sequences whose blocks are strewn over it."""

    def __init__(
        self,
        decoder: Decoder | PackedDecoder,
        num_blocks: int = NUM_BLOCKS,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.decoder = decoder
        self._device = decoder.device
        generator = torch.Generator().manual_seed(1)
        dtype = kv_dtype or decoder.dtype
        self._kv = allocate(decoder.spec, decoder.shard, num_blocks, dtype, self._device).cache
        fill_with_garbage(self._kv, generator)
        self._free = torch.randperm(num_blocks, generator=generator).tolist()

    def add(self, token_ids: Sequence[int], shared: Sequence[int] = ()) -> Paged:
        """A sequence whose first blocks are those of another."""
        num_own = -(-len(token_ids) // BLOCK) - len(shared)
        return Paged(token_ids, [*shared, *(self._free.pop() for _ in range(num_own))])

    def step(self, *rows: tuple[Paged, int, int]) -> None:
        """Computes tokens [start, stop) of each sequence and keeps their logits."""
        token_ids = [t for sequence, start, stop in rows for t in sequence.token_ids[start:stop]]
        with torch.inference_mode():
            hidden = self._forward(token_ids, rows)
            logits = iter(self.decoder.logits(hidden).cpu())
        for sequence, start, stop in rows:
            for position in range(start, stop):
                sequence.logits[position] = next(logits)

    def _forward(
        self, token_ids: list[int], rows: Sequence[tuple[Paged, int, int]]
    ) -> torch.Tensor:
        if not isinstance(self.decoder, PackedDecoder):
            ids = torch.tensor(token_ids, device=self._device)
            return self.decoder.forward(ids, self._batch(rows), self._kv)
        host = HostBatch(
            array("q", [stop - start for _, start, stop in rows]),
            array("q", [stop for _, _, stop in rows]),
            [array("q", sequence.blocks) for sequence, _, _ in rows],
        )
        return self.decoder.forward(array("q", token_ids), host, self._kv)

    def _batch(self, rows: Sequence[tuple[Paged, int, int]]) -> RaggedBatch:
        positions = [p for _, start, stop in rows for p in range(start, stop)]
        slots = [
            sequence.blocks[p // BLOCK] * BLOCK + p % BLOCK
            for sequence, start, stop in rows
            for p in range(start, stop)
        ]
        # As the engine does, a row carries just the blocks its context has reached.
        tables = [sequence.blocks[: -(-stop // BLOCK)] for sequence, _, stop in rows]
        width = max(map(len, tables))
        tables = [table + [0] * (width - len(table)) for table in tables]
        return RaggedBatch(
            positions_T=torch.tensor(positions, device=self._device),
            slots_T=torch.tensor(slots, device=self._device),
            query_lens=[stop - start for _, start, stop in rows],
            context_lens=[stop for _, _, stop in rows],
            block_tables_RB=torch.tensor(tables, device=self._device),
        )


def run_mixed_steps(
    decoder: Decoder | PackedDecoder,
    kv_dtype: torch.dtype | None = None,
    run: PagedRun | None = None,
) -> list[Paged]:
    """Ragged steps with everything at once; every token's logits end up in its sequence.

    a: a prompt in chunks, then decodes            c: shares a's first block, computed earlier
    b: a whole prompt, then decodes                d: shares two of a's, the second in this step
    """
    generator = torch.Generator().manual_seed(2)
    vocab_size = decoder.spec.vocab_size

    def draw(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=generator).tolist()

    run = run or PagedRun(decoder, kv_dtype=kv_dtype)
    a, b = run.add(draw(47)), run.add(draw(24))
    c = run.add([*a.token_ids[:16], *draw(19)], shared=a.blocks[:1])
    d = run.add([*a.token_ids[:32], *draw(10)], shared=a.blocks[:2])
    run.step((a, 0, 19), (b, 0, 21))
    run.step((b, 21, 22), (d, 32, 40), (a, 19, 44), (c, 16, 30))
    run.step((a, 44, 45), (b, 22, 23), (c, 30, 33), (d, 40, 41))
    run.step((d, 41, 42), (a, 45, 46), (b, 23, 24), (c, 33, 34))
    run.step((a, 46, 47), (c, 34, 35))
    return [a, b, c, d]


def fill_with_garbage(kv: KVCache, generator: torch.Generator) -> None:
    """What an unwritten slot holds must never show, in numbers or in scales."""
    for layer in kv.layers:
        for cache in (layer.keys_NBHD, layer.values_NBHD):
            noise = torch.randn(cache.shape, generator=generator) * 20
            cache.copy_(noise.to(cache.dtype))
        for scales in (layer.key_scales_NBH, layer.value_scales_NBH):
            if scales is not None:
                scales.copy_(torch.rand(scales.shape, generator=generator) * 20)


def worst_difference(sequences: Sequence[Paged], expected: Sequence[torch.Tensor]) -> float:
    """Largest difference of any logit of any computed token."""
    return max(
        float((logits - all_logits[position]).abs().max())
        for sequence, all_logits in zip(sequences, expected, strict=True)
        for position, logits in sequence.logits.items()
    )
