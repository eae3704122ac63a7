"""The two plots of docs/performance.md as SVG text: bars on a logarithmic scale, and lines over time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

INK, FAINT, PAPER, RED = "#1f2933", "#d5dbe1", "#ffffff", "#e8b4a0"
OURS, THEIRS = "#0b6e4f", "#8795a5"
LINES = ("#0b6e4f", "#c1440e", "#3d5a98", "#8a6d00", "#7b3f8c", "#5f6b77")
FONT = 'font-family="system-ui, sans-serif"'


@dataclass(frozen=True, slots=True)
class Bar:
    """value, least, most: above zero, in the unit of the plot. ours: drawn in the colour that stands out."""

    name: str
    value: float
    least: float
    most: float
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    bars: Sequence[Bar]


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]


def bars(title: str, unit: str, panels: Sequence[Panel]) -> str:
    """Panels of horizontal bars below each other over one logarithmic axis; a thin line spans least to most."""
    width, left, right, row = 860, 210, 90, 24
    values = [value for panel in panels for bar in panel.bars for value in (bar.least, bar.most)]
    # Half a decade to the left, so that the least of them is a bar and not a line.
    low, high = math.floor(math.log10(min(values)) - 0.5), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def across(value: float) -> float:
        return left + (math.log10(value) - low) / (high - low) * (width - left - right)

    parts: list[str] = []
    y = 56.0
    for panel in panels:
        parts.append(_text(24, y + 14, panel.title, size=14, weight="600"))
        top = y = y + 26
        for bar in panel.bars:
            colour = OURS if bar.ours else THEIRS
            parts.append(_text(left - 10, y + 16, bar.name, anchor="end", weight="600" if bar.ours else "400"))
            parts.append(_box(left, y + 4, across(bar.value) - left, row - 8, colour))
            middle = y + row / 2
            parts.append(_segment(across(bar.least), middle, across(bar.most), middle, INK))
            parts.append(_text(across(max(bar.value, bar.most)) + 8, y + 16, number(bar.value)))
            y += row
        for power in range(low, high + 1):
            parts.insert(0, _segment(across(10.0**power), top, across(10.0**power), y, FAINT))
            parts.append(_text(across(10.0**power), y + 14, number(10.0**power), anchor="middle", size=11))
        y += 34
    parts.append(_text((left + width - right) / 2, y, unit, anchor="middle", size=12))
    return _page(width, y + 18, title, parts)


def lines(
    title: str,
    unit: str,
    series: Sequence[Line],
    marks: Sequence[tuple[float, str]] = (),
    fitted: Sequence[Line] = (),
) -> str:
    """Lines over minutes from zero; ``marks`` are moments in minutes, each with a colour; ``fitted`` are drawn over
    the others and not named."""
    width, height, left, top, right, bottom = 860, 360, 70, 56, 190, 44
    end = max((x for line in series for x, _ in line.points), default=1.0) or 1.0
    most = max((y for line in series for _, y in line.points), default=1.0) * 1.1 or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / end * (width - left - right), height - bottom - y / most * (height - top - bottom)

    parts = [_segment(at(x, 0)[0], top, at(x, 0)[0], height - bottom, colour) for x, colour in marks]
    for step in _steps(most):
        parts.append(_segment(left, at(0, step)[1], width - right, at(0, step)[1], FAINT))
        parts.append(_text(left - 8, at(0, step)[1] + 4, number(step), anchor="end", size=11))
    for step in _steps(end):
        parts.append(_text(at(step, 0)[0], height - bottom + 18, number(step), anchor="middle", size=11))
    for index, line in enumerate(series):
        colour = LINES[index % len(LINES)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line.points))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_box(width - right + 16, top + index * 20, 12, 12, colour))
        parts.append(_text(width - right + 34, top + index * 20 + 11, line.name, size=12))
    for line in fitted:
        parts += [_segment(*at(*one), *at(*two), INK) for one, two in itertools.pairwise(line.points)]
    parts.append(_text(left, top - 8, unit, size=12))
    parts.append(_text((left + width - right) / 2, height - 8, "minutes", anchor="middle", size=12))
    return _page(width, height, title, parts)


def number(value: float) -> str:
    """Three significant digits, thousands apart."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _steps(most: float) -> list[float]:
    """Round values from zero up to ``most``, about five of them."""
    raw = most / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [step * index for index in range(int(most / step) + 1)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, weight: str = "400") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} {FONT} font-size="{size}" font-weight="{weight}" fill="{INK}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(1.0, width):.1f}" height="{height:.1f}" fill="{colour}"/>'


def _segment(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _page(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
    background = f'<rect width="{width:.0f}" height="{height:.0f}" fill="{PAPER}"/>'
    return "\n".join(
        [
            head,
            f"<title>{escape(title)}</title>",
            background,
            _text(24, 32, title, size=17, weight="600"),
            *parts,
            "</svg>\n",
        ]
    )
