"""Ranks with experts only: tokens go to them and come back; the logits are those of one rank."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from comm_ranks import Board, each_in_a_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from paging import run_mixed_steps
from ranks import random_cut
from thread_engine import engine, tokens_of
from torch import Tensor

from shoal.comm import Group
from shoal.comm.compressed import SumForm
from shoal.comm.streams import StreamGroup
from shoal.core.errors import CommError, ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.plan import InstancePlan, RankPlan, ReplicaPlan, StagePlan, check, default_routes
from shoal.core.split import (
    WHOLE_SHARE,
    Dealing,
    ExpertShare,
    Range,
    Split,
    shards,
    share_phase,
    split_by_weights,
)
from shoal.kernels import KernelSet, select
from shoal.kernels.cpu.step import Session
from shoal.model.decoder import Decoder
from shoal.model.expert_exchange import _choices, _few_choices, _takers
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.spec import read_spec
from shoal.model.weights import load_decoder
from shoal.worker.group_kinds import group_memory
from shoal.worker.groups import GroupPlace, groups_in_threads, make_group
from shoal.worker.place import Place

CPU = torch.device("cpu")
TOLERANCE = 1e-4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "shared": (
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 64,
        },
    ),
}


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, overrides = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_checkpoint(folder, architecture, 4, 2, **overrides)


def random_dealing(num_experts: int, size: int, rng: random.Random) -> Dealing:
    """Every expert on one rank, or its tokens shared out among several."""
    held: list[list[ExpertShare]] = [[] for _ in range(size)]
    for expert in range(num_experts):
        ranks = sorted(rng.sample(range(size), rng.choice([1, 1, min(2, size), size])))
        cuts = sorted(rng.sample(range(1, WHOLE_SHARE), len(ranks) - 1))
        for rank, start, stop in zip(ranks, [0, *cuts], [*cuts, WHOLE_SHARE], strict=True):
            held[rank].append(ExpertShare(expert, start, stop))
    return tuple(tuple(sorted(shares)) for shares in held)


def random_split(spec: ModelSpec, size: int, num_streams: int, rng: random.Random) -> Split:
    """The first rank and some others keep hidden states, the others have experts only."""
    streams = sorted([0, *rng.sample(range(1, size), num_streams - 1)])

    def spread(total: int) -> tuple[Range, ...]:
        own = iter(random_cut(total - num_streams, num_streams, rng))
        found, done = [], 0
        for rank in range(size):
            length = len(next(own)) + 1 if rank in streams else 0  # nobody's is empty
            found.append(Range(done, done + length))
            done += length
        return tuple(found)

    assert spec.experts is not None
    num_experts = spec.experts.num_experts
    split = Split(
        heads=spread(spec.num_heads),
        ffn=spread(spec.ffn_size),
        vocab=spread(spec.vocab_size),
        experts=tuple(random_dealing(num_experts, size, rng) for _ in range(spec.num_layers)),
    )
    assert split.streams == tuple(streams)
    return split


class Serving:
    """A decoder with experts only, as `run_mixed_steps` drives decoders."""

    def __init__(self, decoder: Decoder | PackedDecoder) -> None:
        self._decoder = decoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def forward(self, inputs: Tensor, *_: Any) -> Tensor:
        self._decoder.serve()
        return torch.zeros(len(inputs), self._decoder.spec.hidden_size)


class Flat:
    """A group that sums what differs in shape, as those between processes do."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def all_reduce(self, tensor: Tensor) -> None:
        self._group.all_reduce(tensor.view(-1))


def all_logits(decoder: Any) -> Tensor:
    sequences = run_mixed_steps(decoder)
    return torch.stack([each for one in sequences for _, each in sorted(one.logits.items())])


def loaded(
    path: Path, kernels: KernelSet | Session | None = None, **held: Any
) -> Decoder | PackedDecoder:
    kernels = kernels or select("reference")
    spec = read_spec(path)
    return load_decoder(path, spec, device=CPU, dtype=torch.float32, kernels=kernels, **held)


KERNELS: dict[str, Callable[[int], KernelSet | Session]] = {
    "plain torch": lambda rank: select("reference"),
    "compiled": lambda rank: Session(1 + rank % 2),
    "both": lambda rank: Session(1) if rank % 2 else select("reference"),
    "both, compiled first": lambda rank: select("reference") if rank % 2 else Session(2),
}


def exchanged_logits(path: Path, split: Split, kernels: str) -> Tensor:
    """Of all ranks side by side."""
    spec = read_spec(path)
    held = shards(split, Range(0, spec.num_layers), has_embedding=True, has_head=True)
    groups = groups_in_threads(split.num_ranks, split.streams)

    def on_rank(rank: int) -> Tensor:
        group = groups[rank]
        assert group is not None
        try:
            flat: Any = Flat(group)
            decoder = loaded(path, KERNELS[kernels](rank), shard=held[rank], group=flat)
            decoder.compare(type(decoder).__name__)
            return all_logits(decoder if held[rank].has_stream else Serving(decoder))
        except BaseException:
            group.abort()
            raise

    with ThreadPoolExecutor(split.num_ranks) as pool:
        return torch.cat(list(pool.map(on_rank, range(split.num_ranks))), -1)


@pytest.mark.parametrize(
    ("kernels", "size"),
    [
        *itertools.product(["plain torch"], [2, 3, 4]),
        *[("compiled", 4), ("both", 3), ("both", 4), ("both, compiled first", 3)],
    ],
)
def test_logits_are_those_of_one_rank(checkpoint: Path, size: int, kernels: str) -> None:
    expected, spec = all_logits(loaded(checkpoint)), read_spec(checkpoint)
    for num_streams in range(1, size):
        rng = random.Random(f"{kernels} {size * 10 + num_streams}")
        split = random_split(spec, size, num_streams, rng)
        got = exchanged_logits(checkpoint, split, kernels)
        assert (got - expected).abs().max() < TOLERANCE, split


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), num_tokens=st.integers(1, 40), position=st.integers(0, 9999))
def test_tokens_go_where_shares_say(seed: int, num_tokens: int, position: int) -> None:
    rng = random.Random(seed)
    num_experts, size = rng.randint(1, 7), rng.randint(2, 4)
    dealing, phase = random_dealing(num_experts, size, rng), share_phase(position, 3)
    bounds = torch.zeros(num_experts, size, 2, dtype=torch.int64)
    for rank, shares in enumerate(dealing[1:], 1):
        for share in shares:
            bounds[share.expert, rank] = torch.tensor((share.start, share.stop))
    num_active = rng.randint(1, num_experts)
    ids = [rng.sample(range(num_experts), num_active) for _ in range(num_tokens)]
    want = [[-1] * num_active for _ in range(num_tokens)]
    for rank, shares in enumerate(dealing[1:], 1):
        for share in shares:
            pairs = [
                (t, row.index(share.expert)) for t, row in enumerate(ids) if share.expert in row
            ]
            own = share.of(len(pairs), phase)
            for t, k in pairs[own.start : own.stop]:
                assert want[t][k] == -1, "an expert's token is one rank's"
                want[t][k] = rank
    ids_TK = torch.tensor(ids)
    assert _takers(ids_TK, bounds, phase).tolist() == want
    own = Range(num_tokens // 3, num_tokens)
    weights_TK = torch.rand(ids_TK.shape, generator=torch.Generator().manual_seed(seed))
    few, many = (
        found(ids_TK, weights_TK, own, bounds, phase) for found in (_few_choices, _choices)
    )
    assert few[2] == many[2]
    assert few[0].equal(many[0])
    assert few[1].equal(many[1])


def plan_of(spec: ModelSpec, experts: Dealing, *heads: tuple[int, ...]) -> ReplicaPlan:
    """A stage or two; in each, ranks with no heads have experts only."""
    stages = []
    layers = (Range(0, 1), Range(1, spec.num_layers)) if heads[1:] else (Range(0, spec.num_layers),)
    for held, own in zip(layers, heads, strict=True):
        split = split_by_weights(spec, [float(each) for each in own])
        split = replace(split, experts=(experts,))
        ranks = tuple(RankPlan(num_threads=1) for _ in own)
        stages.append(StagePlan(instances=(InstancePlan(layers=held, ranks=ranks, split=split),)))
    return ReplicaPlan(stages=tuple(stages), routes=default_routes(tuple(stages)))


EXPERTS_OF_3 = (
    (ExpertShare(0, 0, 30_000),),
    tuple(ExpertShare(expert) for expert in range(1, 5)),
    (ExpertShare(0, 30_000, WHOLE_SHARE),),
)


def test_only_ranks_with_hidden_states_are_sent_any(tmp_path: Path) -> None:
    spec = read_spec(tiny_checkpoint(tmp_path, CASES["mixtral"][0], 4, 2, **CASES["mixtral"][1]))
    replica = plan_of(spec, EXPERTS_OF_3, (2, 0, 1), (2, 0, 1))
    check(replica, spec)
    places = {each.name: each for each in (Place(replica, i, r) for i in (0, 1) for r in range(3))}
    served = {name for name, each in places.items() if not each.shard.has_stream}
    assert served == {"s0.i0.r1", "s1.i1.r1"}
    for name, place in places.items():
        taken = {*place.takers(0), *place.token_takers(0)}
        assert not taken & served
        if name in served:
            assert not taken
            assert not place.givers(0)
            assert not place.token_givers(0)
        for other in place.takers(0):
            assert places[other].givers(0) == (name,)
    assert places["s1.i1.r0"].token_takers(0) == ("s0.i0.r0", "s0.i0.r2")
    assert places["s0.i0.r2"].takers(0) == ("s1.i1.r2",)


def test_rank_0_has_hidden_states(tmp_path: Path) -> None:
    spec = read_spec(tiny_checkpoint(tmp_path, CASES["mixtral"][0], 4, 2, **CASES["mixtral"][1]))
    with pytest.raises(ConfigError, match="rank 0 has experts only"):
        check(plan_of(spec, EXPERTS_OF_3, (0, 1, 1), (1, 1, 1)), spec)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_an_engine_gives_the_tokens_of_one_device(checkpoint: Path, kernels: str) -> None:
    """Through two stages, and again after a Step that failed on a rank with experts only."""
    spec = read_spec(checkpoint)
    assert spec.experts is not None
    with engine(checkpoint, None, kernels) as (loop, client, _):
        want = tokens_of(loop, client, "alone")
    dealing = random_dealing(spec.experts.num_experts, 3, random.Random(1))
    replica = plan_of(spec, dealing, (2, 2, 0), (3, 0, 1))
    with engine(checkpoint, replica, kernels) as (loop, client, executor):
        assert tokens_of(loop, client, "shared") == want
        served = next(
            each._worker for each in executor._runners.values() if not each._worker.has_stream
        )
        serve, calls = served._decoder.serve, itertools.count(1)

        def fails_once(*arguments: Any) -> None:
            if next(calls) == 3:
                raise RuntimeError("the device said no")
            serve(*arguments)

        served._decoder.serve = fails_once
        assert tokens_of(loop, client, "after") == want
        assert next(calls) > 3


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("checkpoint", ["shared"], indirect=True)
def test_processes_give_the_tokens_of_one_device(checkpoint: Path, kernels: str) -> None:
    spec = read_spec(checkpoint)
    assert spec.experts is not None
    with engine(checkpoint, None, kernels) as (loop, client, _):
        want = tokens_of(loop, client, "alone")
    dealing = random_dealing(spec.experts.num_experts, 3, random.Random(2))
    replica = plan_of(spec, dealing, (3, 0, 1))
    with engine(checkpoint, replica, kernels, in_threads=False) as (loop, client, _):
        assert tokens_of(loop, client, "shared") == want


# ---- the two groups --------------------------------------------------------------------------


def two_groups(kind: str, size: int, streams: tuple[int, ...]) -> list[Any]:
    board, fd = Board(), group_memory(kind, size)

    def make(rank: int) -> Group | None:
        place = GroupPlace(
            kind=kind,
            rank=rank,
            size=size,
            streams=streams,
            sums=SumForm(),
            hidden_size=64,
            fd=None if fd is None else os.dup(fd),
            address="127.0.0.1",
            device="cpu",
        )
        return make_group(place, board.store())

    made = each_in_a_thread(make, range(size))
    if fd is not None:
        os.close(fd)
    return made


@pytest.mark.parametrize("streams", [(0,), (0, 2), (0, 1, 3)], ids=str)
@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_sums_of_some_and_exchanges_of_all(kind: str, streams: tuple[int, ...]) -> None:
    groups = two_groups(kind, 4, streams)
    assert all(isinstance(group, StreamGroup) for group in groups)

    def run(rank: int) -> None:
        group = groups[rank]
        for round_ in range(6):
            if rank in streams:
                total = torch.full((70_000,), float(rank))
                group.all_reduce(total)
                assert (total == sum(streams)).all()
                assert group.all_gather(torch.tensor([rank])).flatten().tolist() == list(streams)
            parts = [torch.full((to + round_, 2), float(rank)) for to in range(4)]
            for source, got in enumerate(group.all_to_all(parts)):
                assert got.shape == (rank + round_, 2)
                assert (got == source).all()

    assert each_in_a_thread(run, range(4)) == [None] * 4
    for group in groups:
        group.abort()
    for rank in range(4):
        with pytest.raises(CommError):
            groups[rank].all_to_all([torch.ones(1)] * 4)
    assert each_in_a_thread(lambda rank: groups[rank].reset(1), range(4)) == [None] * 4
    assert each_in_a_thread(run, range(4)) == [None] * 4
    away = next(rank for rank in range(4) if rank not in streams)
    with pytest.raises(CommError, match="experts only"):
        groups[away].all_reduce(torch.ones(1))
    for group in groups:
        group.close()
