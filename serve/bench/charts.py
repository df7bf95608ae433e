"""The charts of report.html, as SVG that scales with the page and takes its colours from the page's style."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
"""Okabe and Ito's, which people with any colour vision can tell apart."""
WIDTH, LEFT, RIGHT = 460, 70, 84
ROW, LETTER = 20, 7


@dataclass(frozen=True, kw_only=True)
class Bar:
    """From 0 to *value*, with a line to *until*."""

    group: str
    label: str
    color: str
    value: float
    until: float


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its interval, which may be unknown."""

    label: str
    color: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A labelled point."""

    label: str
    color: str
    x: float
    y: float


def bars(items: Sequence[Bar], *, unit: str) -> str:
    """Horizontal bars, by group from top to bottom; each group has its own scale, since shapes differ by far."""
    parts, y, begin = list[str](), 4.0, _left(item.group for item in items)
    for group, each in itertools.groupby(items, key=lambda item: item.group):
        members = list(each)
        scale = (WIDTH - begin - RIGHT) / max(max(item.value, item.until) for item in members)
        parts.append(
            f'<text x="{begin - 10}" y="{y + ROW * len(members) / 2 + 4:.1f}" text-anchor="end">{escape(group)}</text>'
        )
        for item in members:
            end, far, middle = begin + item.value * scale, begin + item.until * scale, y + ROW / 2
            parts.append(
                f'<rect x="{begin}" y="{y + 3:.1f}" width="{item.value * scale:.1f}" height="{ROW - 6}" rx="2" '
                f'fill="{item.color}"><title>{escape(item.label)}: {item.value:.3f} {unit}</title></rect>'
                f'<path d="M{end:.1f} {middle:.1f}H{far:.1f}" stroke="{item.color}" stroke-width="2"/>'
                f'<text x="{max(end, far) + 6:.1f}" y="{middle + 4:.1f}">{item.value:.2f} {unit}</text>'
            )
            y += ROW
        y += 10
    return _svg("".join(parts), height=y, label="latency by shape")


def intervals(items: Sequence[Interval]) -> str:
    """Dots with their intervals on a logarithmic scale around 1."""
    ends = [value for item in items for value in (item.value, item.low, item.high) if value is not None]
    reach = max(0.1, *(abs(math.log2(value)) for value in ends)) * 1.15
    begin = _left(item.label for item in items)
    middle = (begin + WIDTH - RIGHT) / 2

    def at(value: float) -> float:
        return middle + math.log2(value) / reach * (WIDTH - RIGHT - begin) / 2

    parts, y = [f'<path class="line" d="M{middle:.1f} 0V{ROW * len(items) + 6}" stroke-width="1"/>'], 4.0
    for item in items:
        line = y + ROW / 2
        parts.append(f'<text x="{begin - 10}" y="{line + 4:.1f}" text-anchor="end">{escape(item.label)}</text>')
        if item.low is not None and item.high is not None:
            parts.append(
                f'<path d="M{at(item.low):.1f} {line:.1f}H{at(item.high):.1f}" stroke="{item.color}" stroke-width="3"/>'
            )
        parts.append(
            f'<circle cx="{at(item.value):.1f}" cy="{line:.1f}" r="5" fill="{item.color}"/>'
            f'<text x="{WIDTH - RIGHT + 10}" y="{line + 4:.1f}">{item.value:.2f}×</text>'
        )
        y += ROW
    parts.append(f'<text class="soft" x="{middle:.1f}" y="{y + 16:.1f}" text-anchor="middle">1</text>')
    return _svg("".join(parts), height=y + 22, label="ratio to the baseline")


def dots(items: Sequence[Dot], *, x: str, y: str) -> str:
    """Points in a plane, with the ends of both axes written at them; x, a time, begins at 0."""
    height, top, bottom = 230, 20, 190
    left, right = 0.0, max(item.x for item in items) * 1.1
    low, high = _range([item.y for item in items])

    def across(value: float) -> float:
        return LEFT + (value - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    center = (LEFT + WIDTH - RIGHT) / 2
    parts = [
        f'<path class="line" d="M{LEFT} {top}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke-width="1"/>',
        f'<text class="soft" x="{center}" y="{bottom + 32}" text-anchor="middle">{escape(x)}</text>',
        f'<text class="soft" x="{LEFT + 6}" y="{top - 6}">{escape(y)}</text>',
    ]
    for value in (left, right):
        parts.append(
            f'<text class="soft" x="{across(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:.2f}</text>'
        )
    for value in (low, high):
        parts.append(f'<text class="soft" x="{LEFT - 8}" y="{up(value) + 4:.1f}" text-anchor="end">{value:.3f}</text>')
    for item in items:
        parts.append(
            f'<circle cx="{across(item.x):.1f}" cy="{up(item.y):.1f}" r="6" fill="{item.color}"/>'
            f'<text x="{across(item.x) + 10:.1f}" y="{up(item.y) - 6:.1f}">{escape(item.label)}</text>'
        )
    return _svg("".join(parts), height=height, label=f"{y} against {x}")


def _left(labels: Iterable[str]) -> int:
    """Where plots begin, so that the longest label fits before them."""
    return max(LEFT, 10 + LETTER * max(map(len, labels)))


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From a little below the lowest to a little above the highest; never empty."""
    low, high = min(values), max(values)
    space = (high - low) * 0.2 or abs(high) * 0.05 or 1.0
    return low - space, high + space


def _svg(content: str, *, height: float, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}">{content}</svg>'
    )
