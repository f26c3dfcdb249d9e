"""A line chart over doubling amounts as a stand-alone SVG: both axes are logarithms to base 2."""

import math
from collections.abc import Sequence
from html import escape

from ftlib.observe.charts import number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 64, 20, 56, 48
COLOURS = ("#1f6feb", "#d1480b", "#1a7f37", "#8250df", "#9a6700")

Point = tuple[float, float]


def doubling(title: str, x_name: str, y_name: str, curves: dict[str, Sequence[Point]], limit: float | None) -> str:
    """Curves of positive points by name; `limit` is a dashed line across."""
    points = [point for curve in curves.values() for point in curve]
    xs = _powers([x for x, _ in points])
    ys = _powers([y for _, y in points] + ([limit] if limit else []))

    def place(x: float, y: float) -> Point:
        across = (math.log2(x) - xs[0]) / max(1, xs[-1] - xs[0])
        up = (math.log2(y) - ys[0]) / max(1, ys[-1] - ys[0])
        at = LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)
        return round(at[0], 1), round(at[1], 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 20, title, size=14),
        _text(WIDTH - RIGHT, HEIGHT - 8, x_name, "end"),
        _text(6, TOP - 14, y_name),
    ]
    for power in ys:
        x, y = place(2 ** xs[0], 2.0**power)
        parts.append(_line((x, y), (WIDTH - RIGHT, y), "#ddd"))
        parts.append(_text(x - 8, y + 4, f"{2.0**power:g}", "end"))
    for power in xs:
        x, y = place(2.0**power, 2 ** ys[0])
        parts.append(_text(x, y + 18, f"{2**power // 1024}k" if power >= 10 else str(2**power), "middle"))
    if limit:
        parts.append(_line(place(2 ** xs[0], limit), place(2 ** xs[-1], limit), "#999", dashed=True))
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        placed = [place(*point) for point in curve]
        path = " ".join(f"{x},{y}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (tokens, value) in zip(placed, curve, strict=True):
            said = f"<title>{escape(name)}: {number(value)} at {number(tokens)}</title>"
            parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}">{said}</circle>')
        parts.append(f'<rect x="{LEFT + 8}" y="{TOP + 18 * i}" width="12" height="4" fill="{colour}"/>')
        parts.append(_text(LEFT + 26, TOP + 6 + 18 * i, name))
    return "\n".join([*parts, "</svg>\n"])


def _powers(values: list[float]) -> list[int]:
    """Whole powers of 2 that enclose the values."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    return list(range(low, max(high, low + 1) + 1))


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _line(a: Point, b: Point, colour: str, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{a[0]}" y1="{a[1]}" x2="{b[0]}" y2="{b[1]}" stroke="{colour}"{dash}/>'
