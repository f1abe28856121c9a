"""Shards of a compiled decoder, each in a thread, behind the face of one decoder."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paging import fill_with_garbage

from shoal.comm import Group
from shoal.core.model_spec import ModelSpec
from shoal.core.split import Range, Shard, Split, shards, whole
from shoal.kernels import KVCache
from shoal.kernels.cpu.step import HostBatch, Session
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.spec import read_spec
from shoal.model.weights import load_decoder
from shoal.worker.groups import groups_in_threads
from shoal.worker.kv_pool import allocate


def ranges(total: int, *ends: int) -> tuple[Range, ...]:
    """[0, ends[0]), [ends[0], ends[1]), ... up to the total."""
    edges = [0, *ends, total]
    return tuple(Range(start, stop) for start, stop in itertools.pairwise(edges))


def random_ranges(total: int, count: int, rng: random.Random) -> tuple[Range, ...]:
    """Any sizes; some are nothing."""
    return ranges(total, *sorted(rng.choices(range(total + 1), k=count - 1)))


def random_split(spec: ModelSpec, num_ranks: int, rng: random.Random) -> Split:
    totals = (spec.num_heads, spec.ffn_size, spec.vocab_size)
    heads, ffn, vocab = (random_ranges(total, num_ranks, rng) for total in totals)
    return Split(heads=heads, ffn=ffn, vocab=vocab)


@dataclass(frozen=True)
class Stage:
    """Layers that an instance holds and those of them that are run, and its split."""

    held: Range
    run: Range
    split: Split


def one_stage(spec: ModelSpec, split: Split) -> list[Stage]:
    layers = Range(0, spec.num_layers)
    return [Stage(layers, layers, split)]


class Chain(PackedDecoder):
    """Stages of ranks behind the face of one decoder; every rank keeps KV of its own."""

    def __init__(
        self,
        path: Path,
        stages: Sequence[Stage],
        isa: str | None,
        make_groups: Callable[[int], Sequence[Any]] | None = None,
        **options: Any,
    ) -> None:
        self.spec = read_spec(path)
        self.shard = whole(self.spec)
        self.device = torch.device("cpu")
        self.stages = stages
        self.groups: list[Any] = []
        self.ranks: list[list[PackedDecoder]] = []
        self._kv: list[list[KVCache]] = []
        for number, stage in enumerate(stages):
            size = stage.split.num_ranks
            groups: list[Any] = [None]
            if size > 1 and make_groups is not None:
                groups = list(make_groups(size))
            elif size > 1:
                groups = list(groups_in_threads(size, stage.split.streams))
            self.groups += groups
            ends = {"has_embedding": number == 0, "has_head": number == len(stages) - 1}
            held = zip(shards(stage.split, stage.held, **ends), groups, strict=True)
            self.ranks.append(
                [
                    load_rank(path, self.spec, shard, group, Session(1 + rank % 2, isa), **options)
                    for rank, (shard, group) in enumerate(held)
                ]
            )
        self.dtype = self.ranks[0][0].dtype

    def forward(self, inputs: Any, batch: HostBatch, kv: KVCache, layers: Any = None) -> Any:
        self._kv = self._kv or [[like(kv, each) for each in ranks] for ranks in self.ranks]
        for stage, ranks, caches in zip(self.stages, self.ranks, self._kv, strict=True):
            with ThreadPoolExecutor(len(ranks)) as pool:
                runs = [
                    pool.submit(run_rank, rank, inputs, batch, cache, stage.run)
                    for rank, cache in zip(ranks, caches, strict=True)
                ]
                results = [run.result() for run in runs if run.result() is not None]
            assert all(result.equal(results[0]) for result in results)  # to the bit
            inputs = results[0]
        return inputs

    def logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        return torch.cat([rank.logits(hidden_NE) for rank in self.ranks[-1]], dim=1)


def run_rank(
    rank: PackedDecoder, inputs: Any, batch: HostBatch, kv: KVCache, layers: Range
) -> torch.Tensor | None:
    """Hidden states; None of a rank with experts only."""
    try:
        if rank.shard.has_stream:
            return rank.forward(inputs, batch, kv, layers)
        rank.serve(layers)
        return None
    except BaseException:
        if rank._group is not None:
            rank._group.abort()  # the others need not wait
        raise


def load_rank(
    path: Path, spec: ModelSpec, shard: Shard, group: Group | None, session: Session, **options: Any
) -> PackedDecoder:
    options = {"dtype": torch.float32, "device": torch.device("cpu"), **options}
    decoder = load_decoder(path, spec, shard=shard, group=group, kernels=session, **options)
    assert isinstance(decoder, PackedDecoder)
    return decoder


def like(kv: KVCache, rank: PackedDecoder) -> KVCache:
    """As many blocks of the rank's own KV, full of garbage."""
    keys = kv.layers[0].keys_NBHD
    cache = allocate(rank.spec, rank.shard, len(keys), keys.dtype, rank.device).cache
    fill_with_garbage(cache, torch.Generator().manual_seed(3))
    return cache
