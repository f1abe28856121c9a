"""Line plots as SVG: axes, ticks, a legend. Knows nothing of what is plotted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 26, 38
_COLOURS = ("#2563a8", "#c2512f", "#3a8a4d", "#8a4fa3", "#a8842c", "#3b8f9e", "#b04a72", "#5b6472")
_MOST_NAMED = 8


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
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / self.most_y


def plot(x_label: str, lines: Sequence[Line], title: str) -> str:
    """An <svg>."""
    frame = _Frame(
        _nice(max((value for line in lines for value in line.x), default=0.0)),
        _nice(max((v for line in lines for v in line.y if v is not None), default=0.0)),
    )
    drawn = [
        f'<polyline fill="none" stroke="{_COLOURS[index % len(_COLOURS)]}" stroke-width="1.5" '
        f'points="{points}"/>'
        for index, line in enumerate(lines)
        for points in _pieces(line, frame)
    ]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'font-size="11" fill="#1c2733" role="img" aria-label="{escape(title)}">'
        f'<text x="{_LEFT}" y="14" font-weight="600">{escape(title)}</text>'
        + _axes(frame, x_label)
        + "".join(drawn)
        + _legend(lines)
        + "</svg>"
    )


def _pieces(line: Line, frame: _Frame) -> list[str]:
    pieces: list[list[str]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{frame.x(x):.1f},{frame.y(y):.1f}")
    return [" ".join(piece) for piece in pieces if piece]


def _axes(frame: _Frame, x_label: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<text x="{right}" y="{_HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>',
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#8a94a0"/>',
    ]
    for quarter in range(5):
        x, y = frame.most_x * quarter / 4, frame.most_y * quarter / 4
        parts += [
            f'<text x="{frame.x(x):.1f}" y="{bottom + 15}" text-anchor="middle">{x:g}</text>',
            f'<text x="{_LEFT - 6}" y="{frame.y(y) + 4:.1f}" text-anchor="end">{y:g}</text>',
            f'<path d="M{_LEFT} {frame.y(y):.1f}H{right}" stroke="#e4e8ed"/>',
        ]
    return "".join(parts)


def _legend(lines: Sequence[Line]) -> str:
    named = [(index, line.name) for index, line in enumerate(lines) if line.name]
    if len(named) < 2:
        return ""
    return "".join(
        f'<text x="{_WIDTH - _RIGHT}" y="{_TOP + 10 + 13 * place}" text-anchor="end" '
        f'fill="{_COLOURS[index % len(_COLOURS)]}">{escape(name)}</text>'
        for place, (index, name) in enumerate(named[:_MOST_NAMED])
    )


def _nice(value: float) -> float:
    """The next of 1, 2, 4, 6, 8, 10 times a power of ten, whose quarters read well."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 4, 6, 8, 10) if factor * power >= value)
