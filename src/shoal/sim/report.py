"""From records to percentiles, goodput, utilisation and what they were over time: a dict.

The same names as the report of `shoal bench` where they mean the same, so that a simulated and a
measured run can be laid side by side. Knows nothing of pages or tables.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from shoal.core.latency import distribution, is_within, percentile, statistics
from shoal.core.stats import EngineStats
from shoal.sim.records import Gaps, Records, RequestRecord, Sample
from shoal.sim.setup import ReplicaSetup


def summarise(
    records: Records,
    replicas: Sequence[ReplicaSetup],
    stats: Mapping[str, EngineStats],
    slo: Mapping[str, float],
) -> dict[str, Any]:
    """Times in seconds. Requests that had not come when it ended count nowhere but as such.

    Args:
        stats: counters of each replica at the end.
        slo: bounds by metric, for goodput; may be empty.
    """
    requests = [each for each in records.requests if each.arrival_s <= records.end_s]
    good = [each for each in requests if each.is_good]
    errors = Counter(each.error for each in requests if each.error is not None)
    refused = errors["queue_full"] + errors["overloaded"]
    output_tokens = sum(each.num_output for each in good)
    end_s = records.end_s
    summary: dict[str, Any] = {
        "requests": {
            "planned": len(requests),
            "finished": sum(each.is_finished for each in requests),
            "succeeded": len(good),
            "refused": refused,
            "failed": errors.total() - refused,
            "never_ended": sum(not each.is_finished for each in requests),
            "not_come": len(records.requests) - len(requests),
        },
        "errors": dict(sorted(errors.items())),
        "duration_s": end_s,
        "tokens": {
            "prompt": sum(each.prompt_tokens for each in good),
            "cached": sum(each.num_cached for each in good),
            "output": output_tokens,
        },
        "throughput": {
            "requests_per_s": _per_s(len(good), end_s),
            "output_tokens_per_s": _per_s(output_tokens, end_s),
            "prompt_tokens_per_s": _per_s(sum(each.prompt_tokens for each in good), end_s),
        },
        "latency_s": _latencies(good, records.gaps),
        "replicas": [
            _replica(index, each, stats[each.name], records) for index, each in enumerate(replicas)
        ],
        "replans": [
            {"at_s": each.at_s, "replica": each.replica, **asdict(each.lag)}
            for each in records.replans
        ],
        "series": _series(records, replicas),
        "cdf": {name: distribution(values) for name, values in _metrics(good).items()},
    }
    if slo:
        within = sum(_is_good(each, slo) for each in requests)
        summary["goodput"] = {
            "slo_s": dict(slo),
            "share": within / len(requests) if requests else 0.0,
            "requests_per_s": _per_s(within, end_s),
        }
    return summary


def _metrics(good: Sequence[RequestRecord]) -> dict[str, list[float]]:
    return {
        "ttft": [each.ttft_s for each in good if each.ttft_s is not None],
        "tpot": [each.tpot_s for each in good if each.tpot_s is not None],
        "e2e": [each.e2e_s for each in good if each.e2e_s is not None],
        "queue": [each.queue_s for each in good if each.queue_s is not None],
    }


def _latencies(good: Sequence[RequestRecord], gaps: Gaps) -> dict[str, Any]:
    found: dict[str, Any] = {name: statistics(each) for name, each in _metrics(good).items()}
    num_gaps = sum(max(each.num_output - 1, 0) for each in good)
    if num_gaps and gaps.counts:
        spans = (each.last_s - each.first_s for each in good if each.last_s and each.first_s)
        found["itl"] = {
            "mean": math.fsum(spans) / num_gaps,
            **{f"p{percent}": gaps.percentile(percent) for percent in (50, 95, 99)},
            "max": gaps.longest_s,
        }
    return found


def _is_good(record: RequestRecord, slo: Mapping[str, float]) -> bool:
    got = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2e": record.e2e_s}
    return record.is_good and is_within(got, slo)


def _replica(index: int, setup: ReplicaSetup, stats: EngineStats, records: Records) -> Any:
    busy_s = records.samples[-1].replicas[index].busy_s
    return {
        "name": setup.name,
        "role": setup.role,
        "steps": stats.computed.steps,
        "output_tokens": stats.output_tokens,
        "preemptions": stats.preemptions,
        "cached_tokens": stats.cached_tokens,
        "kv_blocks": list(setup.config.instance_blocks),
        "utilisation": [_per_s(each, records.end_s) for each in busy_s],
    }


def _series(records: Records, replicas: Sequence[ReplicaSetup]) -> dict[str, Any]:
    """Between two looks each; `at_s` is when the later one was.

    A Step counts where it ends, so a share of time may be a little more than 1.
    """
    samples = _whole(records.samples)
    edges = [each.at_s for each in samples[1:]]
    firsts = _ttfts_between(records.requests, edges)
    arrivals = _counts([each.arrival_s for each in records.requests], edges)
    return {
        "at_s": edges,
        "arrivals_per_s": _rates(arrivals, samples),
        "ttft_p50": [percentile(each, 50) if each else None for each in firsts],
        "ttft_p95": [percentile(each, 95) if each else None for each in firsts],
        "replicas": [
            {"name": setup.name, **_replica_series(samples, index)}
            for index, setup in enumerate(replicas)
        ],
    }


def _whole(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Without a last span that is so short that its rates would say nothing."""
    if len(samples) > 2:
        before, last, end = (each.at_s for each in samples[-3:])
        if end - last < (last - before) / 2:
            return [*samples[:-2], samples[-1]]
    return samples


def _replica_series(samples: Sequence[Sample], index: int) -> dict[str, Any]:
    looks = [each.replicas[index] for each in samples]
    tokens = [later.output_tokens - now.output_tokens for now, later in pairwise(looks)]
    instances = range(len(looks[0].busy_s))
    return {
        "running": [each.running for each in looks[1:]],
        "waiting": [each.waiting for each in looks[1:]],
        "kv_share": [each.kv_share for each in looks[1:]],
        "output_tokens_per_s": _rates(tokens, samples),
        "queued": [[each.queued[at] for each in looks[1:]] for at in instances],
        "utilisation": [
            _rates([later.busy_s[at] - now.busy_s[at] for now, later in pairwise(looks)], samples)
            for at in instances
        ],
    }


def _ttfts_between(requests: Sequence[RequestRecord], edges: Sequence[float]) -> list[list[float]]:
    """TTFTs in order, by when the first token came."""
    found: list[list[float]] = [[] for _ in edges]
    for each in requests:
        if each.first_s is not None and each.ttft_s is not None:
            found[bisect_left(edges, each.first_s)].append(each.ttft_s)
    return [sorted(each) for each in found]


def _counts(times: Sequence[float], edges: Sequence[float]) -> list[int]:
    counts = [0] * len(edges)
    for each in times:
        if edges and each <= edges[-1]:
            counts[bisect_left(edges, each)] += 1
    return counts


def _rates(amounts: Sequence[float], samples: Sequence[Sample]) -> list[float]:
    spans = (later.at_s - now.at_s for now, later in pairwise(samples))
    return [_per_s(amount, span) for amount, span in zip(amounts, spans, strict=True)]


def _per_s(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
