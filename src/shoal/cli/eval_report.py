"""How `shoal eval` shows what it found: a table for people, and a bar while they wait.

Knows nothing of models; a report is the dictionary that --json prints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def table(report: dict[str, Any]) -> str:
    """One column for each model, then what sets them apart."""
    sides = [report[side] for side in ("model", "against") if side in report]
    cells = [
        ("", [side["model"] for side in sides]),
        ("precision", [side["precision"] for side in sides]),
        ("kernels", [side["kernels"] for side in sides]),
        ("perplexity", [_with_error(side) for side in sides]),
    ]
    width = max(len(cell) for _, row in cells for cell in row)
    lines = [f"{name:<16}" + "  ".join(f"{cell:<{width}}" for cell in row) for name, row in cells]
    if len(sides) > 1:
        lines += [
            f"ratio           {report['perplexity_ratio']:.4f}",
            f"KL divergence   {report['kl_mean']:.3g} mean, {report['kl_median']:.3g} median, "
            f"{report['kl_p99']:.3g} p99, {report['kl_max']:.3g} max (nats a token)",
            f"top-1 agreement {report['top1_agreement']:.2%}",
            f"mean |Δ log p|  {report['mean_abs_logprob_difference']:.3g}",
        ]
    lines.append(
        f"{report['num_scored']:,} tokens scored, in {report['num_windows']} windows of "
        f"{report['context']}, {report['evaluate_s']:.1f} s"
    )
    return "\n".join(line.rstrip() for line in lines)


def _with_error(side: dict[str, Any]) -> str:
    return f"{side['perplexity']:.4f} ± {side['perplexity_error']:.4f}"


@contextmanager
def window_bar() -> Iterator[Callable[[int, int], None]]:
    """A callback (windows done, windows in all) that draws a bar, on a terminal, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("windows", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console, shown = Console(stderr=True), sys.stderr.isatty()
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("windows")
        yield lambda done, total: bar.update(task, completed=done, total=total)
