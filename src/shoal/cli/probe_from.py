"""`shoal probe --from URL`: constants of the cost model from the Steps that a server has run.

    /admin/replicas/NAME/steps ─► what Steps held and took ─► constants of each device
    short requests             ─► what one takes beside its Steps

The cluster file is what `shoal probe` wrote, or any other that names the server's devices.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import httpx
import msgspec

from shoal.core.cluster import Cluster, Constants, Precision
from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.plan import ReplicaPlan
from shoal.core.split import Range
from shoal.core.step_times import ReplicaSteps
from shoal.policy.cost_model.loads import StepLoad, windows_of
from shoal.policy.cost_model.numbers import Numbers
from shoal.policy.cost_model.times import ReplicaCost

_TIMEOUT_S = 30.0
_MAX_BYTES = 64 << 20
_NUM_REQUESTS, _PROMPT_TOKENS = 9, 16
_TOLD_WITHIN_S = 2.5
"""Workers and engines tell of their Steps once a second at least."""


@dataclass(frozen=True, slots=True)
class Served:
    """A replica as its server tells of it."""

    plan: ReplicaPlan
    numbers: Numbers
    told: ReplicaSteps


def refitted(url: str, api_key: str | None, model: str, cluster: Cluster) -> Cluster:
    """The same cluster with the constants that a running server's Steps say.

    Args:
        url: of the server, as `http://127.0.0.1:8000`; `/v1` may follow.
        model: what the server serves, as `shoal plan` takes it.

    Raises:
        ConfigError: no such server, no key, devices that the cluster has not, or too few Steps.
    """
    from shoal.cli.model_shape import spec_of
    from shoal.policy.cost_model.calibration import running_constants

    spec = spec_of(model)
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=base, headers=headers, timeout=_TIMEOUT_S) as client:
        served = [_served(each, spec, cluster) for each in _replicas(client)]
        found: dict[tuple[str, str, str], Constants] = {}
        for each in served:
            source = f"Steps that ran at {base}"
            for constants in running_constants(
                spec, each.plan, cluster, each.numbers, each.told.steps, source=source
            ):
                found[constants.device, constants.engine, constants.precision] = constants
        if not found:
            raise ConfigError(
                f"{base} has run too few different Steps to fit anything to; send it a load "
                "first: shoal bench URL --rate 2 --num-requests 50"
            )
        others = (each for each in cluster.constants if _key(each) not in found)
        cluster = replace(cluster, constants=(*found.values(), *others))
        return replace(cluster, request_s=_request_s(client, spec, served, cluster))


def _key(constants: Constants) -> tuple[str, str, str]:
    return constants.device, constants.engine, constants.precision


def _replicas(client: httpx.Client) -> Iterator[ReplicaSteps]:
    names = msgspec.json.decode(_get(client, "/admin/replicas"), type=dict[str, dict[str, Any]])
    for name in names["replicas"]:
        body = _get(client, f"/admin/replicas/{name}/steps")
        try:
            yield msgspec.json.decode(body, type=ReplicaSteps)
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"{client.base_url} says what is not understood ({error}); is it a shoal of this "
                "version?"
            ) from error


def _get(client: httpx.Client, path: str) -> bytes:
    try:
        with client.stream("GET", path) as answer:
            if answer.status_code in (401, 403):
                raise ConfigError(
                    f"{client.base_url} does not show its Steps without an API key; start it with "
                    "one, and pass --api-key or set SHOAL_API_KEY"
                )
            answer.raise_for_status()
            body = bytearray()
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > _MAX_BYTES:
                    raise ConfigError(f"{client.base_url}{path} sends more than a server would")
            return bytes(body)
    except httpx.HTTPError as error:
        raise ConfigError(
            f"{client.base_url} cannot be asked: {error}; check the address"
        ) from error


def _served(told: ReplicaSteps, spec: ModelSpec, cluster: Cluster) -> Served:
    from shoal.planner.formats import numbers_for

    plan = told.plan if told.plan is not None else _only_device(spec, cluster)
    devices = [cluster.at(rank.host, rank.device) for each in plan.instances for rank in each.ranks]
    weights, _, kv = told.dtype.partition(", KV ")
    numbers = numbers_for(devices, _precision(weights), _precision(kv or weights))
    if numbers is None:
        raise ConfigError(
            f"the server runs {weights} weights, which the cluster file says its devices have no "
            "kernels for; add it to their precisions"
        )
    return Served(plan, numbers, told)


def _only_device(spec: ModelSpec, cluster: Cluster) -> ReplicaPlan:
    """A server without a plan runs on one device."""
    from shoal.plan_file.even import even_replicas

    if len(cluster.devices) != 1:
        raise ConfigError(
            f"the server runs on one device without a plan, and the cluster file has "
            f"{len(cluster.devices)}; leave the others out"
        )
    (device,) = cluster.devices
    (plan,) = even_replicas(
        spec,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        kv_split="heads",
        data_parallel_size=1,
        device="cpu" if device.device == "cpu" else "cuda",
        num_cuda=int(device.device != "cpu"),
    )
    return plan


def _precision(name: str) -> Precision:
    if name not in get_args(Precision):
        raise ConfigError(
            f"the server's weights are {name!r}, which the cost model does not know; it knows "
            f"{', '.join(get_args(Precision))}"
        )
    return cast(Precision, name)


def _request_s(
    client: httpx.Client, spec: ModelSpec, served: Sequence[Served], cluster: Cluster
) -> float:
    """What the median of some short requests took beyond their Steps; the server should be idle."""
    try:
        model = str(client.get("/v1/models").raise_for_status().json()["data"][0]["id"])
        taken = [
            _short_request_s(client, model, number, spec.vocab_size)
            for number in range(_NUM_REQUESTS)
        ]
    except httpx.HTTPError as error:
        raise ConfigError(f"{client.base_url} takes no requests: {error}; see its log") from error
    time.sleep(_TOLD_WITHIN_S)
    after = [_served(each, spec, cluster) for each in _replicas(client)]
    return max(statistics.median(taken) - short_steps_s(spec, served, after, cluster), 0.0)


def short_steps_s(
    spec: ModelSpec, before: Sequence[Served], after: Sequence[Served], cluster: Cluster
) -> float:
    """What the Steps of a short request took, of those that came between; the median.

    Where their Steps are not told of, the least that the cost model says: an idle replica that is
    quicker gets them.
    """
    told: list[float] = []
    guessed: list[float] = []
    for then, now in zip(before, after, strict=False):
        cost = ReplicaCost(spec, now.plan, cluster, now.numbers)
        guessed.append(cost.latency_s(StepLoad.prefill(_PROMPT_TOKENS, 0, windows_of(spec))))
        known = {layers: len(seconds) for layers, seconds in _short_steps(then).items()}
        new = [seconds[known.get(layers, 0) :] for layers, seconds in _short_steps(now).items()]
        if new and all(new):
            total = sum(map(statistics.median, new)) + sum(cost.hop_times(_PROMPT_TOKENS))
            told += [total] * len(new[0])
    return statistics.median(told) if told else min(guessed)


def _short_steps(served: Served) -> dict[Range, list[float]]:
    """Seconds of Steps that hold one short request, by the layers they went through."""
    found: dict[Range, list[float]] = {}
    for each in served.told.steps:
        if each.taken.rows == ((0, _PROMPT_TOKENS, True),):
            found.setdefault(each.taken.layers, []).append(each.taken.seconds)
    return found


def _short_request_s(client: httpx.Client, model: str, number: int, vocab_size: int) -> float:
    """No two begin alike, so that none finds another's KV."""
    first = (vocab_size // 2 + number * _PROMPT_TOKENS) % (vocab_size - _PROMPT_TOKENS)
    body = {
        "model": model,
        "prompt": list(range(first, first + _PROMPT_TOKENS)),
        "max_tokens": 1,
        "ignore_eos": True,
        "temperature": 0,
    }
    began_s = time.perf_counter()
    answer = client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return time.perf_counter() - began_s
