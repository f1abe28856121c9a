"""The nearest configuration of other engines, and what of a plan they can't express.

    vllm        even tensor parallelism; stages of equal width (VLLM_PP_LAYER_PARTITION)
    sglang      even tensor parallelism; stages of equal width (SGLANG_PP_LAYER_PARTITION)
    llama.cpp   layers by --tensor-split over devices of any kind; no sums between them

Flags are those of vLLM 0.32, SGLang 0.5 and llama.cpp of 2026. Knows nothing of how they are
started.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping

from shoal.core.errors import ConfigError
from shoal.core.plan import InstancePlan, Plan, ReplicaPlan
from shoal.core.split import Range

_QUANTISED = {"fp8": "fp8", "int8": "compressed-tensors", "int4": "awq"}


def emit(plan: Plan, engine: str, model: str) -> list[str]:
    """Lines of a shell script; what can't be expressed stands there as comments.

    Raises:
        ConfigError: an engine that is not known.
    """
    engine_to_emit(engine)
    lines: list[str] = []
    for index, replica in enumerate(plan.replicas):
        hosts = sorted({r.host for each in replica.instances for r in each.ranks if r.host})
        if len(plan.replicas) > 1 or hosts:
            lines.append(f"# replica {index}" + (f", on {', '.join(hosts)}" if hosts else ""))
        lines += _ENGINES[engine](replica, model, 8000 + index)
    if len(plan.replicas) > 1:
        lines.append(_in_front(plan, engine))
    return lines


def _in_front(plan: Plan, engine: str) -> str:
    """Of several servers."""
    urls = [f"http://127.0.0.1:{8000 + index}" for index in range(len(plan.replicas))]
    if engine == "sglang" and any(each.role != "any" for each in plan.replicas):
        words = ["python", "-m", "sglang_router.launch_router", "--pd-disaggregation"]
        for url, replica in zip(urls, plan.replicas, strict=True):
            # Who takes whole requests can't be told of: it decodes.
            words += ["--prefill" if replica.role == "prefill" else "--decode", url]
        return _line([], words)
    return f"# in front of them, a load balancer over {' '.join(urls)}"


def engine_to_emit(engine: str) -> str:
    """
    Raises:
        ConfigError: an engine that is not known.
    """
    if engine not in _ENGINES:
        raise ConfigError(f"--emit is {engine!r}; it must be one of {', '.join(_ENGINES)}")
    return engine


def _vllm(replica: ReplicaPlan, model: str, port: int) -> list[str]:
    words = ["vllm", "serve", model, "--port", str(port)]
    words += ["--tensor-parallel-size", str(_width(replica))]
    words += ["--pipeline-parallel-size", str(len(replica.stages))]
    words += _quantisation(replica)
    environment = _devices(replica)
    if len(replica.stages) > 1:
        environment.append(f"VLLM_PP_LAYER_PARTITION={_layers(replica)}")
    if _hosts(replica) > 1:
        words += ["--distributed-executor-backend", "ray"]
    return [*_even_limits(replica, "vLLM"), _line(environment, words)]


def _sglang(replica: ReplicaPlan, model: str, port: int) -> list[str]:
    words = ["python", "-m", "sglang.launch_server", "--model-path", model, "--port", str(port)]
    words += ["--tp-size", str(_width(replica)), "--pp-size", str(len(replica.stages))]
    words += _quantisation(replica)
    if replica.role != "any":
        words += ["--disaggregation-mode", replica.role]
    environment = _devices(replica)
    if len(replica.stages) > 1:
        environment.append(f"SGLANG_PP_LAYER_PARTITION={_layers(replica)}")
    if (hosts := _hosts(replica)) > 1:
        words += ["--nnodes", str(hosts), "--node-rank", "$RANK", "--dist-init-addr", "$HEAD:5000"]
    return [*_even_limits(replica, "SGLang"), _line(environment, words)]


def _llama_cpp(replica: ReplicaPlan, model: str, port: int) -> list[str]:
    """One device for each share of the layers; a group's devices get parts of its own."""
    shares = []
    for stage in replica.stages:
        instance = stage.instances[0]
        whole = sum(len(each) for each in instance.split.ffn) or 1
        shares += [
            f"{len(instance.layers) * len(columns) / whole:.2f}" for columns in instance.split.ffn
        ]
    words = ["llama-server", "-m", f"{model}.gguf", "--port", str(port), "-ngl", "999"]
    words += ["--split-mode", "layer", "--tensor-split", ",".join(shares)]
    lines = _common_limits(replica, "llama.cpp")
    if any(len(each.ranks) > 1 for each in replica.instances):
        lines.append(
            "# llama.cpp: ranks that share a layer become stages, one after the other: TPOT of one "
            "request is the sum of all (--split-mode tensor shares layers, by way of trial)"
        )
    if _hosts(replica) > 1:
        words += ["--rpc", "$HOSTS"]
        lines.append("# llama.cpp: start rpc-server on every other host, and list them in HOSTS")
    if any(each.quantize for each in replica.instances):
        lines.append("# llama.cpp: precision is the GGUF file's: convert it with llama-quantize")
    return [*lines, _line(_devices(replica), words)]


_ENGINES: Mapping[str, Callable[[ReplicaPlan, str, int], list[str]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
}


def _even_limits(replica: ReplicaPlan, engine: str) -> list[str]:
    lines = _common_limits(replica, engine)
    widths = {len(each.ranks) for each in replica.instances}
    if len(widths) > 1:
        lines.append(
            f"# {engine}: stages of {', '.join(map(str, sorted(widths)))} devices can't be mixed; "
            f"all have {_width(replica)} here, which leaves devices out or asks for more"
        )
    if any(_is_uneven(each) for each in replica.instances):
        lines.append(
            f"# {engine}: heads and FFN columns are split evenly, so the slowest device of a group "
            "sets its pace, and the smallest its memory"
        )
    return lines


def _common_limits(replica: ReplicaPlan, engine: str) -> list[str]:
    lines = []
    if replica.role != "any" and engine != "SGLang":
        lines.append(
            f"# {engine}: that this replica is for {replica.role} only is not expressed; it takes "
            "whole requests"
        )
    if any(len(stage.instances) > 1 for stage in replica.stages):
        lines.append(
            f"# {engine}: a stage with several instances can't be expressed; one of each is left"
        )
    precisions = {each.quantize or each.dtype for each in replica.instances}
    if len(precisions) > 1:
        shown = ", ".join(sorted(map(str, precisions)))
        lines.append(f"# {engine}: one precision for all stages, not {shown}")
    return lines


def _is_uneven(instance: InstancePlan) -> bool:
    def sizes(ranges: tuple[Range, ...]) -> int:
        lengths = [len(each) for each in ranges]
        return max(lengths) - min(lengths)

    return sizes(instance.split.heads) > 0 or sizes(instance.split.ffn) > 32


def _width(replica: ReplicaPlan) -> int:
    """Ranks of most stages; of equally many, the fewer."""
    widths = [len(stage.instances[0].ranks) for stage in replica.stages]
    return min(widths, key=lambda each: (-widths.count(each), each))


def _layers(replica: ReplicaPlan) -> str:
    return ",".join(str(len(stage.instances[0].layers)) for stage in replica.stages)


def _hosts(replica: ReplicaPlan) -> int:
    return len({rank.host for each in replica.instances for rank in each.ranks})


def _devices(replica: ReplicaPlan) -> list[str]:
    """Which of one host's GPUs; on several hosts each sees its own."""
    if _hosts(replica) > 1:
        return []
    ranks = [rank.device for stage in replica.stages for rank in stage.instances[0].ranks]
    numbers = [each.partition(":")[2] or "0" for each in ranks if each.startswith("cuda")]
    return [f"CUDA_VISIBLE_DEVICES={','.join(numbers)}"] if numbers else []


def _quantisation(replica: ReplicaPlan) -> list[str]:
    kept = {each.quantize for each in replica.instances} - {None}
    found = next((each for each in ("fp8", "int8", "int4") if each in kept), None)
    if found is None:
        dtypes = {each.dtype for each in replica.instances}
        return ["--dtype", "float16"] if "float16" in dtypes else []
    return ["--quantization", _QUANTISED[found]]


def _line(environment: list[str], words: list[str]) -> str:
    quoted = [each if each.startswith("$") else shlex.quote(each) for each in words]
    return " ".join([*environment, *quoted])
