"""Latencies and goodput as a person reads them, of a measured and of a simulated run alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

_COLUMNS = ("mean", "p50", "p95", "p99")


def latency_table(title: str, latency_s: Mapping[str, Mapping[str, float] | None]) -> Table:
    """A row for each metric, in milliseconds; None: nothing was measured."""
    table = Table(title=title, title_justify="left")
    table.add_column("ms")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for name, found in latency_s.items():
        cells = (f"{found[column] * 1000:,.1f}" if found else "-" for column in _COLUMNS)
        table.add_row(name.upper(), *cells)
    return table


def policy_table(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each policy, in milliseconds."""
    first = next(iter(reports.values()))
    table = Table(title=f"{first['title']}: {first['workload']}", title_justify="left")
    table.add_column("ms")
    for column in ("TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "goodput"):
        table.add_column(column, justify="right")
    for policy, report in reports.items():
        found = [report["latency_s"][metric] for metric in ("ttft", "tpot")]
        cells = [
            f"{each[column] * 1000:,.1f}" if each else "-"
            for each in found
            for column in ("p50", "p99")
        ]
        goodput = report.get("goodput")
        table.add_row(policy, *cells, f"{goodput['share']:.1%}" if goodput else "-")
    return table


def goodput_lines(report: Mapping[str, Any]) -> list[str]:
    """One, if bounds were given."""
    if not (goodput := report.get("goodput")):
        return []
    bounds = ", ".join(f"{k.upper()} <= {v * 1000:g} ms" for k, v in goodput["slo_s"].items())
    return [
        f"goodput: {goodput['share']:.1%} of requests, "
        f"{goodput['requests_per_s']:.2f} requests/s ({bounds})"
    ]
