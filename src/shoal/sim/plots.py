"""Line plots as SVG: axes, ticks, a legend below. Knows nothing of what is plotted.

Colours are variables of the page that holds a plot (`STYLE`), which has them for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 22, 26, 38
_LEGEND_COLUMNS, _LEGEND_ROW = 4, 15
_NUM_COLOURS = 8
MOST_LINES = _NUM_COLOURS
"""That can be told apart."""

_LIGHT = ("#2563a8", "#c2512f", "#3a8a4d", "#8a4fa3", "#a8842c", "#3b8f9e", "#b04a72", "#5b6472")
_DARK = ("#6ea8e6", "#ec8a68", "#74c487", "#c393da", "#dcb95e", "#74c5d3", "#e386aa", "#a3adba")

STYLE = """
:root {{ color-scheme: light dark; --ink: #1c2733; --paper: #fff; --faint: #e4e8ed; --axis: #8a94a0;
        {light} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #d9e0e8; --paper: #12161b; --faint: #2a323b; --axis: #6d7783; {dark} }} }}
svg text {{ fill: var(--ink) }} svg .grid {{ stroke: var(--faint) }}
svg .axis {{ stroke: var(--axis); fill: none }}
svg polyline {{ fill: none; stroke-width: 1.5; stroke-linejoin: round }}
""".format(
    light=" ".join(f"--line{number}: {colour};" for number, colour in enumerate(_LIGHT)),
    dark=" ".join(f"--line{number}: {colour};" for number, colour in enumerate(_DARK)),
)


@dataclass(frozen=True, slots=True)
class Line:
    """Points; where y is None the line is broken."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class _Frame:
    """From values to pixels; both axes begin at 0."""

    most_x: float
    most_y: float

    def x(self, value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / self.most_x

    def y(self, value: float) -> float:
        share = min(value / self.most_y, 1.0)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share


def plot(x_label: str, lines: Sequence[Line], title: str, most_y: float | None = None) -> str:
    """An <svg>.

    Args:
        most_y: of the axis; what is above it is drawn at its end. None: by the largest value.
    """
    frame = _Frame(
        _nice(max((value for line in lines for value in line.x), default=0.0)),
        most_y or _nice(max((v for line in lines for v in line.y if v is not None), default=0.0)),
    )
    drawn = [
        f'<polyline style="stroke: var(--line{index % _NUM_COLOURS})" points="{points}"/>'
        for index, line in enumerate(lines)
        for points in _pieces(line, frame)
    ]
    legend, height = _legend(lines)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-size="11" role="img" aria-label="{escape(title)}">'
        f'<text x="{_LEFT}" y="14" font-weight="600">{escape(title)}</text>'
        + _axes(frame, x_label)
        + "".join(drawn)
        + legend
        + "</svg>"
    )


def _pieces(line: Line, frame: _Frame) -> list[str]:
    """Runs of points; one that stands alone is drawn as a short dash."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((frame.x(x), frame.y(y)))
    runs = [
        [(run[0][0] - 1, run[0][1]), (run[0][0] + 1, run[0][1])] if len(run) == 1 else run
        for run in pieces
        if run
    ]
    return [" ".join(f"{x:.1f},{y:.1f}" for x, y in run) for run in runs]


def _axes(frame: _Frame, x_label: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<text x="{right}" y="{_HEIGHT - 8}" text-anchor="end">{escape(x_label)}</text>',
        f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>',
    ]
    for quarter in range(5):
        x, y = frame.most_x * quarter / 4, frame.most_y * quarter / 4
        parts += [
            f'<text x="{frame.x(x):.1f}" y="{bottom + 15}" text-anchor="middle">{x:g}</text>',
            f'<text x="{_LEFT - 6}" y="{frame.y(y) + 4:.1f}" text-anchor="end">{y:g}</text>',
            f'<path class="grid" d="M{_LEFT} {frame.y(y):.1f}H{right}"/>',
        ]
    return "".join(parts)


def _legend(lines: Sequence[Line]) -> tuple[str, int]:
    """Below the axis, so that it hides no line; and the height of all."""
    names = [line.name for line in lines if line.name]
    if len(names) < 2:
        return "", _HEIGHT
    step = (_WIDTH - _LEFT) / _LEGEND_COLUMNS
    parts = []
    for index, name in enumerate(names):
        row, column = divmod(index, _LEGEND_COLUMNS)
        x, y = _LEFT + step * column, _HEIGHT + 8 + _LEGEND_ROW * row
        parts.append(
            f'<path d="M{x:.0f} {y - 4}h14" stroke-width="3" '
            f'style="stroke: var(--line{index % _NUM_COLOURS})"/>'
            f'<text x="{x + 18:.0f}" y="{y}">{escape(_short(name))}</text>'
        )
    rows = -(-len(names) // _LEGEND_COLUMNS)
    return "".join(parts), _HEIGHT + _LEGEND_ROW * rows


def _short(name: str) -> str:
    return name if len(name) <= 13 else f"{name[:6]}…{name[-6:]}"


def _nice(value: float) -> float:
    """The next number whose quarters read well."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.2, 1.6, 2, 2.4, 2.8, 3.2, 4, 4.8, 6, 8, 10)
    return next(step * power for step in steps if step * power >= value * (1 - 1e-9))
