"""Commands for other engines: what would not run is not printed without a comment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoal.core.cluster import Precision
from shoal.core.plan import Plan
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.plan_file import read_plan
from shoal.planner.engines import emit

SPEC = read_spec(shape_folder("llama-3.1-8b"))  # 32 heads, 8 of KV
ENGINES = ("vllm", "sglang", "llama.cpp")


def plan_of(folder: Path, text: str) -> Plan:
    path = folder / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return read_plan(path).resolve(SPEC)


def command(lines: list[str]) -> str:
    return next(each for each in reversed(lines) if not each.startswith("#"))


def flag(line: str, name: str) -> str:
    found = re.search(rf"{name}[ =](\S+)", line)
    assert found is not None, f"no {name} in {line}"
    return found[1]


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_ranks_among_which_heads_cannot_be_shared_are_fewer(tmp_path: Path, engine: str) -> None:
    plan = plan_of(tmp_path, "stages: [{devices: [cuda:0, cuda:1, cuda:2]}]")
    lines = emit(plan, engine, "m", SPEC)
    line = command(lines)
    width = flag(line, "--tensor-parallel-size" if engine == "vllm" else "--tp-size")
    assert width == "2" and line.startswith("CUDA_VISIBLE_DEVICES=0,1 ")
    assert any("32 heads, 8 of KV" in each and "3 ranks" in each for each in lines)


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_stages_of_unlike_width_see_as_many_devices_as_they_are_told(
    tmp_path: Path, engine: str
) -> None:
    plan = plan_of(
        tmp_path,
        "stages: [{layers: 0-20, devices: [cuda:0, cuda:1]}, {layers: 20-32, devices: [cuda:2]}]",
    )
    line = command(emit(plan, engine, "m", SPEC))
    width = flag(line, "--tensor-parallel-size" if engine == "vllm" else "--tp-size")
    depth = flag(line, "--pipeline-parallel-size" if engine == "vllm" else "--pp-size")
    assert (width, depth) == ("1", "2") and flag(line, "CUDA_VISIBLE_DEVICES") == "0,2"
    assert flag(line, "PP_LAYER_PARTITION") == "20,12"


@pytest.mark.parametrize("engine", ENGINES)
def test_stages_on_cpus_are_counted_nowhere_and_said(tmp_path: Path, engine: str) -> None:
    stages = "{layers: 0-8, devices: [cpu]}, {layers: 8-20, devices: [cuda:0]}"
    plan = plan_of(tmp_path, f"stages: [{stages}, {{layers: 20-32, devices: [cuda:1]}}]")
    lines = emit(plan, engine, "m", SPEC)
    line = command(lines)
    assert flag(line, "CUDA_VISIBLE_DEVICES") == "0,1"
    assert any("CPUs" in each for each in lines if each.startswith("#"))
    if engine == "llama.cpp":
        assert flag(line, "-ngl") == "24" and flag(line, "--tensor-split") == "12.00,12.00"
        return
    depth = flag(line, "--pipeline-parallel-size" if engine == "vllm" else "--pp-size")
    assert depth == "2" and flag(line, "PP_LAYER_PARTITION") == "16,16"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_group_of_a_gpu_and_a_cpu_is_the_gpu(tmp_path: Path, engine: str) -> None:
    plan = plan_of(tmp_path, "stages: [{devices: [cuda:0, cpu], split: [0.75, 0.25]}]")
    lines = emit(plan, engine, "m", SPEC)
    line = command(lines)
    assert flag(line, "CUDA_VISIBLE_DEVICES") == "0"
    assert any("CPUs" in each for each in lines if each.startswith("#"))
    if engine == "llama.cpp":
        assert flag(line, "-ngl") == "24" and flag(line, "--tensor-split") == "24.00"
    else:
        width = flag(line, "--tensor-parallel-size" if engine == "vllm" else "--tp-size")
        assert width == "1" and "build for CPUs" not in " ".join(lines)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plan_of_cpus_only(tmp_path: Path, engine: str) -> None:
    lines = emit(plan_of(tmp_path, "stages: [{devices: [cpu]}]"), engine, "m", SPEC)
    line = command(lines)
    assert line.startswith("CUDA_VISIBLE_DEVICES= ")
    if engine == "llama.cpp":
        assert flag(line, "-ngl") == "0" and "--tensor-split" not in line
    else:
        assert any("build for CPUs" in each for each in lines)
        assert "PARTITION" not in line


@pytest.mark.parametrize(("model", "file"), [("m", "m.gguf"), ("a/x.gguf", "a/x.gguf")])
def test_a_gguf_file_is_one(tmp_path: Path, model: str, file: str) -> None:
    plan = plan_of(tmp_path, "stages: [{devices: [cuda:0]}]")
    assert flag(command(emit(plan, "llama.cpp", model, SPEC)), "-m") == file


@pytest.mark.parametrize("engine", ENGINES[:2])
@pytest.mark.parametrize(
    ("said", "flags"),
    [
        ("dtype: float32", "--dtype float32"),
        ("dtype: float16", "--dtype float16"),
        ("dtype: float16, quantize: int4", "--quantization awq"),
    ],
)
def test_precisions_are_said(tmp_path: Path, engine: str, said: str, flags: str) -> None:
    lines = emit(plan_of(tmp_path, f"stages: [{{devices: [cuda:0], {said}}}]"), engine, "m", SPEC)
    assert flags in command(lines)
    assert any("a checkpoint in int4" in each for each in lines) == ("int4" in said)


@pytest.mark.parametrize("engine", ENGINES)
def test_servers_on_other_hosts_have_their_addresses(tmp_path: Path, engine: str) -> None:
    plan = plan_of(
        tmp_path,
        "replicas:\n"
        "  - {stages: [{devices: [{device: cuda:0, host: a}]}]}\n"
        "  - {stages: [{devices: [{device: cuda:0, host: b}]}]}\n",
    )
    *lines, door = emit(plan, engine, "m", SPEC)
    hosts = [flag(each, "--host") for each in lines if not each.startswith("#")]
    assert hosts == ["a", "b"]
    assert "http://a:8000 http://b:8001" in door and "127.0.0.1" not in door


@pytest.mark.parametrize(
    ("engine", "kv", "said"),
    [
        ("vllm", "bfloat16", "--max-model-len auto --max-num-seqs 48"),
        ("vllm", "fp8", "--kv-cache-dtype fp8"),
        ("sglang", "bfloat16", "--max-running-requests 48"),
        ("sglang", "fp8", "--kv-cache-dtype fp8_e4m3"),
        # 1 GiB of 32 layers x 2 x 8 heads x 128 x 2 bytes.
        ("llama.cpp", "bfloat16", "-np 48 --kv-unified -c 8192"),
        ("llama.cpp", "int8", "-c 15887 -fa on -ctk q8_0 -ctv q8_0"),
    ],
)
def test_how_many_at_once_and_their_kv(
    tmp_path: Path, engine: str, kv: Precision, said: str
) -> None:
    stages = "stages: [{devices: [cuda:0], kv_cache_memory: 1GiB}]"
    plan = plan_of(tmp_path, f"max_num_seqs: 48\n{stages}")
    assert said in command(emit(plan, engine, "m", SPEC, kv))


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_kv_in_int8_is_said_to_be_none_of_theirs(tmp_path: Path, engine: str) -> None:
    plan = plan_of(tmp_path, "stages: [{devices: [cuda:0]}]")
    lines = emit(plan, engine, "m", SPEC, "int8")
    assert any("KV in int8" in each for each in lines if each.startswith("#"))
    assert "--kv-cache-dtype" not in command(lines)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_plan_does_not_say_is_left_to_the_engine(tmp_path: Path, engine: str) -> None:
    line = command(emit(plan_of(tmp_path, "stages: [{devices: [cuda:0]}]"), engine, "m", SPEC))
    assert not re.search(r" (-np|-c|--max-num-seqs|--max-running-requests) ", line)


def test_llama_cpp_counts_the_devices_of_other_hosts_first(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        "stages:\n"
        "  - {layers: 0-10, devices: [{device: cuda:3, host: a}]}\n"
        "  - {layers: 10-12, devices: [{device: cuda:1, host: b}]}\n"
        "  - {layers: 12-29, devices: [{device: cuda:0, host: c}]}\n"
        "  - {layers: 29-32, devices: [{device: cuda:2, host: b}]}\n",
    )
    lines = emit(plan, "llama.cpp", "m", SPEC)
    line = command(lines)
    assert flag(line, "--host") == "b" and flag(line, "--rpc") == "a:50052,c:50052"
    assert flag(line, "--tensor-split") == "10.00,17.00,2.00,3.00"
    assert flag(line, "CUDA_VISIBLE_DEVICES") == "1,2"
    assert any("rpc-server" in each and " a, c " in each for each in lines)
