"""What a plan is for: how much work of what lengths comes, and what counts as good.

    latency   the least mean time of a request, at a rate
    goodput   the most requests per second that keep the SLO
    cost      the least of dollars (devices, watts) that carry a rate and keep the SLO

All are means: of a workload only its mean lengths, its rate and its longest request are read.
Knows nothing of devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from shoal.core.cluster import Device, Precision
from shoal.core.errors import ConfigError
from shoal.core.latency import Slo
from shoal.core.workload import Workload

Objective = Literal["latency", "goodput", "cost"]
CostUnit = Literal["usd", "devices", "watts"]

_MOST_RATE = 1e9
"""Of requests per second: more than anybody has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is asked for.

    Attributes:
        rate_per_s: of requests; None: as many as can be carried.
        input_tokens, output_tokens: of a request, on average.
        max_tokens: of the longest request: an instance must hold the KV of one.
        cost_unit: what "cost" counts.
        precisions: of weights that a stage may have, the best quality first.
        max_quality_loss: by how much perplexity may be higher than in 16 bits, as a share; None: by
            as much as the precisions bring (`quality.py`).
        kv_precision: of KV.
        max_concurrency: requests that one replica takes at once.
        may_specialise: some replicas may start requests, and others go on with them.

    Raises:
        ConfigError: numbers that no workload has, an objective without the rate it needs.
    """

    objective: Objective = "goodput"
    rate_per_s: float | None = None
    input_tokens: float = 1024.0
    output_tokens: float = 256.0
    max_tokens: int = 0
    slo: Slo = field(default_factory=Slo)
    cost_unit: CostUnit = "usd"
    precisions: tuple[Precision, ...] = ("bfloat16",)
    max_quality_loss: float | None = None
    kv_precision: Precision = "bfloat16"
    max_concurrency: int = 256
    may_specialise: bool = False

    def __post_init__(self) -> None:
        for name, value in (("input", self.input_tokens), ("output", self.output_tokens)):
            if not 1 <= value < 1e7:
                raise ConfigError(
                    f"{name} tokens are {value:g}; a request has at least 1, and fewer than 10 "
                    "million"
                )
        if self.rate_per_s is not None and not 0 < self.rate_per_s <= _MOST_RATE:
            raise ConfigError(
                f"the rate is {self.rate_per_s:g} requests/s; it must be a number of more than 0, "
                f"{_MOST_RATE:g} at most"
            )
        if self.max_quality_loss is not None and not 0 <= self.max_quality_loss <= 1:
            raise ConfigError(
                f"max quality loss is {self.max_quality_loss:.1%} of perplexity; it must be from 0 "
                "to 100 %"
            )
        if self.kv_precision == "int4":
            raise ConfigError("KV is not kept in int4; take bfloat16, fp8 or int8")
        if self.max_concurrency < 1:
            raise ConfigError(f"max concurrency is {self.max_concurrency}; it must be at least 1")
        if self.objective == "cost" and self.rate_per_s is None:
            raise ConfigError(
                "the objective cost needs a rate that is to be carried; give --rate or --workload"
            )
        if not self.precisions:
            raise ConfigError("no precision is allowed; name at least one")

    @property
    def context_tokens(self) -> float:
        """That a request has on average while it decodes."""
        return self.input_tokens + self.output_tokens / 2

    @property
    def longest_tokens(self) -> int:
        return max(self.max_tokens, math.ceil(self.input_tokens + self.output_tokens))

    def price(self, device: Device) -> float:
        """Of a device, in `cost_unit`; one whose price is not known counts as 1.

        A watt, as a dollar an hour, is taken for what the device takes when busy.
        """
        if self.cost_unit == "devices":
            return 1.0
        known = device.usd_per_hour if self.cost_unit == "usd" else device.watts
        return 1.0 if known is None else known


def lengths_of(workload: Workload) -> tuple[float, float, int]:
    """Mean input and output tokens of a workload, and the longest request's of both."""
    arrivals = [each for each in workload.arrivals if each.prompt is None]
    if not arrivals:
        raise ConfigError(
            f"{workload.name} has prompts as text only; give a trace that has their lengths"
        )
    return (
        sum(each.prompt_tokens for each in arrivals) / len(arrivals),
        sum(each.output_tokens for each in arrivals) / len(arrivals),
        max(each.prompt_tokens + each.output_tokens for each in arrivals),
    )


def rate_of(workload: Workload) -> float:
    """Requests per second, on average.

    Raises:
        ConfigError: all arrive at once.
    """
    if workload.duration_s <= 0:
        raise ConfigError(
            f"all requests of {workload.name} arrive at once; give a trace that takes time, or "
            "--rate"
        )
    return (len(workload.arrivals) - 1) / workload.duration_s


def objective_of(name: str) -> Objective:
    """
    Raises:
        ConfigError: there is none of that name.
    """
    if name not in get_args(Objective):
        raise ConfigError(
            f"the objective is {name!r}; it must be one of {', '.join(get_args(Objective))}"
        )
    return cast(Objective, name)
