"""The compiled CPU path with ranks that have experts only, and who chooses where ranks differ."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_chain import Chain, load_rank, one_stage, random_ranges
from expert_models import expert_checkpoint
from paging import open_decoder, run_mixed_steps
from test_compiled import ISAS
from test_compiled_experts import equal, random_dealing
from test_compiled_shards import worst
from thread_engine import engine, tokens_of
from torch import Tensor

from shoal.core.errors import CommError
from shoal.core.model_spec import ModelSpec
from shoal.core.options import EngineOptions
from shoal.core.plan import InstancePlan, RankPlan, ReplicaPlan, StagePlan, default_routes
from shoal.core.split import WHOLE_SHARE, Dealing, ExpertShare, Range, Split, shards
from shoal.kernels.cpu.step import HostBatch, Session
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.spec import read_spec
from shoal.worker.compute import Compute, choose_compute
from shoal.worker.device import DeviceChoice
from shoal.worker.groups import groups_in_threads
from shoal.worker.kv_pool import allocate

CPU = torch.device("cpu")
OF_ONE_RANK = 1e-4


def split_of(spec: ModelSpec, streams: Sequence[bool], rng: random.Random) -> Split:
    """Random, with hidden states on some ranks; the others have experts only."""
    assert spec.experts is not None
    num_experts = spec.experts.num_experts

    def parts(total: int, least: int) -> tuple[Range, ...]:
        cut = iter(random_ranges(total - least * sum(streams), sum(streams), rng))
        sizes = [len(next(cut)) + least if each else 0 for each in streams]
        return tuple(Range(sum(sizes[:rank]), sum(sizes[: rank + 1])) for rank in range(len(sizes)))

    return Split(
        heads=parts(spec.num_heads, 0),
        ffn=parts(spec.ffn_size, 0),
        vocab=parts(spec.vocab_size, 1),
        experts=tuple(
            random_dealing(num_experts, len(streams), rng) if layer.has_experts else ()
            for layer in spec.layers
        ),
    )


@pytest.mark.parametrize("streams", ["s.", "s..", "s.s", "s.s.", "ss.s"])
@pytest.mark.parametrize("name", ["qwen2-mixed", "qwen3-mixed", "olmoe-grouped"])
def test_any_dealing_gives_the_logits_of_one_rank(name: str, streams: str, tmp_path: Path) -> None:
    """Also to the bit, whatever the threads; and a second time."""
    folder = expert_checkpoint(tmp_path, name)
    spec, rng = read_spec(folder), random.Random(f"{name} {streams}")
    split = split_of(spec, [each == "s" for each in streams], rng)
    assert len(split.streams) == streams.count("s")
    expected = run_mixed_steps(open_decoder(folder, kernels=Session(1)))
    chain = Chain(folder, one_stage(spec, split), rng.choice(ISAS))
    got = run_mixed_steps(chain)
    assert worst(expected, got) < OF_ONE_RANK, split
    assert equal(got, run_mixed_steps(chain))
    counted = [rank.expert_counts for rank in chain.ranks[0] if rank.shard.has_stream]
    assert all(each is not None and each.equal(counted[0]) for each in counted)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_experts_give_the_bits_of_one_rank(weights: Any, tmp_path: Path) -> None:
    """All experts elsewhere, each whole: the sums are the same ones."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64}
    folder = expert_checkpoint(tmp_path, "qwen3", **sizes)
    spec = read_spec(folder)
    assert spec.experts is not None
    away = tuple(ExpertShare(expert) for expert in range(spec.experts.num_experts))
    split = replace(split_of(spec, [True, False], random.Random(1)), experts=(((), away),))
    expected = run_mixed_steps(open_decoder(folder, kernels=Session(2), quantize=weights))
    chain = Chain(folder, one_stage(spec, split), None, quantize=weights)
    assert equal(expected, run_mixed_steps(chain))


def test_experts_are_dealt_anew_between_steps(tmp_path: Path) -> None:
    """To and from ranks with experts only, which may have none for a while."""
    folder = expert_checkpoint(tmp_path, "qwen3")
    spec, rng = read_spec(folder), random.Random(3)
    assert spec.experts is not None
    num_experts = spec.experts.num_experts
    everything = tuple(ExpertShare(expert) for expert in range(num_experts))
    expected = run_mixed_steps(open_decoder(folder, kernels=Session(1)))
    split = split_of(spec, [True, False, True, False], rng)
    chain = Chain(folder, one_stage(spec, split), None)
    dealings: list[Dealing] = [((), (), everything, ()), ((), everything, (), ())]
    dealings += [random_dealing(num_experts, 4, rng) for _ in range(2)]
    for dealing in dealings:
        for layer in range(spec.num_layers):
            for rank, shares in zip(chain.ranks[0], dealing, strict=True):
                rank.deal(layer, rank.load_experts(layer, shares), dealing)
        assert worst(expected, run_mixed_steps(chain)) < OF_ONE_RANK, dealing


def test_one_rank_chooses_where_ranks_differ(tmp_path: Path) -> None:
    """The second rank's scores are others; by itself it would run other experts."""
    folder = expert_checkpoint(tmp_path, "qwen3")
    spec, rng = read_spec(folder), random.Random(4)
    expected = run_mixed_steps(open_decoder(folder, kernels=Session(1)))
    chain = Chain(folder, one_stage(spec, split_of(spec, [True, True, False], rng)), None)
    for layer in chain.ranks[0][1]._experts:
        assert layer is not None
        layer.router_XE.copy_(torch.randn_like(layer.router_XE))
    compare(chain, "alike", "alike", "another")
    assert worst(expected, run_mixed_steps(chain)) > 100 * OF_ONE_RANK
    compare(chain, "alike", "another", "alike")
    assert worst(expected, run_mixed_steps(chain)) < OF_ONE_RANK


def test_what_ranks_say_they_compute_with(tmp_path: Path) -> None:
    """The compiled kernels choose alike everywhere; in torch, threads may change the last bit."""
    spec = read_spec(expert_checkpoint(tmp_path, "qwen3"))

    def says(label: str, **options: Any) -> str:
        compute = choose_compute(EngineOptions(model_path="", **options), spec, CPU)
        return compute.arithmetic_on(DeviceChoice(CPU, label))

    assert says("2 threads") == says("3 threads", num_threads=1, dtype="float32")
    plain = says("2 threads", kernels="reference")
    assert plain == says("2 threads", kernels="reference")
    others = [
        says("2 threads"),
        says("3 threads", kernels="reference"),
        says("2 threads", kernels="reference", dtype="float16"),
    ]
    assert plain not in others


def test_an_engine_compares_its_ranks_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any Step; the tokens are those of one device."""
    folder = expert_checkpoint(tmp_path, "qwen3")
    spec, numbers = read_spec(folder), itertools.count()
    with engine(folder, None, "cpu") as (loop, client, _):
        want = tokens_of(loop, client, "alone")
    split = split_of(spec, [True, True, False], random.Random(5))
    first, last = (tuple(map(ExpertShare, experts)) for experts in ((0, 1), (3, 4, 5, 6)))
    dealing = (first, (ExpertShare(2, 0, 20_000),), (ExpertShare(2, 20_000), *last))
    split = replace(split, experts=(dealing,))
    ranks = tuple(RankPlan(num_threads=1) for _ in range(3))
    instance = InstancePlan(layers=Range(0, spec.num_layers), ranks=ranks, split=split)
    stages = (StagePlan(instances=(instance,)),)
    replica = ReplicaPlan(stages=stages, routes=default_routes(stages))
    for differ in (False, True):
        if differ:
            monkeypatch.setattr(Compute, "arithmetic_on", lambda *_: f"kind {next(numbers)}")
        with engine(folder, replica, "cpu") as (loop, client, executor):
            assert tokens_of(loop, client, f"together {differ}") == want
            decoders = [each._worker._decoder for each in executor._runners.values()]
            assert [each._mixture._choice.is_shared for each in decoders] == [differ, differ, False]


def compare(chain: Chain, *arithmetic: str) -> None:
    ranks = chain.ranks[0]
    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(lambda rank, each: rank.compare(each), ranks, arithmetic))


class _Failing:
    """A group that fails at its exchange number `fails_at`."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.fails_at = self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        self.num_calls += 1
        if self.num_calls == self.fails_at:
            self._group.abort()
        arrived: list[Tensor] = self._group.all_to_all(parts)
        return arrived


@pytest.mark.parametrize("failing", [0, 2], ids=["with hidden states", "with experts only"])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_failed_exchange_ends_the_step_and_the_next_is_right(
    num_threads: int, failing: int, tmp_path: Path
) -> None:
    spec = read_spec(expert_checkpoint(tmp_path, "qwen3"))
    split = split_of(spec, [True, True, False], random.Random(1))
    assert split.streams == (0, 1)
    groups = [_Failing(group) for group in groups_in_threads(3, split.streams)]
    held = shards(split, Range(0, spec.num_layers), has_embedding=True, has_head=True)
    ranks = [
        load_rank(tmp_path, spec, shard, group, Session(num_threads))  # type: ignore[arg-type]
        for shard, group in zip(held, groups, strict=True)
    ]
    expected = logits_of(ranks)
    num_exchanges = 2 * spec.num_layers
    assert [group.num_calls for group in groups] == [num_exchanges] * 3
    for number in range(1, num_exchanges + 1):
        for group in groups:
            group.num_calls = 0
        groups[failing].fails_at = number
        with pytest.raises(CommError, match="aborted"):
            logits_of(ranks)
        groups[failing].fails_at = 0
        for group in groups:
            group.reset(number)
        assert logits_of(ranks).equal(expected)


def logits_of(ranks: Sequence[PackedDecoder]) -> Tensor:
    """Of a step on all ranks; waits for all of them before it raises."""
    lengths, tables = array("q", [3, 2]), [array("q", [2]), array("q", [1])]
    batch, samples = HostBatch(lengths, lengths, tables), array("q", [2, 4])

    def run(rank: PackedDecoder) -> Tensor:
        kv = allocate(rank.spec, rank.shard, 4, torch.float32, rank.device).cache
        try:
            if rank.shard.has_stream:
                return rank.step(array("q", [5, 60, 7, 120, 9]), batch, kv, samples).logits_NV
            rank.serve()
            return torch.empty(2, 0)
        except CommError:
            assert rank._group is not None
            rank._group.abort()  # as a worker does
            raise

    with ThreadPoolExecutor(len(ranks)) as pool:
        return torch.cat([each.result() for each in [pool.submit(run, rank) for rank in ranks]], 1)


def test_tokens_of_others_are_all_served(tmp_path: Path) -> None:
    """What is sent is for this rank, though its share of an expert be small; none may be held."""
    spec = read_spec(expert_checkpoint(tmp_path, "qwen3"))
    assert spec.experts is not None
    num_experts, active = spec.experts.num_experts, spec.experts.num_active
    third = ((ExpertShare(0, 0, 9), ExpertShare(2)), (ExpertShare(0, 9, WHOLE_SHARE),))
    split = replace(split_of(spec, [True, False], random.Random(1)), experts=(third[::-1],))
    held = shards(split, Range(0, spec.num_layers), has_embedding=True, has_head=True)
    group = groups_in_threads(2, split.streams)[1]
    session = Session(2)
    rank = load_rank(tmp_path, spec, held[1], group, session)
    x_NE = torch.randn(5, spec.hidden_size, generator=torch.Generator().manual_seed(1))
    ids_NK = torch.full((5, active), num_experts)
    weights_NK = torch.zeros(5, active)
    ids_NK[:4, 1], weights_NK[:4, 1] = 0, 1.0
    ids_NK[0, 0], weights_NK[0, 0] = 2, 0.5
    run = [session.experts(rank._model, 0, x_NE, ids_NK, weights_NK).clone()]
    for n in range(5):
        one = slice(n, n + 1)
        alone = session.experts(rank._model, 0, x_NE[one], ids_NK[one], weights_NK[one])
        assert alone.equal(run[0][one])
    assert run[0][:4].abs().amax(1).min() > 0
    assert not run[0][4].any()
    zeros = torch.full_like(ids_NK, num_experts)
    assert not session.experts(rank._model, 0, x_NE, zeros, weights_NK).any()
