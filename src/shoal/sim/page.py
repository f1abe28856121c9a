"""A report as one HTML page with its plots drawn inside: nothing is fetched, nothing runs.

Knows nothing of simulations beyond the report's keys.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from shoal.sim.plots import MOST_LINES, STYLE, Line, plot

_STYLE = (
    STYLE
    + """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
       color: var(--ink); background: var(--paper) }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid var(--faint) }
td:first-child, th:first-child { text-align: left; padding-left: 0; white-space: nowrap }
svg { max-width: 100%; height: auto }
summary { cursor: pointer; margin-bottom: .5rem }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start }
.wide { overflow-x: auto }
"""
)
_MOST_ROWS = 16
"""Of a table that stands open."""

_NAMES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2e": "E2E",
    "queue": "wait for the first Step",
}


def html_page(report: Mapping[str, Any]) -> str:
    """A whole document.

    Args:
        report: of `summarise`, with `title` and `notes` beside it.
    """
    title = escape(str(report["title"]))
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in report["notes"])
    body = [
        f"<h1>{title}</h1><p>{_sentence(report)}</p>",
        *_latencies(report),
        "<h2>Over time</h2>",
        _plots(_over_time(report["series"])),
        "<h2>Replicas</h2>",
        _replica_table(report["replicas"]),
        f"<h2>Notes</h2><ul>{notes}</ul>" if notes else "",
    ]
    return document(title, body)


def document(title: str, body: Sequence[str]) -> str:
    """Pieces of HTML as a page.

    Args:
        title: escaped.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _sentence(report: Mapping[str, Any]) -> str:
    requests, throughput = report["requests"], report["throughput"]
    text = (
        f"{requests['succeeded']:,} of {requests['planned']:,} requests succeeded in "
        f"{report['duration_s']:,.1f} s; {throughput['requests_per_s']:.2f} requests/s, "
        f"{throughput['output_tokens_per_s']:,.0f} output tokens/s"
    )
    if goodput := report.get("goodput"):
        bounds = ", ".join(f"{_NAMES[k]} ≤ {v * 1000:g} ms" for k, v in goodput["slo_s"].items())
        text += f"; {goodput['share']:.1%} of them with {bounds}"
    return escape(text + ".")


def _latencies(report: Mapping[str, Any]) -> list[str]:
    if not any(report["cdf"].values()):
        return ["<p>No request succeeded, so there are no latencies.</p>"]
    return [
        _latency_table(report["latency_s"]),
        "<h2>How many requests are within</h2>",
        _plots(_distributions(report["cdf"])),
    ]


def _latency_table(latencies: Mapping[str, Any]) -> str:
    columns = ("mean", "p50", "p95", "p99", "max")
    rows = [
        [_NAMES[name], *(f"{found[column] * 1000:,.1f}" for column in columns)]
        for name, found in latencies.items()
        if found is not None
    ]
    return _table(["ms", *columns], rows)


def _replica_table(replicas: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            str(each["name"]),
            f"{each['steps']:,}",
            f"{each['output_tokens']:,}",
            f"{each['preemptions']:,}",
            f"{each['cached_tokens']:,}",
            ", ".join(f"{share:.0%}" for share in each["utilisation"]),
        ]
        for each in replicas
    ]
    heads = ("replica", "Steps", "output tokens", "preemptions", "cached tokens", "busy")
    table = _table(heads, rows)
    if len(rows) <= _MOST_ROWS:
        return table
    return f"<details><summary>all {len(rows):,}</summary>{table}</details>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _plots(plots: Sequence[str]) -> str:
    return '<div class="plots">' + "".join(plots) + "</div>"


def _distributions(cdf: Mapping[str, Sequence[float]]) -> list[str]:
    return [
        plot(f"{_NAMES[name]}, s", [Line("", values, list(range(len(values))))], "% of requests")
        for name, values in cdf.items()
        if values
    ]


def _over_time(series: Mapping[str, Any]) -> list[str]:
    at_s, replicas = series["at_s"], series["replicas"]

    def of_replicas(key: str) -> list[Line]:
        return _tellable([Line(str(each["name"]), at_s, each[key]) for each in replicas])

    def of_instances(key: str) -> list[Line]:
        return _tellable(
            [
                Line(f"{each['name']} i{at}" if len(each[key]) > 1 else each["name"], at_s, values)
                for each in replicas
                for at, values in enumerate(each[key])
            ]
        )

    ttft = [Line("p50", at_s, series["ttft_p50"]), Line("p95", at_s, series["ttft_p95"])]
    return [
        plot("time, s", lines, title, most_y)
        for title, lines, most_y in (
            ("arrivals/s", [Line("", at_s, series["arrivals_per_s"])], None),
            ("TTFT, s", ttft, None),
            ("requests that wait", of_replicas("waiting"), None),
            ("requests that run", of_replicas("running"), None),
            ("output tokens/s", of_replicas("output_tokens_per_s"), None),
            ("KV in use, share", of_replicas("kv_share"), None),
            # A Step counts where it ends, which gives a span a little more than all of its time.
            ("busy, share of time", of_instances("utilisation"), 1.0),
            ("Steps that wait", of_instances("queued"), None),
        )
    ]


def _tellable(lines: Sequence[Line]) -> list[Line]:
    """The same, or where they are too many to be told apart, what they lie between."""
    if len(lines) <= MOST_LINES:
        return list(lines)
    columns = [
        [value for value in each if value is not None]
        for each in zip(*(line.y for line in lines), strict=True)
    ]
    return [
        Line(
            f"{name} of {len(lines)}", lines[0].x, [of(each) if each else None for each in columns]
        )
        for name, of in (("least", min), ("median", statistics.median), ("most", max))
    ]
