"""A plan file as it is written: checked for what can be checked without the model.

    model: smollm2-135m
    max_num_seqs: 64                            # requests that a replica takes at once
    stages:                                     # or replicas: [{stages: ..., role: prefill}, ...]
      - layers: 0-4
        devices: [cpu, cpu]                     # one rank each
        split: {heads: [6, 3], ffn: [1024, 512]}    # sizes; or weights: [2, 1]; left out: even
                                                # and experts (`experts.py`), kv: tokens
      - instances:                              # that stand in for each other
          - {layers: 4-21, devices: [cpu]}
          - {layers: 4-21, devices: [{device: cpu, threads: 1, host: b, speed: 0.3}]}
      - {layers: 21-30, devices: [cuda:0], quantize: int8, kv_cache_memory: 2GiB}
    routes: [[0, 1, 3], [0, 2, 3]]              # instances, in order; left out: every chain

Knows nothing of a model's shapes: `resolve.py` brings the two together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from shoal.core.options import DType, Quantization
from shoal.core.plan import RankPlan, Role
from shoal.core.split import Range
from shoal.plan_file.experts import ExpertsDraft, draft_experts
from shoal.plan_file.fields import Field

PLAN_KEYS = ("model", "max_num_seqs", "replicas", "stages", "routes", "role")
MAX_REPLICAS, MAX_STAGES, MAX_INSTANCES, MAX_RANKS, MAX_ROUTES = 4096, 128, 32, 64, 256
MAX_SEQS = 65536

_REPLICA_KEYS = ("stages", "routes", "role")
_MEMORY_KEYS = ("kv_cache_memory", "weights_memory")
_INSTANCE_KEYS = ("layers", "devices", "split", *_MEMORY_KEYS, "quantize", "dtype")
_DEVICE_KEYS = ("device", "host", "threads", "speed")
_SIZE_KEYS = ("heads", "ffn", "vocab", "weights")
_SPLIT_KEYS = (*_SIZE_KEYS, "experts", "kv")
_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_MAX_SIZE = 1 << 31


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of a split, one for each rank, and where they stand."""

    place: Field
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceDraft:
    """An instance; `sizes` by "heads", "ffn", "vocab" and "weights", those that are named.

    `experts` None: as the weights say.
    """

    place: Field
    ranks: tuple[RankPlan, ...]
    device_places: tuple[Field, ...]
    layers: Range | None = None
    sizes: Mapping[str, Sizes] = field(default_factory=dict)
    experts: ExpertsDraft | None = None
    kv: Literal["heads", "tokens"] = "heads"
    kv_cache_memory_bytes: int | None = None
    weights_memory_bytes: int | None = None
    quantize: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class StageDraft:
    place: Field
    instances: tuple[InstanceDraft, ...]


@dataclass(frozen=True, slots=True)
class HopDraft:
    """An instance of a route; `layers` None: all that are left of its own."""

    place: Field
    instance: int
    layers: Range | None


@dataclass(frozen=True, slots=True)
class RouteDraft:
    place: Field
    hops: tuple[HopDraft, ...]


@dataclass(frozen=True, slots=True)
class ReplicaDraft:
    place: Field
    stages: tuple[StageDraft, ...]
    routes: tuple[RouteDraft, ...] | None
    role: Role = "any"


def draft_replicas(entries: Mapping[str, Field], root: Field) -> tuple[ReplicaDraft, ...]:
    """The replicas of a plan file.

    Raises:
        ConfigError: with file and line.
    """
    if "replicas" not in entries:
        return (_replica(entries, root),)
    for key in _REPLICA_KEYS:
        if key in entries:
            raise entries[key].error(
                f"{key} stands beside replicas; write it inside a replica, or remove replicas"
            )
    return tuple(
        _replica(each.entries(_REPLICA_KEYS), each)
        for each in entries["replicas"].items(MAX_REPLICAS)
    )


def _replica(entries: Mapping[str, Field], place: Field) -> ReplicaDraft:
    if "stages" not in entries:
        raise place.error("there is no key stages; name at least one stage with its devices")
    stages = tuple(_stage(each) for each in entries["stages"].items(MAX_STAGES))
    routes = None
    if "routes" in entries:
        routes = tuple(_route(each) for each in entries["routes"].items(MAX_ROUTES))
    role = entries["role"].choice(get_args(Role)) if "role" in entries else "any"
    return ReplicaDraft(entries["stages"], stages, routes, cast(Role, role))


def _stage(place: Field) -> StageDraft:
    entries = place.entries((*_INSTANCE_KEYS, "instances"))
    if "instances" not in entries:
        return StageDraft(place, (_instance(place),))
    if len(entries) > 1:
        other = next(name for name in entries if name != "instances")
        raise entries[other].error(
            f"{other} stands beside instances; write it inside each of them, or remove instances"
        )
    return StageDraft(
        place, tuple(_instance(each) for each in entries["instances"].items(MAX_INSTANCES))
    )


def _instance(place: Field) -> InstanceDraft:
    entries = place.entries(_INSTANCE_KEYS)
    if "devices" not in entries:
        raise place.error("there is no key devices; name one for each rank: devices: [cpu]")
    devices = entries["devices"]
    split = entries.get("split")
    named = split.entries(_SPLIT_KEYS) if split is not None and not split.is_list else {}
    places = tuple(devices.items(MAX_RANKS) if devices.is_list else [devices])
    dtypes = [name for name in get_args(DType) if name != "auto"]
    return InstanceDraft(
        place=place,
        ranks=tuple(_rank(each) for each in places),
        device_places=places,
        layers=entries["layers"].range() if "layers" in entries else None,
        sizes=_sizes(split, named),
        experts=draft_experts(named["experts"], MAX_RANKS) if "experts" in named else None,
        kv=_kv(named["kv"]) if "kv" in named else "heads",
        weights_memory_bytes=(
            _bytes(entries["weights_memory"]) if "weights_memory" in entries else None
        ),
        kv_cache_memory_bytes=(
            _bytes(entries["kv_cache_memory"]) if "kv_cache_memory" in entries else None
        ),
        quantize=(
            entries["quantize"].choice(get_args(Quantization)) if "quantize" in entries else None
        ),
        dtype=entries["dtype"].choice(dtypes) if "dtype" in entries else None,
    )


def _rank(place: Field) -> RankPlan:
    if not place.is_mapping:
        return RankPlan(device=_device(place))
    entries = place.entries(_DEVICE_KEYS)
    if "device" not in entries:
        raise place.error("there is no key device; name it: device: cpu")
    device = _device(entries["device"])
    if "threads" in entries and device != "cpu":
        raise entries["threads"].error(f"threads are a CPU's, and this is {device}; remove them")
    return RankPlan(
        device=device,
        host=entries["host"].text() if "host" in entries else None,
        num_threads=entries["threads"].integer(1, 1024) if "threads" in entries else None,
        speed=entries["speed"].number(0.001, 1.0) if "speed" in entries else 1.0,
    )


def _device(place: Field) -> str:
    name = place.text()
    if not re.fullmatch(r"cpu|cuda|cuda:[0-9]{1,3}", name):
        raise Field(place.file, "device", place.node).wrong("cpu, cuda or cuda:N")
    return name


def _sizes(split: Field | None, named: Mapping[str, Field]) -> dict[str, Sizes]:
    if split is not None and split.is_list:
        return {"weights": _weights(split)}
    return {
        name: _weights(named[name]) if name == "weights" else _counts(named[name])
        for name in _SIZE_KEYS
        if name in named
    }


def _kv(place: Field) -> Literal["heads", "tokens"]:
    return cast(Literal["heads", "tokens"], place.choice(("heads", "tokens")))


def _weights(place: Field) -> Sizes:
    values = tuple(each.number(0.0, 1e9) for each in place.items(MAX_RANKS))
    if not sum(values) > 0:
        raise place.error(f"all of {place.name} are 0; give at least one rank more than that")
    return Sizes(place, values)


def _counts(place: Field) -> Sizes:
    return Sizes(place, tuple(each.integer(0, _MAX_SIZE) for each in place.items(MAX_RANKS)))


def _bytes(place: Field) -> int:
    found = re.fullmatch(r"([0-9]{1,15}) *([A-Za-z]*)", place.text())
    if not found or found[2].upper() not in _UNITS or int(found[1]) < 1:
        raise place.wrong("a size such as 512MiB, 2GiB or a number of bytes")
    return int(found[1]) * _UNITS[found[2].upper()]


def _route(place: Field) -> RouteDraft:
    return RouteDraft(place, tuple(_hop(each) for each in place.items(MAX_STAGES)))


def _hop(place: Field) -> HopDraft:
    most = MAX_STAGES * MAX_INSTANCES
    if not place.is_mapping:
        number = Field(place.file, "an instance of a route", place.node)
        return HopDraft(place, number.integer(0, most), None)
    entries = place.entries(("instance", "layers"))
    if "instance" not in entries:
        raise place.error("there is no key instance; give its number, counted over all stages")
    layers = entries["layers"].range() if "layers" in entries else None
    return HopDraft(place, entries["instance"].integer(0, most), layers)
