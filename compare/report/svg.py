"""Plots as inline SVG, drawn by hand: no library, a few kilobytes, and colours that follow the page into dark mode.

Colours are CSS classes (`series-0`...), so that the page's style sheet decides; every mark carries a `<title>` for the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from compare.report.tables import number

SERIES = 16  # colours in the style sheet
WIDTH = 860


@dataclass(frozen=True)
class Bar:
    """A horizontal bar with its interval; `bound` draws a tick where the roofline is."""

    label: str
    value: float
    low: float
    high: float
    note: str = ""
    bound: float | None = None
    ours: bool = False


@dataclass(frozen=True)
class Line:
    """A series; `colour` is its contender's number, the same in every plot."""

    label: str
    points: list[tuple[float, float]]
    colour: int = 0
    ours: bool = False


def bars(items: Sequence[Bar], unit: str) -> str:
    """Bars from zero, so that lengths compare; the whisker is the 95% interval of the median."""
    left, right, step = 170, 170, 30
    top = max((max(i.high, i.value) for i in items), default=1.0) or 1.0
    height = step * len(items) + 8
    room = WIDTH - left - right

    def x(value: float) -> float:
        return left + room * min(value / top, 1.0)

    parts = []
    for index, item in enumerate(items):
        y = 4 + index * step
        middle = y + step / 2
        tip = f"{item.label}: {number(item.value)} {unit} [{number(item.low)}–{number(item.high)}] {item.note}".strip()
        shade = "ours" if item.ours else "theirs"
        parts.append(f"<g><title>{escape(tip)}</title>")
        parts.append(f'<text x="{left - 10}" y="{middle + 4:.1f}" class="name {shade}-name" text-anchor="end">{escape(item.label)}</text>')
        parts.append(
            f'<rect x="{left}" y="{y + 5}" width="{max(1.0, x(item.value) - left):.1f}" height="{step - 10}" rx="3" class="{shade}"/>'
        )
        if item.high > item.low:
            low, high = x(item.low), x(item.high)
            parts.append(f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 5}v10M{high:.1f} {middle - 5}v10" class="whisker"/>')
        if item.bound is not None and item.bound <= top:
            parts.append(f'<path d="M{x(item.bound):.1f} {y + 2}v{step - 4}" class="bound"/>')
        end = max(x(item.high), x(item.value)) + 8
        parts.append(f'<text x="{end:.1f}" y="{middle + 4:.1f}" class="value">{number(item.value)} {escape(item.note)}</text></g>')
    return _svg(height, "".join(parts), f"bars, {unit}")


def lines(items: Sequence[Line], x_name: str, y_name: str, *, log_x: bool = False, log_y: bool = False, steps: bool = False) -> str:
    """Lines with markers; `steps` draws a distribution (no markers). Axes start at zero unless logarithmic."""
    left, right, top, bottom, height = 70, 190, 14, 46, 330
    points = [p for item in items for p in item.points]
    if not points:
        return ""
    scale_x = _Axis([p[0] for p in points], left, WIDTH - right, log_x)
    scale_y = _Axis([p[1] for p in points], height - bottom, top, log_y)
    parts = [_grid(scale_x, scale_y, left, WIDTH - right, top, height - bottom, x_name, y_name, height)]
    for index, item in enumerate(items):
        path = " ".join(f"{'M' if i == 0 else 'L'}{scale_x(a):.1f} {scale_y(b):.1f}" for i, (a, b) in enumerate(item.points))
        shade = f"series-{item.colour % SERIES}" + (" ours-line" if item.ours else "")
        parts.append(f'<g class="{shade}"><title>{escape(item.label)}</title><path d="{path}" class="line"/>')
        if not steps:
            for a, b in item.points:
                parts.append(
                    f'<circle cx="{scale_x(a):.1f}" cy="{scale_y(b):.1f}" r="3.5"><title>{_tip(item.label, a, b)}</title></circle>'
                )
        parts.append("</g>")
        y = top + 14 + index * 20
        parts.append(f'<g class="{shade}"><circle cx="{WIDTH - right + 20}" cy="{y - 4}" r="4.5"/></g>')
        parts.append(f'<text x="{WIDTH - right + 32}" y="{y}" class="name">{escape(item.label)}</text>')
    return _svg(height, "".join(parts), f"{y_name} against {x_name}")


def scatter(items: Sequence[tuple[str, float, float, int]], x_name: str, y_name: str) -> str:
    """Labelled dots."""
    left, right, top, bottom, height = 70, 150, 18, 46, 340
    if not items:
        return ""
    scale_x = _Axis([i[1] for i in items], left, WIDTH - right, False)
    ys = [i[2] for i in items]
    pad = (max(ys) - min(ys)) * 0.15 or abs(ys[0]) * 0.1 or 1.0
    scale_y = _Axis([max(0.0, min(ys) - pad), max(ys) + pad], height - bottom, top, False, from_zero=False)
    parts = [_grid(scale_x, scale_y, left, WIDTH - right, top, height - bottom, x_name, y_name, height)]
    taken: list[tuple[float, float]] = []
    for label, a, b, colour in sorted(items, key=lambda i: (i[2], i[1])):
        px, py = scale_x(a), scale_y(b)
        text_y = py + 4
        while any(abs(text_y - ty) < 13 and abs(px - tx) < 150 for tx, ty in taken):
            text_y -= 13
        taken.append((px, text_y))
        shade = f"series-{colour % SERIES}"
        parts.append(f'<g class="{shade}"><circle cx="{px:.1f}" cy="{py:.1f}" r="5"><title>{_tip(label, a, b)}</title></circle></g>')
        parts.append(f'<text x="{px + 10:.1f}" y="{text_y:.1f}" class="name">{escape(label)}</text>')
    return _svg(height, "".join(parts), f"{y_name} against {x_name}")


class _Axis:
    """Maps values to pixels, and knows where round numbers lie."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool, from_zero: bool = True) -> None:
        low, high = min(values), max(values)
        self.log = log and low > 0
        if self.log:
            self.low, self.high = low, max(high, low * 1.01)
        else:
            self.low = min(0.0, low) if from_zero else low
            self.high = high if high > self.low else self.low + 1.0
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            marks = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
        else:
            raw = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(raw))
            step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
            marks = [step * i for i in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)]
        return [m for m in marks if self.low * 0.9999 <= m <= self.high * 1.0001]


def _grid(sx: _Axis, sy: _Axis, left: float, right: float, top: float, bottom: float, x_name: str, y_name: str, height: float) -> str:
    parts = []
    for mark in sx.ticks():
        parts.append(f'<path d="M{sx(mark):.1f} {top}V{bottom}" class="grid"/>')
        parts.append(f'<text x="{sx(mark):.1f}" y="{bottom + 17}" class="tick" text-anchor="middle">{_tick(mark)}</text>')
    for mark in sy.ticks():
        parts.append(f'<path d="M{left} {sy(mark):.1f}H{right}" class="grid"/>')
        parts.append(f'<text x="{left - 8}" y="{sy(mark) + 4:.1f}" class="tick" text-anchor="end">{_tick(mark)}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 8}" class="axis" text-anchor="middle">{escape(x_name)}</text>')
    middle = (top + bottom) / 2
    parts.append(f'<text x="16" y="{middle}" class="axis" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(y_name)}</text>')
    return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.6g}"


def _tip(label: str, a: float, b: float) -> str:
    return escape(f"{label}: {number(a)}, {number(b)}")


def _svg(height: float, body: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'
