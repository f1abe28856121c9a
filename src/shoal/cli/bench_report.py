"""From what a load test saw to percentiles and goodput: a dict for machines, a table for people.

TTFT and E2E count from the scheduled time. TPOT is (last - first piece) / (tokens - 1), ITL
the gaps between pieces. Knows nothing of HTTP.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from shoal.cli.latency_table import goodput_lines, latency_table
from shoal.cli.loadgen import RequestRecord
from shoal.core.latency import METRICS, distribution, is_within, statistics


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of one request that succeeded, in seconds; `tpot_s` is None for a single token."""

    ttft_s: float
    tpot_s: float | None
    itl_s: tuple[float, ...]
    e2e_s: float
    output_tokens: int


def latencies_of(record: RequestRecord) -> Latencies | None:
    """None for a request that failed."""
    if record.error is not None or not record.chunk_times_s:
        return None
    times = record.chunk_times_s
    tokens = len(times) if record.output_tokens is None else record.output_tokens
    return Latencies(
        ttft_s=times[0] - record.scheduled_s,
        tpot_s=(times[-1] - times[0]) / (tokens - 1) if tokens > 1 else None,
        itl_s=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
        e2e_s=record.end_s - record.scheduled_s,
        output_tokens=tokens,
    )


def meets(latencies: Latencies | None, slo: Mapping[str, float]) -> bool:
    """Whether a request succeeded within every bound; a single token has no TPOT to miss."""
    if latencies is None:
        return False
    got = {"ttft": latencies.ttft_s, "tpot": latencies.tpot_s, "e2e": latencies.e2e_s}
    return is_within(got, slo)


def summarise(
    records: Sequence[RequestRecord], *, num_planned: int, slo: Mapping[str, float]
) -> dict[str, Any]:
    """Everything of the report that follows from the records. Times in seconds."""
    good = [found for record in records if (found := latencies_of(record)) is not None]
    duration_s = max((record.end_s for record in records), default=0.0)
    errors = Counter(_kind(record) for record in records if record.error is not None)
    output_tokens = sum(found.output_tokens for found in good)
    prompt_tokens = sum(r.prompt_tokens or 0 for r in records if r.error is None)
    values = {
        "ttft": [found.ttft_s for found in good],
        "tpot": [found.tpot_s for found in good if found.tpot_s is not None],
        "itl": [gap for found in good for gap in found.itl_s],
        "e2e": [found.e2e_s for found in good],
    }
    summary: dict[str, Any] = {
        "requests": {
            "planned": num_planned,
            "finished": len(records),
            "succeeded": len(good),
            "refused": errors.get("refused", 0),
            "failed": len(records) - len(good) - errors.get("refused", 0),
        },
        "errors": {
            kind: {
                "count": count,
                "example": next(r.message for r in records if r.error and _kind(r) == kind),
            }
            for kind, count in errors.most_common()
        },
        "duration_s": duration_s,
        "tokens": {
            "prompt": prompt_tokens,
            "output": output_tokens,
            "counted_by": "usage"
            if all(r.output_tokens is not None for r in records if r.error is None)
            else "pieces",
        },
        "throughput": {
            "requests_per_s": _per_s(len(good), duration_s),
            "output_tokens_per_s": _per_s(output_tokens, duration_s),
            "prompt_tokens_per_s": _per_s(prompt_tokens, duration_s),
        },
        "latency_s": {name: statistics(values[name]) for name in METRICS},
        "cdf": {name: distribution(values[name]) for name in METRICS},
        "send_lag_s": statistics([record.sent_s - record.scheduled_s for record in records]),
        "delayed_by_concurrency_limit": sum(record.waited_for_slot for record in records),
    }
    if slo:
        num_within = sum(meets(latencies_of(record), slo) for record in records)
        summary["goodput"] = {
            "slo_s": dict(slo),
            "share": num_within / len(records) if records else 0.0,
            "requests_per_s": _per_s(num_within, duration_s),
        }
    return summary


def render(report: Mapping[str, Any]) -> RenderableType:
    """The report as a person reads it."""
    requests, throughput = report["requests"], report["throughput"]
    table = latency_table(
        f"{report['model']} at {report['url']}",
        {name: report["latency_s"][name] for name in METRICS},
    )
    lines = [
        f"{report['workload']}: {requests['succeeded']} of {requests['planned']} requests "
        f"succeeded, {requests['refused']} refused, {requests['failed']} failed, "
        f"in {report['duration_s']:.1f} s",
        f"throughput: {throughput['requests_per_s']:.2f} requests/s, "
        f"{throughput['output_tokens_per_s']:.1f} output tokens/s, "
        f"{throughput['prompt_tokens_per_s']:.1f} prompt tokens/s",
    ]
    lines += goodput_lines(report)
    lines += [
        f"{found['count']} x {kind}: {found['example']}" for kind, found in report["errors"].items()
    ]
    lines += [f"note: {note}" for note in report["notes"]]
    return Group(table, *(Text(line) for line in lines))


def _kind(record: RequestRecord) -> str:
    return f"http_{record.status}" if record.error == "http" else str(record.error)


def _per_s(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0
