"""Plan files: what they say, what is refused and where, even plans, the table. No torch."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.errors import ConfigError
from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.core.options import EngineOptions
from shoal.core.plan import (
    Hop,
    InstancePlan,
    Plan,
    RankPlan,
    ReplicaPlan,
    Role,
    StagePlan,
    default_routes,
)
from shoal.core.split import Range, split_by_weights
from shoal.lab.file import read_lab
from shoal.plan_file import Parallelism, device_share, dump_plan, plan_table, read_plan
from shoal.plan_file.even import even_replicas, share_threads
from shoal.wire.messages import HostNet, Launch

SPEC = ModelSpec(
    architecture="test",
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_size=1536,
    vocab_size=49152,
    norm_eps=1e-5,
    layers=(LayerSpec(rope=RopeSpec()),) * 30,
    max_positions=8192,
    attention_scale=0.125,
    tied_embeddings=True,
)

FULL = """\
model: smollm2-135m
stages:
  - layers: 0-4
    devices: [cpu, cpu]
    split: {heads: [6, 3], ffn: [1024, 512]}
  - instances:
      - {layers: 4-21, devices: [cpu]}
      - {layers: 4 - 22, devices: [{device: cpu, threads: 1, host: b, speed: 0.3}]}
  - layers: 20-30
    devices: [cuda:1, cuda]
    split: [0.7, 0.3]
    kv_cache_memory: 2GiB
    quantize: int8
    dtype: bfloat16
"""


def read(text: str, folder: Path, spec: ModelSpec = SPEC, num_cuda: int | None = None) -> Plan:
    file = folder / "plan.yaml"
    file.write_text(text)
    return read_plan(file).resolve(spec, num_cuda=num_cuda)


def ranges(*pairs: tuple[int, int]) -> tuple[Range, ...]:
    return tuple(Range(*pair) for pair in pairs)


# --- what a file says ---


def test_a_full_plan(tmp_path: Path) -> None:
    plan = read(FULL, tmp_path)
    assert plan.model == "smollm2-135m"
    (replica,) = plan.replicas
    first, second, third, last = replica.instances
    assert [len(stage.instances) for stage in replica.stages] == [1, 2, 1]
    assert (first.layers, first.split.heads) == (Range(0, 4), ranges((0, 6), (6, 9)))
    assert first.split.ffn == ranges((0, 1024), (1024, 1536))
    assert first.split.vocab == ranges((0, 24576), (24576, 49152))
    assert second.ranks == (RankPlan(),)
    assert third.ranks == (RankPlan(device="cpu", num_threads=1, host="b", speed=0.3),)
    assert [rank.device for rank in last.ranks] == ["cuda:1", "cuda"]
    assert last.split == split_by_weights(SPEC, [0.7, 0.3], granule=32)
    assert (last.kv_cache_memory_bytes, last.quantize, last.dtype) == (2 << 30, "int8", "bfloat16")
    assert replica.routes == (
        (Hop(0, Range(0, 4)), Hop(1, Range(4, 21)), Hop(3, Range(21, 30))),
        (Hop(0, Range(0, 4)), Hop(2, Range(4, 22)), Hop(3, Range(22, 30))),
    )


def test_layers_left_out_are_shared_out_evenly(tmp_path: Path) -> None:
    plan = read(
        "stages: [{devices: cpu}, {devices: cpu}, {devices: cpu}, {devices: cpu}]", tmp_path
    )
    layers = [instance.layers for instance in plan.replicas[0].instances]
    assert layers == list(ranges((0, 8), (8, 15), (15, 22), (22, 30)))
    one = read('{"stages": [{"devices": ["cpu", "cpu", "cpu"]}]}', tmp_path).replicas[0]
    assert [len(each) for each in one.instances[0].split.heads] == [3, 3, 3]


def test_several_replicas(tmp_path: Path) -> None:
    one = "{stages: [{devices: [cpu, cpu], split: {weights: [2, 1], heads: [9, 0]}}]}"
    plan = read(f"replicas:\n  - {one}\n  - {{stages: [{{devices: cpu}}]}}\n", tmp_path)
    assert len(plan.replicas) == 2
    split = plan.replicas[0].instances[0].split
    assert split.heads == ranges((0, 9), (9, 9))
    assert split.ffn == split_by_weights(SPEC, [2, 1], granule=32).ffn


def test_named_routes(tmp_path: Path) -> None:
    stages = (
        "stages:\n"
        "  - instances: [{layers: 0-12, devices: cpu}, {layers: 0-10, devices: cpu}]\n"
        "  - {layers: 8-30, devices: cpu}\n"
    )
    plan = read(f"{stages}routes: [[1, 2]]", tmp_path)
    assert plan.replicas[0].routes == ((Hop(1, Range(0, 10)), Hop(2, Range(10, 30))),)
    route = "[{instance: 0, layers: 0-9}, {instance: 2, layers: 9-30}]"
    plan = read(f"{stages}routes: [{route}, [0, 2]]", tmp_path)
    assert plan.replicas[0].routes == (
        (Hop(0, Range(0, 9)), Hop(2, Range(9, 30))),
        (Hop(0, Range(0, 12)), Hop(2, Range(12, 30))),
    )


# --- what is refused, and where ---

STAGE = "stages: [{layers: 0-30, devices: [cpu, cpu], split: %s}]"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 0, "is empty"),
        ("stages: [", 1, "mend the YAML there"),
        ("- stages", 1, "the file is a list of 1; it must be a mapping with keys of model"),
        ("model: m", 1, "no key stages"),
        ("stages: []", 1, "stages is an empty list"),
        ("model: m\nstags: []", 2, "unknown key 'stags'; did you mean stages?"),
        ("colour: red", 1, "unknown key 'colour'; use one of model, max_num_seqs, replicas"),
        ("model: a\nmodel: b", 2, "model stands there twice (first in line 1); remove one"),
        ("stages:\n- &a {devices: cpu}\n- *a", 2, "anchors and aliases"),
        ("model: !!python/object/apply:os.system ['true']", 1, "tags (!) are not read"),
        ("model: " + "[" * 40 + "]" * 40, 1, "nested more than 16 deep"),
        ("replicas: [{stages: [{devices: cpu}]}]\nroutes: [[0]]", 2, "beside replicas"),
        ("stages:\n- layers: 0-30", 2, "no key devices; name one for each rank"),
        ("stages:\n- layers: 0-30\n  devices: [gpu]", 3, "device is 'gpu'; it must be cpu, cuda"),
        ("stages:\n- devices: [{host: a}]", 2, "no key device"),
        ("stages:\n- devices: [{device: cpu, spede: 1}]", 2, "did you mean speed?"),
        ("stages:\n- devices: [{device: cpu, speed: 2}]", 2, "speed is '2'; it must be a number"),
        ("stages:\n- devices: [{device: cpu, speed: .nan}]", 2, "speed is '.nan'"),
        ("stages:\n- devices: [{device: cpu, threads: 0}]", 2, "a whole number from 1 to 1024"),
        ("stages:\n- devices: [{device: cuda, threads: 2}]", 2, "threads are a CPU's"),
        ("stages:\n- layers: 30\n  devices: cpu", 2, "layers is '30'; it must be a range such as"),
        ("stages:\n- layers: 9-3\n  devices: cpu", 2, "layers is '9-3'"),
        ("stages:\n- layers: 0-31\n  devices: cpu", 2, "layers are 0-31; this model has 0-30"),
        ("stages:\n- {layers: 0-9, devices: cpu}\n- devices: cpu", 3, "names no layers"),
        (
            "stages:\n- {layers: 0-9, devices: cpu}\n- {layers: 10-30, devices: cpu}",
            3,
            "holds layers 10-30, and those before it end at 9: make it start at 9 or earlier",
        ),
        ("stages:\n- {layers: 0-29, devices: cpu}", 2, "ends at layer 29; this model has 30"),
        (
            "stages:\n- instances: [{devices: cpu}]\n  layers: 0-30",
            3,
            "layers stands beside instances",
        ),
        (STAGE % "[1, 1, 1]", 1, "weights has 3 numbers, but 2 devices are named"),
        (STAGE % "[0, 0]", 1, "all of split are 0"),
        (STAGE % "[1, x]", 1, "split is 'x'; it must be a number"),
        (STAGE % "{heads: [6, 4]}", 1, "heads are [6, 4], 10 in all; this model has 9 query heads"),
        (STAGE % "{heads: [6.5, 2.5]}", 1, "heads is '6.5'; it must be a whole number"),
        (STAGE % "{head: [6, 3]}", 1, "did you mean heads?"),
        (STAGE % "{ffn: [1000, 536]}", 1, "must end at a multiple of 32 FFN columns: give rank 0"),
        ("stages:\n- devices: cpu\n  kv_cache_memory: 1 potato", 3, "a size such as 512MiB"),
        ("stages:\n- devices: cpu\n  weights_memory: 2 Gib/s", 3, "a size such as 512MiB"),
        ("stages: [{devices: cpu}]\nrole: fast", 2, "it must be one of any, prefill, decode"),
        ("stages:\n- devices: cpu\n  quantize: int5", 3, "it must be one of auto, none, int8"),
        ("stages:\n- devices: cpu\n  dtype: bfloat61", 3, "(bfloat16?)"),
        ("stages: [{devices: cpu}]\nroutes: [[1]]", 2, "names instance 1; the plan has 0-0"),
        ("stages: [{devices: cpu}]\nroutes: [[a]]", 2, "an instance of a route is 'a'"),
        ("stages: [{devices: cpu}, {devices: cpu}]\nroutes:\n- [0]", 3, "ends at layer 15"),
        (
            "stages: [{devices: cpu}, {devices: cpu}]\nroutes:\n- [1, 0]",
            3,
            "instance 1 holds layers 15-30, and those before it end at 0",
        ),
        ("stages: [{devices: cpu}]\nroutes: [[{layers: 0-30}]]", 2, "no key instance"),
        ("stages:\n- devices: cpu\n- devices: [cuda:1]", 3, "device cuda:1 is not there; this"),
    ],
)
def test_errors_name_line_and_remedy(text: str, line: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as raised:
        read(text, tmp_path, num_cuda=1)
    where = f"{tmp_path / 'plan.yaml'}:{line}: " if line else str(tmp_path / "plan.yaml")
    assert str(raised.value).startswith(where)


def test_a_plan_that_is_not_there_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_plan(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="larger than"):
        read(f"model: {'m' * (1 << 20)}", tmp_path)


def test_chains_of_instances_are_bounded(tmp_path: Path) -> None:
    instances = ", ".join(["{devices: cpu, layers: 0-30}"] * 20)
    stage = f"{{instances: [{instances}]}}"
    with pytest.raises(ConfigError, match="8000 chains of instances; 256 at most"):
        read(f"stages: [{stage}, {stage}, {stage}]", tmp_path)


# --- there and back ---


@st.composite
def replicas(draw: st.DrawFn) -> ReplicaPlan:
    stages: list[StagePlan] = []
    done = 0
    num_stages = draw(st.integers(1, 4))
    for index in range(num_stages):
        stop = SPEC.num_layers if index == num_stages - 1 else draw(st.integers(done, 30))
        instances = []
        for _ in range(draw(st.integers(1, 3))):
            start = draw(st.integers(max(0, done - 3), done)) if index else 0
            num_ranks = draw(st.integers(1, 4))
            weights = draw(st.lists(st.floats(0.1, 4), min_size=num_ranks, max_size=num_ranks))
            rank = st.builds(
                RankPlan,
                device=st.just("cpu"),
                host=st.sampled_from([None, "a", "no", "1"]),
                num_threads=st.one_of(st.none(), st.integers(1, 8)),
                speed=st.sampled_from([1.0, 0.3, 0.001]),
            )
            instances.append(
                InstancePlan(
                    layers=Range(start, stop),
                    ranks=tuple(draw(rank) for _ in range(num_ranks)),
                    split=split_by_weights(SPEC, weights, granule=32),
                    kv_cache_memory_bytes=draw(st.sampled_from([None, 1, 3 << 20, 1 << 34])),
                    weights_memory_bytes=draw(st.sampled_from([None, 7, 1 << 30])),
                    quantize=draw(st.sampled_from([None, "int4"])),
                    dtype=draw(st.sampled_from([None, "float32"])),
                )
            )
        stages.append(StagePlan(instances=tuple(instances)))
        done = stop
    routes = default_routes(tuple(stages))
    kept = draw(st.integers(1, len(routes)))
    role: Role = draw(st.sampled_from(get_args(Role)))
    return ReplicaPlan(stages=tuple(stages), routes=routes[:kept], role=role)


@settings(deadline=None, max_examples=60)
@given(
    plan=st.builds(
        Plan,
        replicas=st.lists(replicas(), min_size=1, max_size=3).map(tuple),
        model=st.sampled_from([None, "m", "org/name:Q4_K_M", "./a b.gguf", "yes", "12"]),
    )
)
def test_what_is_written_reads_the_same(
    plan: Plan, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert read(dump_plan(plan), tmp_path_factory.mktemp("plans")) == plan


def test_a_plan_crosses_to_an_engine_process(tmp_path: Path) -> None:
    launch = Launch(
        EngineOptions(model_path="m"),
        read(FULL, tmp_path).replicas[0],
        {"b": HostNet(("run",), "10.0.0.1")},
    )
    sent = msgspec.msgpack.encode(launch)
    assert msgspec.msgpack.decode(sent, type=Launch) == launch


# --- from flags ---


def even(num_cuda: int = 0, device: str = "auto", **sizes: int) -> tuple[ReplicaPlan, ...]:
    named = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    return even_replicas(
        SPEC, **{**named, **sizes}, kv_split="tokens", device=device, num_cuda=num_cuda
    )


def devices_of(replica: ReplicaPlan) -> list[str]:
    return [rank.device for instance in replica.instances for rank in instance.ranks]


def test_even_parts_need_not_divide() -> None:
    (replica,) = even(tensor_parallel_size=2, pipeline_parallel_size=4)
    assert [instance.layers for instance in replica.instances] == list(
        ranges((0, 8), (8, 15), (15, 22), (22, 30))
    )
    assert {len(each) for each in replica.instances[0].split.heads} == {4, 5}
    assert devices_of(replica) == ["cpu"] * 8


def test_gpus_are_taken_if_there_are_enough() -> None:
    assert devices_of(even(2, tensor_parallel_size=2)[0]) == ["cuda:0", "cuda:1"]
    assert devices_of(even(1, tensor_parallel_size=2)[0]) == ["cpu", "cpu"]
    assert devices_of(even(2, "cpu", tensor_parallel_size=2)[0]) == ["cpu", "cpu"]
    four = even(4, tensor_parallel_size=2, data_parallel_size=2)
    assert [devices_of(each) for each in four] == [["cuda:0", "cuda:1"], ["cuda:2", "cuda:3"]]
    assert device_share(four) == 1.0
    assert device_share(even(2, tensor_parallel_size=2, data_parallel_size=2)) == 0.5
    assert device_share(even(tensor_parallel_size=2, data_parallel_size=3)) == 1 / 3


@pytest.mark.parametrize(
    ("sizes", "device", "words"),
    [
        ({"tensor_parallel_size": 65}, "auto", "--tensor-parallel-size is 65; at most 64"),
        ({"pipeline_parallel_size": 31}, "auto", "this model has 30 layers"),
        ({"tensor_parallel_size": 2}, "cuda", "2 ranks need 2 GPUs; this machine has no usable"),
        ({"tensor_parallel_size": 2}, "cuda:0", "is one device for 2 ranks"),
    ],
)
def test_sizes_that_make_no_sense(sizes: dict[str, int], device: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        even(0, device, **sizes)


def test_flags_beside_a_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("stages: [{devices: cpu}]")
    file = read_plan(tmp_path / "plan.yaml")
    assert Parallelism().is_plain
    assert not Parallelism(file=file).is_plain
    with pytest.raises(ConfigError, match="--tensor-parallel-size 2 stands beside --plan"):
        Parallelism(file=file, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="--device cpu stands beside --plan"):
        Parallelism(file=file, device="cpu")
    with pytest.raises(ConfigError, match="--pipeline-parallel-size is 0"):
        Parallelism(pipeline_parallel_size=0)


def test_threads_are_shared_by_those_that_name_none() -> None:
    def threads(num_cpus: int, *named: int | None, num_threads: int | None = None) -> list[int]:
        (replica,) = even(tensor_parallel_size=len(named))
        (instance,) = replica.instances
        ranks = tuple(
            replace(rank, num_threads=each)
            for rank, each in zip(instance.ranks, named, strict=True)
        )
        stage = StagePlan(instances=(replace(instance, ranks=ranks),))
        (done,) = share_threads([replace(replica, stages=(stage,))], num_cpus, num_threads)
        return [rank.num_threads or 0 for rank in done.instances[0].ranks]

    assert threads(2, None, None) == [1, 1]
    assert threads(2, None, None, None) == [1, 1, 1]
    assert sorted(threads(8, None, None, None)) == [2, 3, 3]
    assert threads(8, 6, None, None) == [6, 1, 1]
    assert threads(8, 5, 1) == [5, 1]
    assert threads(8, None, None, num_threads=4) == [2, 2]
    many = share_threads(even(tensor_parallel_size=2, data_parallel_size=2), 8)
    assert {rank.num_threads for each in many for rank in each.instances[0].ranks} == {2}


# --- for people ---


def test_the_table_shows_every_worker(tmp_path: Path) -> None:
    plan = read(FULL, tmp_path)
    lines = plan_table(plan.replicas)
    assert lines[0] == "plan       1 replica, 3 stages, 2 routes, 6 workers"
    assert lines[4].split() == ["s1.i1.r0", "cpu", "4-21", "0-9", "0-1536", "-"]
    assert " ".join(lines[5].split()) == "s1.i2.r0 cpu 1 thread on b at 0.3 4-22 0-9 0-1536 -"
    assert len(lines) == 8
    assert len(plan_table(plan.replicas * 3)) == 8
    other = even(tensor_parallel_size=2)
    assert plan_table((*plan.replicas, *other))[-1].split()[:2] == ["1:", "s0.i0.r1"]


def test_plans_in_the_documents_are_plans(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    found = 0
    for document in (root / "README.md", root / "docs" / "parallelism.md"):
        text = document.read_text("utf-8")
        for block in re.findall(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            if block.startswith("# lab.yaml"):
                (tmp_path / "lab.yaml").write_text(block)
                lab = read_lab(tmp_path / "lab.yaml")
                assert lab.hosts
                assert lab.plan is None or lab.plan.resolve(SPEC)
            else:
                assert read(block, tmp_path).model == "smollm2-135m"
            found += 1
    assert found == 4
