"""Plan files that say who has which experts: what they mean, what is refused. No torch."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.errors import ConfigError
from shoal.core.model_spec import ExpertsSpec, LayerSpec, ModelSpec, RopeSpec
from shoal.core.plan import InstancePlan, Plan, RankPlan, ReplicaPlan, StagePlan, check
from shoal.core.plan import default_routes as routes_of
from shoal.core.split import WHOLE_SHARE, Dealing, ExpertShare, Range, split_by_weights
from shoal.plan_file import dump_plan, plan_table, read_plan
from shoal.policy.dealing import dealing_of

HALF = WHOLE_SHARE // 2
LAYERS = (LayerSpec(rope=RopeSpec()), *(LayerSpec(rope=RopeSpec(), has_experts=True),) * 3)
SPEC = ModelSpec(
    architecture="test",
    num_layers=4,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=128,
    vocab_size=320,
    norm_eps=1e-5,
    layers=LAYERS,
    max_positions=128,
    attention_scale=0.25,
    tied_embeddings=True,
    experts=ExpertsSpec(num_experts=8, num_active=2, ffn_size=32),
)
STAGE = "stages:\n- devices: [cpu, cpu]\n  split: {experts: %s}"


def read(text: str, folder: Path, spec: ModelSpec = SPEC) -> Plan:
    (folder / "plan.yaml").write_text(text)
    return read_plan(folder / "plan.yaml").resolve(spec)


def experts(text: str, folder: Path, num_ranks: int = 2) -> tuple[Dealing, ...]:
    stage = STAGE.replace("cpu, cpu", ", ".join(["cpu"] * num_ranks))
    return read(stage % text, folder).replicas[0].instances[0].split.experts


def whole(*numbers: int) -> tuple[ExpertShare, ...]:
    return tuple(ExpertShare(each) for each in numbers)


def test_sizes_lists_parts_and_layers(tmp_path: Path) -> None:
    assert experts("[6, 2]", tmp_path) == ((whole(*range(6)), whole(6, 7)),)
    assert experts("[[], [0-8]]", tmp_path) == (((), whole(*range(8))),)
    assert experts("[[7, 0-3, 6*0.5], [6*0.5, 3-6]]", tmp_path) == (
        (
            (*whole(0, 1, 2), ExpertShare(6, 0, HALF), *whole(7)),
            (*whole(3, 4, 5), ExpertShare(6, HALF, WHOLE_SHARE)),
        ),
    )
    thirds = experts("[[0-7, 7*0.333], [7*0.333], [7*0.333]]", tmp_path, 3)[0]
    assert [rank[-1].stop for rank in thirds] == [21823, 43647, WHOLE_SHARE]
    by_layers = experts("{0-2: [8, 0], 3-4: [0, 8]}", tmp_path)
    eight = whole(*range(8))
    assert by_layers == ((), (eight, ()), (whole(*range(4)), whole(4, 5, 6, 7)), ((), eight))


def test_weights_deal_experts_too(tmp_path: Path) -> None:
    plan = read("stages: [{devices: [cpu, cpu], split: [3, 1]}]", tmp_path)
    assert plan.replicas[0].instances[0].split.experts == ((whole(*range(6)), whole(6, 7)),)


def test_kv_by_tokens(tmp_path: Path) -> None:
    plan = read("stages: [{devices: [cpu, cpu], split: {kv: tokens}}]", tmp_path)
    assert plan.replicas[0].instances[0].split.kv == "tokens"
    assert read(dump_plan(plan), tmp_path) == plan
    with pytest.raises(ConfigError, match="kv is 'token'; it must be one of heads, tokens"):
        read("stages: [{devices: [cpu, cpu], split: {kv: token}}]", tmp_path)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[6, 3]", 3, "experts are [6, 3], 9 in all; this model has 8"),
        ("[8]", 3, "experts are dealt to 1 ranks, but 2 devices are named"),
        ("[[0-8], [9]]", 3, "expert 9 is dealt; this model has 0 to 7"),
        ("[[0-7], []]", 3, "expert 7 is dealt for 0 of its tokens; let the parts"),
        ("[[0-8], [3]]", 3, "expert 3 is dealt for 2 of its tokens by then"),
        ("[[0-8, 6*0.5], []]", 3, "expert 6 is dealt for 1.5 of its tokens by then"),
        ("[[0-7, 7*0.25], [7*0.5]]", 3, "expert 7 is dealt for 0.75 of its tokens"),
        ("[[0-7, 7*0.5, 7*0.5], []]", 3, "expert 7 stands twice in one list"),
        ("[[0-7, 7*1.5], []]", 3, "1.5 of an expert's tokens; give a part above 0, 1 at most"),
        ("[[0-7, 7*1.2.3], []]", 3, "experts is '7*1.2.3'; it must be an expert (7)"),
        ("[[0-7, x], []]", 3, "experts is 'x'; it must be an expert (7)"),
        ("[[5-2], []]", 3, "it must be a range such as 4-21"),
        ("[6, [2]]", 3, "experts is '6'; it must be a list"),
        ("{1-5: [6, 2]}", 3, "layers 1-5 are dealt here, but the instance holds 0-4"),
        ("{all: [6, 2]}", 3, "'all' are no layers; write a range such as 4-21"),
        ("{1-3:\n    [6, 3]}", 4, "experts are [6, 3]"),
    ],
)
def test_errors_name_line_and_remedy(text: str, line: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as raised:
        experts(text, tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'plan.yaml'}:{line}: ")


def test_a_model_without_experts_takes_none(tmp_path: Path) -> None:
    dense = replace(SPEC, experts=None, layers=LAYERS[:1] * 4)
    with pytest.raises(ConfigError, match="yaml:3: this model has no experts; remove the key"):
        read(STAGE % "[6, 2]", tmp_path, dense)


def test_shares_follow_each_other_in_the_order_of_ranks() -> None:
    split = split_by_weights(SPEC, [1.0, 1.0])
    crossed: Dealing = (
        (*whole(*range(7)), ExpertShare(7, HALF, WHOLE_SHARE)),
        (ExpertShare(7, 0, HALF),),
    )
    stage = StagePlan(
        instances=(
            InstancePlan(
                layers=Range(0, 4),
                ranks=(RankPlan(), RankPlan()),
                split=replace(split, experts=(crossed,)),
            ),
        )
    )
    with pytest.raises(ConfigError, match=r"expert 7 goes from 32768 to 65536; those before it"):
        check(ReplicaPlan(stages=(stage,), routes=routes_of((stage,))), SPEC)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    num_ranks = draw(st.integers(2, 4))

    def dealing() -> Dealing:
        parts = []
        for _ in range(8):
            cuts = draw(st.lists(st.integers(0, WHOLE_SHARE), max_size=2))
            ends = [0, *sorted(cuts), WHOLE_SHARE]
            shares = [0] * num_ranks
            for start, stop in itertools.pairwise(ends):
                shares[draw(st.integers(0, num_ranks - 1))] += stop - start
            parts.append(shares)
        return dealing_of(parts)

    one = draw(st.booleans())
    dealings = (dealing(),) if one else ((), *(dealing() for _ in range(3)))
    split = replace(split_by_weights(SPEC, [1.0] * num_ranks, granule=32), experts=dealings)
    instance = InstancePlan(layers=Range(0, 4), ranks=(RankPlan(),) * num_ranks, split=split)
    stages = (StagePlan(instances=(instance,)),)
    return Plan(replicas=(ReplicaPlan(stages=stages, routes=routes_of(stages)),))


@settings(deadline=None, max_examples=40)
@given(plans())
def test_what_is_written_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, plan: Plan
) -> None:
    assert read(dump_plan(plan), tmp_path_factory.mktemp("plans")) == plan


def test_the_table_counts_experts(tmp_path: Path) -> None:
    plan = read(STAGE % "{1-3: [8, 0], 3-4: [3, 5]}", tmp_path)
    head, *rows = plan_table(plan.replicas)[1:]
    assert head.split()[-1] == "experts"
    assert rows[0].endswith("0 to 8")
    assert rows[1].endswith("0 to 5")
    assert read(STAGE % "[5, 3]", tmp_path)
    assert plan_table(read(STAGE % "[5, 3]", tmp_path).replicas)[2].split()[-1] == "5"
