"""Latencies of requests as people state them: percentiles, bounds, what keeps within them.

    TTFT   first token - arrival
    TPOT   (last token - first token) / (tokens - 1)
    ITL    between two tokens that follow each other
    E2E    end - arrival

Measured or simulated alike. Knows nothing of where the numbers come from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.core.errors import ConfigError

METRICS = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Upper limits, in seconds; None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft_s), ("tpot", self.tpot_s)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"the SLO {name} is {value:g} s; it must be more than 0")

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Of ``ttft=2s,tpot=50ms``, or one of them.

        Raises:
            ConfigError: text that says something else.
        """
        bounds = parse_slo(text)
        if unknown := bounds.keys() - {"ttft", "tpot"}:
            raise ConfigError(
                f"SLO has {', '.join(sorted(unknown))}; requests are routed by ttft and tpot: name "
                "these, as in --slo ttft=2s,tpot=50ms"
            )
        return cls(ttft_s=bounds.get("ttft"), tpot_s=bounds.get("tpot"))

    def __str__(self) -> str:
        parts = [
            f"{name} <= {value * 1e3:,.0f} ms"
            if value >= 0.1
            else f"{name} <= {value * 1e3:.3g} ms"
            for name, value in (("TTFT", self.ttft_s), ("TPOT", self.tpot_s))
            if value is not None
        ]
        return ", ".join(parts) or "none"


def parse_slo(text: str) -> dict[str, float]:
    """Seconds for each metric of ``ttft=2s,tpot=50ms`` (also e2e)."""
    slo: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(ttft|tpot|e2e)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*", part)
        if match is None:
            raise ConfigError(
                f"SLO has {part.strip()!r}; it needs ttft=, tpot= or e2e= and a time in s or ms, "
                f"as in --slo ttft=2s,tpot=50ms"
            )
        slo[match[1]] = float(match[2]) * (0.001 if match[3] == "ms" else 1.0)
    return slo


def is_within(got: Mapping[str, float | None], slo: Mapping[str, float]) -> bool:
    """Whether no metric misses its bound; one that there is none of (TPOT of a token) does not."""
    return all((value := got[name]) is None or value <= bound for name, bound in slo.items())


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, interpolated linearly (numpy's default)."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def statistics(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, p50, p95, p99, p99.9 and max; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    percentiles = {f"p{percent}": percentile(ordered, percent) for percent in (50, 95, 99, 99.9)}
    return {"mean": math.fsum(ordered) / len(ordered), **percentiles, "max": ordered[-1]}


def distribution(values: Sequence[float]) -> list[float]:
    """Percentiles 0 to 100; empty of nothing."""
    ordered = sorted(values)
    return [percentile(ordered, percent) for percent in range(101)] if ordered else []
