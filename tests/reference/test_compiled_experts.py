"""The compiled CPU path on mixtures of experts, against plain torch and against one rank."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import reference_logits, reference_model
from compiled_chain import Chain, one_stage, random_split
from expert_models import MODELS, expert_checkpoint
from paging import Paged, open_decoder, run_mixed_steps, worst_difference
from test_compiled import ISAS, SESSIONS
from test_compiled_shards import worst

from shoal.core.options import EngineOptions
from shoal.core.split import WHOLE_SHARE, Dealing, ExpertShare, cut
from shoal.kernels import select
from shoal.kernels.cpu.step import Session
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.spec import read_spec
from shoal.worker.compute import choose_compute

TOLERANCE = 1e-3
OF_ONE_RANK = 1e-4
NAMES = sorted(name for name in MODELS if not name.startswith("deepseek"))
WIDE: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64}


def random_dealing(num_experts: int, num_ranks: int, rng: random.Random) -> Dealing:
    """Any rank has any experts; some have none, and some experts are on several ranks."""
    held: list[list[ExpertShare]] = [[] for _ in range(num_ranks)]
    for expert in range(num_experts):
        ranks = rng.sample(range(num_ranks), rng.randint(1, num_ranks))
        cuts = sorted(rng.sample(range(1, WHOLE_SHARE), len(ranks) - 1))
        for rank, start, stop in zip(ranks, [0, *cuts], [*cuts, WHOLE_SHARE], strict=True):
            held[rank].append(ExpertShare(expert, start, stop))
    return tuple(map(tuple, held))


def equal(ones: list[Paged], others: list[Paged]) -> bool:
    pairs = zip(ones, others, strict=True)
    return all(a.logits[each].equal(b.logits[each]) for a, b in pairs for each in a.logits)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(name: str, isa: str, tmp_path: Path) -> None:
    folder = expert_checkpoint(tmp_path, name)
    decoder = open_decoder(folder, kernels=SESSIONS[isa])
    assert isinstance(decoder, PackedDecoder)
    sequences = run_mixed_steps(decoder)
    model = reference_model(folder)
    expected = [reference_logits(model, sequence.token_ids) for sequence in sequences]
    assert worst_difference(sequences, expected) < TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
def test_groups_of_experts_and_a_scale(isa: str, tmp_path: Path) -> None:
    """As DeepSeek-V2 chooses, with plain attention; what is counted is what plain torch counts."""
    folder = expert_checkpoint(tmp_path, "qwen2", num_experts=8)
    rules = read_spec(folder).experts
    assert rules is not None
    rules = replace(rules, num_groups=4, num_active_groups=2, scale=2.5, renormalises=False)
    plain = open_decoder(folder, experts=rules)
    packed = open_decoder(folder, kernels=SESSIONS[isa], experts=rules)
    ungrouped = run_mixed_steps(open_decoder(folder, kernels=SESSIONS[isa]))
    expected, got = run_mixed_steps(plain), run_mixed_steps(packed)
    assert worst(expected, got) < OF_ONE_RANK
    assert worst(ungrouped, got) > 0.1
    assert plain.expert_counts is not None
    assert packed.expert_counts is not None
    assert plain.expert_counts.equal(packed.expert_counts)
    assert packed.expert_counts.sum(1).eq(100 * rules.num_active).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_weight_precision_is_that_of_the_reference(weights: str, isa: str, tmp_path: Path) -> None:
    """The same rounded weights in both; the compiled path also rounds what it multiplies.

    Another expert is chosen now and then where two are nearly alike: what most tokens get counts.
    """
    folder = expert_checkpoint(tmp_path, "qwen3", **WIDE)
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    asked: Any = "none" if weights == "bfloat16" else weights
    plain = open_decoder(folder, dtype, quantize=asked)
    packed = open_decoder(folder, dtype, kernels=SESSIONS[isa], quantize=asked)
    assert packed.precision == weights
    pairs = zip(run_mixed_steps(plain), run_mixed_steps(packed), strict=True)
    errors = [
        (logits - right.logits[position]).std() / logits.std()
        for left, right in pairs
        for position, logits in left.logits.items()
    ]
    assert torch.stack(errors).median() < 0.1


@pytest.mark.parametrize("asked", ["none", "int8", "int4"])
def test_a_row_does_not_depend_on_the_threads(asked: Any, tmp_path: Path) -> None:
    folder = expert_checkpoint(tmp_path, "qwen2", **WIDE)
    runs = [
        run_mixed_steps(open_decoder(folder, kernels=Session(threads), quantize=asked))
        for threads in (1, 2, 3)
    ]
    assert equal(runs[0], runs[1])
    assert equal(runs[0], runs[2])


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("name", ["qwen2-mixed", "qwen3", "olmoe-grouped"])
def test_any_dealing_gives_the_logits_of_one_rank(
    name: str, num_ranks: int, tmp_path: Path
) -> None:
    rng = random.Random(f"{name} {num_ranks}")
    folder = expert_checkpoint(tmp_path, name)
    spec = read_spec(folder)
    assert spec.experts is not None
    expected = run_mixed_steps(open_decoder(folder, kernels=Session(1)))
    dealings = tuple(
        random_dealing(spec.experts.num_experts, num_ranks, rng) if layer.has_experts else ()
        for layer in spec.layers
    )
    split = replace(random_split(spec, num_ranks, rng), experts=dealings)
    split = replace(split, vocab=cut(spec.vocab_size, [1.0] * num_ranks))  # all have a stream
    chain = Chain(folder, one_stage(spec, split), None)
    assert worst(expected, run_mixed_steps(chain)) < OF_ONE_RANK, split
    counted = [rank.expert_counts for rank in chain.ranks[0]]
    assert all(each is not None and each.equal(counted[0]) for each in counted)


def test_experts_are_dealt_anew_between_steps(tmp_path: Path) -> None:
    folder = expert_checkpoint(tmp_path, "qwen3")
    spec, rng = read_spec(folder), random.Random(3)
    assert spec.experts is not None
    expected = run_mixed_steps(open_decoder(folder, kernels=Session(1)))
    split = replace(
        random_split(spec, 2, rng),
        vocab=cut(spec.vocab_size, [1.0, 1.0]),
        experts=(random_dealing(spec.experts.num_experts, 2, rng),),
    )
    chain = Chain(folder, one_stage(spec, split), None)
    assert worst(expected, run_mixed_steps(chain)) < OF_ONE_RANK
    for layer in range(spec.num_layers):
        dealing = random_dealing(spec.experts.num_experts, 2, rng)
        for rank, shares in zip(chain.ranks[0], dealing, strict=True):
            rank.deal(layer, rank.load_experts(layer, shares), dealing)
    assert worst(expected, run_mixed_steps(chain)) < OF_ONE_RANK


def test_latent_attention_runs_on_plain_torch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = read_spec(expert_checkpoint(tmp_path, "deepseek"))
    compute = choose_compute(EngineOptions(model_path=""), spec, torch.device("cpu"))
    assert compute.kernels is select("reference")
    (record,) = caplog.records
    assert "latent" in record.message
