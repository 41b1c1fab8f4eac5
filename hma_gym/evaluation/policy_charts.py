"""Charts of an evaluation as inline SVG: rates with their intervals, and learned against true success.

They take the page's own text colour, so that they read in light and in dark.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from hma_gym.metrics.statistics import Interval

TRUE_COLOUR, LEARNED_COLOUR = "#1f77b4", "#e07b00"
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_ROW, _LABEL_WIDTH, _CHART_WIDTH = 30, 190, 420
_SIDE, _MARGIN = 400, 46
_NEAR = 0.035
_LETTER, _LINE = 5.6, 12.0
_LABEL_RISES = (-7, 16, -20, 29, -33, 42, -46, 55)


@dataclass(frozen=True)
class Row:
    """One policy: its success in each world that it was played in."""

    label: str
    true: Interval | None
    learned: Interval | None


@dataclass(frozen=True)
class Svg:
    """A drawing inside the page.

    Attributes:
        content: of the svg element.
        width, height: of its coordinates.
        description: for readers who do not see it.
    """

    content: str
    width: int
    height: int
    description: str

    def html(self) -> str:
        """The svg element."""
        return (
            f'<svg role="img" viewBox="0 0 {self.width} {self.height}" style="max-width:{self.width}px;width:100%" '
            f'font-family="system-ui, sans-serif" font-size="13" fill="currentColor">'
            f"<title>{html.escape(self.description)}</title>{self.content}</svg>"
        )


def rates_chart(rows: Sequence[Row]) -> Svg:
    """A line for each policy, best at the top, with the success in both worlds and 95 percent intervals."""
    height = 34 + _ROW * len(rows)
    parts = []
    for tick in _TICKS:
        x = _LABEL_WIDTH + tick * _CHART_WIDTH
        parts.append(_line(x, 22, x, height - 8, "#8884"))
        parts.append(f'<text x="{x:.1f}" y="15" text-anchor="middle" opacity=".7">{tick:g}</text>')
    for i, row in enumerate(rows):
        y = 34 + _ROW * i
        parts.append(f'<text x="{_LABEL_WIDTH - 12}" y="{y + 9}" text-anchor="end">{html.escape(row.label)}</text>')
        for interval, colour, dy in ((row.true, TRUE_COLOUR, 0), (row.learned, LEARNED_COLOUR, 10)):
            if interval is None:
                continue
            low, high, at = (_LABEL_WIDTH + v * _CHART_WIDTH for v in (interval.low, interval.high, interval.value))
            parts.append(_line(low, y + dy, high, y + dy, colour, 3, 0.45))
            parts.append(f'<circle cx="{at:.1f}" cy="{y + dy}" r="5" fill="{colour}"/>')
    return Svg("".join(parts), _LABEL_WIDTH + _CHART_WIDTH + 20, height, "success of each policy in both worlds")


def scatter_chart(rows: Sequence[Row]) -> Svg:
    """Learned success over true success, with 95 percent intervals both ways; on the diagonal they are equal."""

    def x(value: float) -> float:
        return _MARGIN + value * (_SIDE - 2 * _MARGIN)

    def y(value: float) -> float:
        return _SIDE - _MARGIN - value * (_SIDE - 2 * _MARGIN)

    parts = [f'<line x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}" stroke="currentColor" stroke-dasharray="4 4"/>']
    for tick in _TICKS:
        parts.append(_line(x(tick), y(0), x(tick), y(1), "#8883"))
        parts.append(_line(x(0), y(tick), x(1), y(tick), "#8883"))
        parts.append(f'<text x="{x(tick)}" y="{y(0) + 18}" text-anchor="middle" opacity=".7">{tick:g}</text>')
        parts.append(f'<text x="{x(0) - 8}" y="{y(tick) + 4}" text-anchor="end" opacity=".7">{tick:g}</text>')
    parts.append(f'<text x="{x(0.5)}" y="{_SIDE - 6}" text-anchor="middle">success in ground truth</text>')
    parts.append(
        f'<text x="12" y="{y(0.5)}" text-anchor="middle" transform="rotate(-90 12 {y(0.5)})">'
        "in the learned world</text>"
    )
    for row in rows:
        if row.true is None or row.learned is None:
            continue
        cx, cy = x(row.true.value), y(row.learned.value)
        parts.append(_line(x(row.true.low), cy, x(row.true.high), cy, TRUE_COLOUR, 1.5, 0.5))
        parts.append(_line(cx, y(row.learned.low), cx, y(row.learned.high), LEARNED_COLOUR, 1.5, 0.5))
        title = f"{row.label}: true {row.true}, learned {row.learned}"
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5"><title>{html.escape(title)}</title></circle>')
    texts = [(x(true), y(learned), ", ".join(labels)) for (true, learned), labels in _together(rows).items()]
    for left, baseline, text in place_labels(texts):
        width = f'textLength="{_LETTER * len(text):.0f}" lengthAdjust="spacingAndGlyphs"'
        place = f'x="{left:.1f}" y="{baseline:.1f}"'
        parts.append(f'<text {place} font-size="11" opacity=".8" {width}>{html.escape(text)}</text>')
    return Svg("".join(parts), _SIDE, _SIDE, "success in the learned world over success in ground truth")


def place_labels(texts: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Where to write the labels of points, (x, y, text) each, so that none lies on another: (left, baseline, text).

    Each is put beside its point, above or below, in the first place that is free and inside the chart; where none is,
    in the first one.
    """
    placed: list[tuple[float, float, str]] = []
    for x, y, text in texts:
        width = _LETTER * len(text)
        places = [(left, y + dy) for dy in _LABEL_RISES for left in (x + 8, x - 8 - width)]
        inside = [place for place in places if 0 <= place[0] <= _SIDE - width and 12 <= place[1] <= _SIDE] or places
        free = [place for place in inside if not any(_overlap((*place, text), other) for other in placed)]
        placed.append((*(free or inside)[0], text))
    return placed


def _overlap(one: tuple[float, float, str], other: tuple[float, float, str]) -> bool:
    """Whether two labels lie on each other."""
    (left, baseline, text), (other_left, other_baseline, other_text) = one, other
    beside = left + _LETTER * len(text) <= other_left or other_left + _LETTER * len(other_text) <= left
    return not beside and abs(baseline - other_baseline) < _LINE


def _together(rows: Sequence[Row]) -> dict[tuple[float, float], list[str]]:
    """Labels of the points, those that would lie on each other joined."""
    found: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        if row.true is None or row.learned is None:
            continue
        here = (row.true.value, row.learned.value)
        near = [place for place in found if max(abs(a - b) for a, b in zip(place, here, strict=True)) < _NEAR]
        found.setdefault(near[0] if near else here, []).append(row.label)
    return found


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, opacity: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}" '
        f'stroke-opacity="{opacity}"/>'
    )
