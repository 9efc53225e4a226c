"""Small line charts as inline SVG: no script, no font, nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from normadapt.simulate.results import Figure, Series

WIDTH, HEIGHT = 560, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 12, 52
_DASHES = ("", "", "", "", "", "7 3", "2 3", "9 3 2 3")


def chart(figure: Figure) -> str:
    """The chart of a figure and its legend, as HTML."""
    x = _Axis.of([v for line in figure.series for v in line.x], figure.log_x, (_LEFT, WIDTH - _RIGHT))
    values = [v for line in figure.series for v in line.y]
    y = _Axis.of(values, figure.log_y, (HEIGHT - _BOTTOM, _TOP), figure.y_max)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(figure.title)}">',
        *(_grid(x, y)),
        f'<text class="label" x="{(WIDTH + _LEFT - _RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(figure.x_label)}</text>",
        f'<text class="label" transform="translate(18 {(HEIGHT - _BOTTOM + _TOP) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(figure.y_label)}</text>',
    ]
    results = [line for line in figure.series if not line.reference]
    parts += [_line(line, "ref", "6 4", x, y) for line in figure.series if line.reference]
    for i, line in enumerate(results):
        parts.append(_line(line, f"c{i % 8}", _DASHES[i % 8], x, y))
    parts.append("</svg>")
    return "\n".join(parts) + _legend(figure.series)


def _legend(lines: Sequence[Series]) -> str:
    entries, i = [], 0
    for line in lines:
        style, dash = ("ref", "6 4") if line.reference else (f"c{i % 8}", _DASHES[i % 8])
        i += not line.reference
        stroke = (
            f'<svg class="key" viewBox="0 0 26 8"><path class="{style}" stroke-dasharray="{dash}" d="M0 4H26"/></svg>'
        )
        entries.append(f"<li>{stroke}{escape(line.name)}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _line(line: Series, style: str, dash: str, x: _Axis, y: _Axis) -> str:
    """A path that is cut where it leaves the plot and interrupted where there is no number."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for value_x, value_y in zip(line.x, line.y, strict=True):
        if math.isfinite(value_y) and not (y.log and value_y <= 0) and not (x.log and value_x <= 0):
            pieces[-1].append((x.place(value_x), y.place(value_y)))
        elif pieces[-1]:
            pieces.append([])
    shown = [part for piece in pieces for part in _cut(piece)]
    path = "".join("M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in part) for part in shown)
    marks = ""
    if len(line.x) <= 12 and style != "ref":
        inside = [(px, py) for piece in pieces for px, py in piece if _TOP - 0.5 <= py <= HEIGHT - _BOTTOM + 0.5]
        marks = "".join(f'<circle class="{style}" cx="{px:.1f}" cy="{py:.1f}" r="2.4"/>' for px, py in inside)
    title = f"<title>{escape(line.name)}</title>"
    return f'<g>{title}<path class="{style}" stroke-dasharray="{dash}" d="{path}"/>{marks}</g>'


def _cut(points: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The parts of a polyline within the plot's height."""
    low, high = float(_TOP), float(HEIGHT - _BOTTOM)
    if len(points) == 1:
        return [points] if low <= points[0][1] <= high else []
    parts: list[list[tuple[float, float]]] = []
    for (x0, y0), (x1, y1) in pairwise(points):
        if max(y0, y1) < low or min(y0, y1) > high:
            continue
        ends = []
        for px, py in ((x0, y0), (x1, y1)):
            edge = min(max(py, low), high)
            ends.append((px if edge == py else x0 + (edge - y0) / (y1 - y0) * (x1 - x0), edge))
        if parts and parts[-1][-1] == ends[0]:
            parts[-1].append(ends[1])
        else:
            parts.append(ends)
    return parts


def _grid(x: _Axis, y: _Axis) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for value in x.ticks:
        at = f"{x.place(value):.1f}"
        parts.append(f'<path class="grid" d="M{at} {_TOP}V{bottom}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 18}" text-anchor="middle">{tick_text(value)}</text>')
    for value in y.ticks:
        place = y.place(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {place:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{tick_text(value)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    return parts


def tick_text(value: float) -> str:
    """A tick's number: plain between 0.001 and 10,000, else a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}".replace("-", "−")
    return f"{value:.0e}".replace("e-0", "e−").replace("e-", "e−").replace("e+0", "e").replace("e+", "e")


class _Axis:
    """Maps values to pixels.

    Args:
        low: Value at the first pixel.
        high: Value at the last.
        log: Whether powers of ten are equally far apart.
        pixels: First and last.
        ticks: Values to label.
    """

    def __init__(self, low: float, high: float, log: bool, pixels: tuple[float, float], ticks: Sequence[float]) -> None:
        self.low, self.high, self.log, self.pixels, self.ticks = low, high, log, pixels, ticks

    @classmethod
    def of(cls, values: Sequence[float], log: bool, pixels: tuple[float, float], highest: float | None = None) -> _Axis:
        known = [v for v in values if math.isfinite(v) and not (log and v <= 0)] or [0.1, 1.0]
        low, high = min(known), max(known)
        if highest is not None:
            high = min(high, highest)
        if log:
            low = max(low, high * 1e-12)
            return cls(low, max(high, low * 1.01), True, pixels, log_ticks(low, high))
        if pixels[0] > pixels[1]:  # the ordinate: from 0 where that is near, with some air
            low = 0.0 if 0 <= low < 0.5 * high else low - 0.05 * (high - low)
            high = high + 0.05 * (high - low)
        high = max(high, low + 1e-12)
        return cls(low, high, False, pixels, linear_ticks(low, high))

    def place(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.pixels[0] + share * (self.pixels[1] - self.pixels[0])


def linear_ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers between the ends."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, thinned out to seven; with their doubles and fives where there are few."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first >= 2:
        step = max(1, math.ceil((last - first) / 7))
        return [10.0**power for power in range(first, last + 1, step)]
    return [
        factor * 10.0**power
        for power in range(first - 1, last + 1)
        for factor in (1, 2, 5)
        if low * 0.999 <= factor * 10.0**power <= high * 1.001
    ]
