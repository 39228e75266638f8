"""The picture of a sweep: size against quality as an SVG that reads on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

from compress.evaluate.metrics import HIGH, METRICS

WIDTH, HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 24, 46, 52
_LETTER, _LINE = 6.6, 14  # the size of a letter of 12 px, rounded up
_Box = tuple[float, float, float, float]  # left, top, right, bottom
_WIDE = 4.0  # values that differ by more than this factor get a logarithmic axis
_STYLE = """
    .page{fill:#ffffff} text{fill:#1f2328;font:12px system-ui,sans-serif} .title{font-size:14px}
    .soft{fill:#59636e} .grid{stroke:#d1d9e0;stroke-width:1} .point{fill:#8c959f}
    .ahead{fill:#0969da} .line{stroke:#0969da;stroke-width:1.5;fill:none} .best{fill:none;
    stroke:#bc4c00;stroke-width:2}
    .label{stroke:#ffffff;stroke-width:3px;stroke-linejoin:round;paint-order:stroke}
    @media (prefers-color-scheme: dark){.page{fill:#0d1117} text{fill:#e6edf3}
    .soft{fill:#9198a1} .grid{stroke:#3d444d} .point{fill:#9198a1} .ahead{fill:#4493f8}
    .line{stroke:#4493f8} .best{stroke:#f0883e}
    .label{stroke:#0d1117}}
"""


@dataclass(frozen=True)
class Dot:
    """A finished point: what it weighs in bytes and its metric's value."""

    number: int
    label: str
    size: float
    value: float
    ahead: bool
    best: bool


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool

    def at(self, value: float) -> float:
        low, high, own = (self._scaled(v) for v in (self.low, self.high, value))
        return self.start + (own - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 3 else (1,)
            every = [s * 10.0**e for e in range(first, last + 1) for s in steps]
            return [t for t in every if self.low <= t <= self.high]
        raw = (self.high - self.low) / 5
        step = 10 ** math.floor(math.log10(raw))
        step *= next(s for s in (1, 2, 5, 10) if s * step >= raw)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step) + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def draw(dots: Sequence[Dot], title: str, metric: str, bytes_text: Callable[[float], str]) -> str:
    """The SVG text. Points whose value is not finite are left out and counted below the title."""
    shown = [dot for dot in dots if math.isfinite(dot.value)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        _text(_LEFT, 22, _clean(title), "title"),
    ]
    if len(shown) < len(dots):
        parts.append(_text(_LEFT, 38, f"{len(dots) - len(shown)} without a finite value", "soft"))
    if shown:
        x = _axis([d.size for d in shown], _LEFT, WIDTH - _RIGHT)
        y = _axis([d.value for d in shown], HEIGHT - _BOTTOM, _TOP)
        parts += _frame(x, y, metric, bytes_text)
        parts += _points(shown, x, y)
    return "\n".join([*parts, "</svg>", ""])


def _axis(values: Sequence[float], start: float, stop: float) -> _Axis:
    """An axis around the values, with room at both ends."""
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > _WIDE
    if logarithmic:
        room = (high / low) ** 0.07
        return _Axis(low / room, high * room, start, stop, True)
    room = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
    return _Axis(low - room, high + room, start, stop, False)


def _frame(x: _Axis, y: _Axis, metric: str, bytes_text: Callable[[float], str]) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for tick in x.ticks():
        at = x.at(tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {_TOP}V{bottom}"/>')
        parts.append(_text(at, bottom + 18, bytes_text(tick), "soft", "middle"))
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
        parts.append(_text(_LEFT - 8, at + 4, f"{tick:.4g}", "soft", "end"))
    better = "more" if METRICS[metric].better == HIGH else "less"
    parts.append(_text((_LEFT + right) / 2, HEIGHT - 12, "size of the output", "", "middle"))
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">'
        f"{escape(metric)} ({better} is better)</text>"
    )
    return parts


def _points(dots: Sequence[Dot], x: _Axis, y: _Axis) -> list[str]:
    """The frontier as steps, every point, and as many labels as find room, the frontier's first."""
    ahead = sorted((d for d in dots if d.ahead), key=lambda d: d.size)
    corners = [(x.at(d.size), y.at(d.value)) for d in ahead]
    start = "".join(f"M{a:.1f} {b:.1f}" for a, b in corners[:1])
    steps = start + "".join(f"H{a:.1f}V{b:.1f}" for a, b in corners[1:])
    parts = [f'<path class="line" d="{steps}"/>'] if len(ahead) > 1 else []
    places = [(x.at(d.size), y.at(d.value)) for d in dots]
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in places]
    line = [
        (left, min(up, down) - 2, right, max(up, down) + 2)
        for (a, b), (c, d) in pairwise(corners)
        for left, up, right, down in ((a, b, c, b), (c - 2, b, c + 2, d))
    ]
    labels = []
    order = sorted(range(len(dots)), key=lambda i: (not dots[i].best, not dots[i].ahead))
    for i in order:
        dot, (px, py) = dots[i], places[i]
        kind = "ahead" if dot.ahead else "point"
        parts.append(
            f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="4.5"><title>'
            f"{dot.number}: {escape(_clean(dot.label))}: {dot.value:.5g}</title></circle>"
        )
        if dot.best:
            parts.append(f'<circle class="best" cx="{px:.1f}" cy="{py:.1f}" r="8"/>')
        full, short = _clean(dot.label), str(dot.number)
        for text, around in ((full, [*taken, *line]), (full, taken), (short, taken)):
            placed = _placed(text, px, py, around)
            if placed is not None:
                labels.append(placed[0])
                taken.append(placed[1])
                break
    return parts + labels


def _placed(text: str, px: float, py: float, taken: Sequence[_Box]) -> tuple[str, _Box] | None:
    """The label beside its point where it covers nothing, with its box; None without room."""
    width = _LETTER * len(text)
    for dx, dy, anchor in (
        (13, 4, "start"), (-13, 4, "end"), (0, -12, "middle"), (0, 20, "middle"),
        (9, -9, "start"), (-9, -9, "end"), (9, 18, "start"), (-9, 18, "end"),
    ):  # fmt: skip
        left = px + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        box = (left, py + dy - _LINE + 3, left + width, py + dy + 3)
        inside = (
            box[0] >= _LEFT
            and box[2] <= WIDTH
            and box[1] >= _TOP - 4
            and box[3] <= HEIGHT - _BOTTOM
        )
        if inside and not any(
            box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken
        ):
            return _text(px + dx, py + dy, text, "label", anchor), box
    return None


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _clean(text: str) -> str:
    """Printable characters alone: names come from files."""
    return "".join(c if c.isprintable() else "?" for c in text)[:90]
