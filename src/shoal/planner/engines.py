"""The nearest configuration of other engines, and what of a plan they can't express.

    vllm        even tensor parallelism; stages of equal width (VLLM_PP_LAYER_PARTITION)
    sglang      even tensor parallelism; stages of equal width (SGLANG_PP_LAYER_PARTITION)
    llama.cpp   layers by --tensor-split over devices of any kind; no sums between them

Flags are those of vLLM 0.32, SGLang 0.5 and llama.cpp of 2026. Knows nothing of how they are
started.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.core.cluster import Precision
from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.plan import InstancePlan, Plan, RankPlan, ReplicaPlan
from shoal.core.split import Range, cut
from shoal.policy.cost_model.memory import kv_token_bytes
from shoal.policy.cost_model.numbers import Numbers

_QUANTISED = {"fp8": "fp8", "int8": "compressed-tensors", "int4": "awq"}
_MADE_LIKE_THAT = ("int8", "int4")
"""Checkpoints have these precisions; weights in fp8 are made of any while they are loaded."""
_FIRST_PORT = 8000
_MOST_SLOTS, _RPC_PORT = 256, 50052
_LLAMA_KV: Mapping[Precision, Literal["int8"]] = {"int8": "int8", "fp8": "int8"}
"""q8_0, the only one of 8 bits that it has."""


def emit(
    plan: Plan, engine: str, model: str, spec: ModelSpec, kv: Precision = "bfloat16"
) -> list[str]:
    """Lines of a shell script; what can't be expressed stands there as comments.

    Args:
        kv: what KV is kept in.

    Raises:
        ConfigError: an engine that is not known.
    """
    engine_to_emit(engine)
    lines: list[str] = []
    for index, replica in enumerate(plan.replicas):
        hosts = _host_names(replica)
        if len(plan.replicas) > 1 or hosts:
            lines.append(f"# replica {index}" + (f", on {', '.join(hosts)}" if hosts else ""))
        lines += _ENGINES[engine](
            _Wanted(replica, model, spec, _FIRST_PORT + index, plan.max_num_seqs, kv)
        )
    if len(plan.replicas) > 1:
        lines.append(_in_front(plan, engine))
    return lines


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One server."""

    replica: ReplicaPlan
    model: str
    spec: ModelSpec
    port: int
    max_num_seqs: int | None
    kv: Precision

    def at_once(self, flag: str, most: int | None = None) -> list[str]:
        """As many requests as it was planned for."""
        if self.max_num_seqs is None:
            return []
        return [flag, str(min(self.max_num_seqs, most or self.max_num_seqs))]

    @property
    def kv_tokens(self) -> int | None:
        """That the plan has memory for; None: it does not say."""
        found = []
        numbers = Numbers(kv=_LLAMA_KV.get(self.kv, "float16"))
        for index, instance in enumerate(self.replica.instances):
            for shard in self.replica.shards(index):
                size = kv_token_bytes(self.spec, shard, numbers)
                if size and instance.kv_cache_memory_bytes is None:
                    return None
                if size:
                    found.append((instance.kv_cache_memory_bytes or 0) // size)
        return min(found, default=None)

    @property
    def address(self) -> list[str]:
        """Flags; on a host that has a name others come to it by that."""
        hosts = _host_names(self.replica)
        return [*(("--host", hosts[0]) if hosts else ()), "--port", str(self.port)]


def _in_front(plan: Plan, engine: str) -> str:
    """Of several servers."""
    if engine == "llama.cpp":
        hosts = [_llama_home(each) or "127.0.0.1" for each in plan.replicas]
    else:
        hosts = [(*_host_names(each), "127.0.0.1")[0] for each in plan.replicas]
    urls = [f"http://{host}:{_FIRST_PORT + index}" for index, host in enumerate(hosts)]
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


def _vllm(wanted: _Wanted) -> list[str]:
    groups = _Groups("vLLM", wanted)
    words = ["vllm", "serve", wanted.model, *wanted.address]
    words += ["--tensor-parallel-size", str(groups.width)]
    words += ["--pipeline-parallel-size", str(len(groups.layers))]
    # Without the first it does not start where one request of the model's length has no room.
    words += ["--max-model-len", "auto", *wanted.at_once("--max-num-seqs")]
    words += _quantisation(wanted.replica)
    words += ["--kv-cache-dtype", "fp8"] if wanted.kv == "fp8" else []
    environment = groups.devices()
    if len(groups.layers) > 1:
        environment.append(f"VLLM_PP_LAYER_PARTITION={groups.partition}")
    if _num_hosts(wanted.replica) > 1:
        words += ["--distributed-executor-backend", "ray"]
    return [*groups.limits(), _line(environment, words)]


def _sglang(wanted: _Wanted) -> list[str]:
    groups, replica = _Groups("SGLang", wanted), wanted.replica
    words = ["python", "-m", "sglang.launch_server", "--model-path", wanted.model, *wanted.address]
    words += ["--tp-size", str(groups.width), "--pp-size", str(len(groups.layers))]
    words += [*wanted.at_once("--max-running-requests"), *_quantisation(replica)]
    words += ["--kv-cache-dtype", "fp8_e4m3"] if wanted.kv == "fp8" else []
    words += [] if groups.stages else ["--device", "cpu"]
    if replica.role != "any":
        words += ["--disaggregation-mode", replica.role]
    environment = groups.devices()
    if len(groups.layers) > 1:
        environment.append(f"SGLANG_PP_LAYER_PARTITION={groups.partition}")
    if (hosts := _num_hosts(replica)) > 1:
        words += ["--nnodes", str(hosts), "--node-rank", "$RANK", "--dist-init-addr", "$HEAD:5000"]
    return [*groups.limits(), _line(environment, words)]


def _llama_cpp(wanted: _Wanted) -> list[str]:
    """One GPU for each share of the layers; a group's GPUs get parts of its own."""
    replica, model = wanted.replica, wanted.model
    shares: list[tuple[RankPlan, float]] = []
    for stage in replica.stages:
        instance = stage.instances[0]
        whole = sum(len(each) for each in instance.split.ffn) or 1
        shares += [
            (rank, len(instance.layers) * len(columns) / whole)
            for rank, columns in zip(instance.ranks, instance.split.ffn, strict=True)
        ]
    on_gpus = [(rank, own) for rank, own in shares if rank.device != "cpu"]
    # Devices of others come first, wherever they stand: the last stage's host is the one to ask.
    home = _llama_home(replica)
    away = list(dict.fromkeys(rank.host for rank, _ in on_gpus if rank.host != home))
    on_gpus.sort(key=lambda each: away.index(each[0].host) if each[0].host in away else len(away))
    is_all = len(on_gpus) == len(shares)
    num_layers = 999 if is_all else round(sum(own for _, own in on_gpus))
    words = ["llama-server", "-m", model if model.endswith(".gguf") else f"{model}.gguf"]
    words += [*(("--host", home) if home else ()), "--port", str(wanted.port)]
    words += ["-ngl", str(num_layers), *_slots(wanted)]
    if on_gpus:
        split = ",".join(f"{own:.2f}" for _, own in on_gpus)
        words += ["--split-mode", "layer", "--tensor-split", split]
    lines = _common_limits(replica, "llama.cpp")
    if not is_all and on_gpus:
        lines.append("# llama.cpp: CPUs have the first layers, whatever the plan says")
    if any(len(each.ranks) > 1 for each in replica.instances):
        lines.append(
            "# llama.cpp: ranks that share a layer become stages, one after the other: TPOT of one "
            "request is the sum of all (--split-mode tensor shares layers, by way of trial)"
        )
    if away:
        words += ["--rpc", ",".join(f"{host}:{_RPC_PORT}" for host in away)]
        lines.append(
            f"# llama.cpp: start rpc-server -H 0.0.0.0 on {', '.join(map(str, away))} before (it "
            "lets anybody in: only in a network of yours), and this on " + str(home)
        )
    if any(each.quantize or each.dtype != "bfloat16" for each in replica.instances):
        lines.append("# llama.cpp: precision is the GGUF file's: convert it with llama-quantize")
    local = [rank for rank, _ in on_gpus if rank.host == home]
    return [*lines, _line(_seen(local), words)]


def _llama_home(replica: ReplicaPlan) -> str | None:
    """Where its server runs: beside the last GPU, as the head's rows are large."""
    ranks = [rank for stage in replica.stages for rank in stage.instances[0].ranks]
    gpus = [rank for rank in ranks if rank.device != "cpu"]
    return (gpus or ranks)[-1].host


def _slots(wanted: _Wanted) -> list[str]:
    """It has four by itself, and shares its context out among them unless it is told not to."""
    words = wanted.at_once("-np", _MOST_SLOTS)
    if words:
        longest = int(words[1]) * wanted.spec.max_positions
        words.append("--kv-unified")
        if tokens := wanted.kv_tokens:
            words += ["-c", str(min(tokens, longest))]
    if wanted.kv in _LLAMA_KV:
        words += ["-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"]
    return words


_ENGINES: Mapping[str, Callable[[_Wanted], list[str]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
}


class _Groups:
    """A replica's GPUs as groups that are all of one width, which is how some engines have them.

    Attributes:
        stages: the first instance of each that has GPUs.
        width: ranks of each.
        layers: of each; those of CPUs are shared out over the others.
    """

    def __init__(self, engine: str, wanted: _Wanted) -> None:
        self.engine, self.replica, self.spec = engine, wanted.replica, wanted.spec
        self._kv = wanted.kv
        firsts = [stage.instances[0] for stage in wanted.replica.stages]
        self.stages = [each for each in firsts if _gpus(each)]
        self._num_cpus = sum(len(each.ranks) - len(_gpus(each)) for each in firsts)
        self._widths = [len(_gpus(each)) for each in self.stages] or [1]
        self.width = max(n for n in range(1, min(self._widths) + 1) if self._divides(n))
        sizes = [max(len(each.layers), 1) for each in self.stages] or [1]
        self.layers = [len(each) for each in cut(self.spec.num_layers, sizes)]

    @property
    def partition(self) -> str:
        return ",".join(map(str, self.layers))

    def devices(self) -> list[str]:
        return _visible(
            self.replica, [r for each in self.stages for r in _gpus(each)[: self.width]]
        )

    def limits(self) -> list[str]:
        """What of the plan is not expressed."""
        lines = _common_limits(self.replica, self.engine)
        if self._num_cpus and self.stages:
            lines.append(
                f"# {self.engine}: ranks on CPUs ({self._num_cpus}) are left out; the GPUs have "
                "what was theirs, if there is memory for it"
            )
        elif self._num_cpus:
            lines.append(f"# {self.engine}: this takes its build for CPUs, which are one rank")
        if len(set(self._widths)) > 1:
            shown = ", ".join(map(str, sorted(set(self._widths))))
            lines.append(
                f"# {self.engine}: stages of {shown} devices can't be mixed; all have {self.width} "
                "here, which leaves devices out"
            )
        elif self.width < min(self._widths):
            spec = self.spec
            lines.append(
                f"# {self.engine}: {spec.num_heads} heads, {spec.num_kv_heads} of KV, and "
                f"{spec.ffn_size} FFN columns can't be shared by {min(self._widths)} ranks evenly; "
                f"{self.width} are left of each group"
            )
        if any(_is_uneven(each) for each in self.stages):
            lines.append(
                f"# {self.engine}: heads and FFN columns are split evenly, so a group's slowest "
                "device sets its pace, and the smallest its memory"
            )
        if self._kv == "int8":
            lines.append(f"# {self.engine}: KV in int8 can't be expressed; it is in 16 bits here")
        made = [each for each in _MADE_LIKE_THAT if _QUANTISED[each] in _quantisation(self.replica)]
        if made:
            lines.append(
                f"# {self.engine}: name a checkpoint in {made[0]} ({_QUANTISED[made[0]]}); others "
                "are not rounded while they are loaded"
            )
        return lines

    def _divides(self, num_ranks: int) -> bool:
        """Whether heads and columns can be shared evenly; KV heads may be repeated as well."""
        kv_heads = self.spec.num_kv_heads
        shares_kv = kv_heads % num_ranks == 0 or num_ranks % kv_heads == 0
        return (
            shares_kv
            and self.spec.num_heads % num_ranks == 0
            and self.spec.ffn_size % num_ranks == 0
        )


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


def _gpus(instance: InstancePlan) -> tuple[RankPlan, ...]:
    return tuple(each for each in instance.ranks if each.device != "cpu")


def _is_uneven(instance: InstancePlan) -> bool:
    def sizes(ranges: tuple[Range, ...]) -> int:
        lengths = [len(each) for each in ranges]
        return max(lengths) - min(lengths)

    return sizes(instance.split.heads) > 0 or sizes(instance.split.ffn) > 32


def _host_names(replica: ReplicaPlan) -> list[str]:
    """In the order of stages."""
    ranks = (rank for each in replica.instances for rank in each.ranks)
    return list(dict.fromkeys(rank.host for rank in ranks if rank.host is not None))


def _num_hosts(replica: ReplicaPlan) -> int:
    return max(len(_host_names(replica)), 1)


def _visible(replica: ReplicaPlan, ranks: list[RankPlan]) -> list[str]:
    """Which of one host's GPUs; on several hosts each sees its own."""
    if _num_hosts(replica) > 1:
        return []
    return _seen(ranks)


def _seen(ranks: Sequence[RankPlan]) -> list[str]:
    return [f"CUDA_VISIBLE_DEVICES={','.join(r.device.partition(':')[2] or '0' for r in ranks)}"]


def _quantisation(replica: ReplicaPlan) -> list[str]:
    kept = {each.quantize for each in replica.instances} - {None}
    found = next((each for each in ("fp8", "int8", "int4") if each in kept), None)
    if found is not None:
        return ["--quantization", _QUANTISED[found]]
    dtypes = {each.dtype for each in replica.instances}
    taken = next((each for each in ("float16", "float32") if each in dtypes), None)
    return [] if taken is None else ["--dtype", taken]


def _line(environment: list[str], words: list[str]) -> str:
    quoted = [each if each.startswith("$") else shlex.quote(each) for each in words]
    return " ".join([*environment, *quoted])
