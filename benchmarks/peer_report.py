"""From raw turns to medians, the targets they should meet, and a table for people.

Takes and gives plain dicts, as they stand in the JSON file. Knows nothing of engines but which
of their names are shoal's, and what shoal promises against whom.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

MIB = 1 << 20

Turn = Mapping[str, Any]
Summary = dict[str, dict[str, dict[str, float]]]
"""variant → metric → {"median", "min", "max"}"""


def _rate(run: Mapping[str, Any]) -> float:
    """Tokens a second, prefill included."""
    return float(run["num_prompts"] * run["num_tokens"] / run["last_s"])


def _step_s(run: Mapping[str, Any]) -> float:
    """Between tokens, first to last."""
    return float((run["last_s"] - run["first_s"]) / (run["num_tokens"] - 1))


_METRICS: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], float]]] = {
    "decode_tokens_per_s": ("common", "single", lambda run: 1 / _step_s(run)),
    "batch_tokens_per_s": ("common", "batch", _rate),
    "prefill_s": ("common", "prefill", lambda run: float(run["first_s"])),
    "growth_batch_tokens_per_s": ("growth", "batch", _rate),
    "crowd_tokens_per_s": ("growth", "crowd", _rate),
    "step_short_ms": ("growth", "short", lambda run: 1000 * _step_s(run)),
    "step_long_ms": ("growth", "long", lambda run: 1000 * _step_s(run)),
}
"""metric → task set, task, value of one run"""


def summarise(turns: Iterable[Turn], prefill_tokens: int) -> Summary:
    """Medians over rounds (of a round's repeats: their median) with the extremes."""
    values: dict[str, dict[str, list[float]]] = {}
    for turn in turns:
        rows = values.setdefault(turn["variant"], {})
        if "error" in turn:
            continue
        for name, (task_set, task, value_of) in _METRICS.items():
            if turn["task_set"] == task_set and task in turn["tasks"]:
                runs = [value_of(run) for run in turn["tasks"][task]]
                rows.setdefault(name, []).append(statistics.median(runs))
        if turn["task_set"] == "common":
            rows.setdefault("start_s", []).append(turn["start_s"])
            rows.setdefault("peak_rss_mib", []).append(turn["peak_rss_bytes"] / MIB)
    for rows in values.values():
        if "prefill_s" in rows:
            seconds = rows.pop("prefill_s")
            rows["prefill_tokens_per_s"] = [prefill_tokens / each for each in seconds]
    return {
        variant: {name: spread(numbers) for name, numbers in rows.items()}
        for variant, rows in values.items()
    }


def spread(numbers: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}


def targets(
    summary: Summary, floors: Mapping[str, float], import_torch_s: float
) -> list[dict[str, Any]]:
    """What shoal should reach, against what the same run measured: {"what", "got", "need", "ok"}.

    Args:
        floors: of each shoal variant, tokens a second if reading its weights were all it did.
    """
    rows: list[dict[str, Any]] = []

    def add(what: str, got: float | None, need: float | None, *, at_least: bool) -> None:
        ok = None
        if got is not None and need is not None:
            ok = got >= need if at_least else got <= need
        rows.append({"what": what, "got": got, "need": need, "at_least": at_least, "ok": ok})

    def median(variant: str, metric: str) -> float | None:
        found = summary.get(variant, {}).get(metric)
        return None if found is None else found["median"]

    def best(metric: str, *, ours: bool) -> float | None:
        found = [
            rows[metric]["median"]
            for variant, rows in summary.items()
            if metric in rows and variant.startswith("shoal ") == ours
        ]
        return max(found, default=None)

    for ours, theirs, factor in _SINGLE_STREAM:
        peer, floor = median(theirs, "decode_tokens_per_s"), floors.get(ours)
        bounds = [peer and factor * peer, floor and _FLOOR_SHARE * floor]
        need = None if None in bounds else min(bound for bound in bounds if bound is not None)
        what = f"decode, {ours}, tok/s: the smaller of {factor}x {theirs} and 75 % of the floor"
        add(what, median(ours, "decode_tokens_per_s"), need, at_least=True)
    for metric, factor, what in _AGAINST_BEST:
        theirs_best = best(metric, ours=False)
        need = theirs_best and factor * theirs_best
        add(f"{what}: {factor}x the best peer", best(metric, ours=True), need, at_least=True)
    ours_only = [variant for variant in summary if variant.startswith("shoal ")]
    for variant in ours_only:
        short, long = median(variant, "step_short_ms"), median(variant, "step_long_ms")
        ratio = None if short is None or long is None else long / short
        add(f"step at the long context over the short, {variant}", ratio, 1.5, at_least=False)
    for variant in ours_only:
        few, many = (median(variant, f"{name}_tokens_per_s") for name in ("growth_batch", "crowd"))
        ratio = None if few is None or many is None else many / few
        add(f"throughput of 64 requests over 16, {variant}", ratio, 1.0, at_least=True)
    llama_mib = median("llama q4_0", "peak_rss_mib")
    rss_need = None if llama_mib is None else llama_mib + 350e6 / MIB
    rss = median("shoal int4", "peak_rss_mib")
    add("peak RSS, shoal int4, MiB: llama q4_0's + 350 MB", rss, rss_need, at_least=False)
    for variant in ours_only:
        start = median(variant, "start_s")
        add(
            f"start to first token, {variant}, s: import torch + 1 s",
            start,
            import_torch_s + 1,
            at_least=False,
        )
    return rows


_FLOOR_SHARE = 0.75
_SINGLE_STREAM = (
    ("shoal bf16", "llama bf16", 1.6),
    ("shoal int8", "llama q8_0", 1.8),
    ("shoal int4", "llama q4_0", 1.6),
)
_AGAINST_BEST = (
    ("batch_tokens_per_s", 1.2, "16 requests, tok/s"),
    ("prefill_tokens_per_s", 1.0, "prefill, tok/s"),
)

# --- for people ---

_COMMON_COLUMNS = (
    ("decode_tokens_per_s", "decode tok/s", 1),
    ("batch_tokens_per_s", "{batch} requests tok/s", 0),
    ("prefill_tokens_per_s", "prefill {prefill} tok/s", 0),
    ("peak_rss_mib", "peak RSS MiB", 0),
    ("start_s", "start s", 2),
)
_GROWTH_COLUMNS = (
    ("step_short_ms", "step at {short_context} ms", 2),
    ("step_long_ms", "step at {long_context} ms", 2),
    ("growth_batch_tokens_per_s", "{batch} requests tok/s", 0),
    ("crowd_tokens_per_s", "{crowd} requests tok/s", 0),
)


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page; medians, with (smallest–largest)."""
    sizes, machine = report["sizes"], report["machine"]
    lines = [
        f"# shoal and its peers, {report['date']}",
        "",
        f"`{report['command']}` at {report['commit']}, model {report['model']}.",
        f"{machine['cpu']}, {machine['cores']} cores ({machine['instructions']}), "
        f"{machine['memory_gib']} GiB; {report['num_threads']} threads.",
        "",
        f"{report['num_rounds']} rounds, interleaved; medians (smallest–largest). Greedy, token "
        f"ids in and out. Decode: {sizes['single_prompt']} + {sizes['single_tokens']} tokens, "
        f"first to last. {sizes['batch']} requests: {sizes['batch_prompt']} + "
        f"{sizes['batch_tokens']} tokens each, output tokens over all the time. Peak RSS: over "
        f"these tasks, with a KV cache for them and no more (OpenVINO and vLLM: 1 GiB, their "
        f"least). Start: from the process's start to its first token, files cached; a bare "
        f"`import torch` took {_cell(report['import_torch_s'], 2)} s.",
        "",
        *_table(report["summary"], _COMMON_COLUMNS, sizes),
        "",
        *_table(
            {name: rows for name, rows in report["summary"].items() if "step_short_ms" in rows},
            _GROWTH_COLUMNS,
            sizes,
        ),
        "",
        *_floor_lines(report),
        "",
        "| shoal should | got | needed | |",
        "|---|---|---|---|",
        *(_target_line(row) for row in report["targets"]),
        "",
        *(f"- {name}: not run: {reason}" for name, reason in report["failures"].items()),
        *(
            f"- {name}: " + ", ".join(f"{package} {each}" for package, each in versions.items())
            for name, versions in report["versions"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _table(
    summary: Summary, columns: Sequence[tuple[str, str, int]], sizes: Mapping[str, int]
) -> list[str]:
    if not summary:
        return []
    titles = [title.format(**sizes) for _, title, _ in columns]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    for variant, rows in summary.items():
        cells = [_cell(rows.get(metric), digits) for metric, _, digits in columns]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return lines


def _cell(values: Mapping[str, float] | None, digits: int) -> str:
    if values is None:
        return "—"
    median, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({low}–{high})"


def _floor_lines(report: Mapping[str, Any]) -> list[str]:
    bandwidth = report["bandwidth_gb_s"]
    if bandwidth is None:
        return [f"Bandwidth not measured: {report['bandwidth_error']}"]
    lines = [
        f"Memory reads at {_cell(bandwidth, 1)} GB/s (264 MB in huge pages, "
        f"{report['num_threads']} threads). At that rate, reading the weights of a token alone:",
    ]
    for variant, floor in report["floors"].items():
        weight_bytes = report["weight_bytes"][variant]
        lines.append(f"- {variant}: {weight_bytes / 1e6:.0f} MB, at most {floor:.1f} tok/s")
    return lines


def _target_line(row: Mapping[str, Any]) -> str:
    sign = "≥" if row["at_least"] else "≤"
    got = "—" if row["got"] is None else f"{row['got']:.2f}"
    need = "—" if row["need"] is None else f"{sign} {row['need']:.2f}"
    verdict = {True: "yes", False: "**no**", None: "not measured"}[row["ok"]]
    return f"| {row['what']} | {got} | {need} | {verdict} |"
