"""Small charts as SVG. Knows nothing of engines; lengths are in pixels.

The background is transparent, and the ink a grey that can be read on white and on black: a picture in a page does not
know which of them the page has.
"""

import math
from html import escape

from nanovllm.utils.timeline_svg import COLORS, picture, text

INK, FLOOR_COLOR = "#76808c", "#e5534b"
WIDTH, HEIGHT, LEFT, TOP = 520, 240, 80, 34
Series = dict[str, list[list[float]]]  # name -> points; those named "floor..." are dashed


def rect(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}"/>'


def line(points: list[tuple[float, float]], color: str, dashes: str = "", width: float = 2) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    style = f'fill="none" stroke="{color}" stroke-width="{width}"' + f' stroke-dasharray="{dashes}"' * bool(dashes)
    return f'<path d="{path}" {style}/>'


def plot(series: Series, x_label: str, y_label: str) -> str:
    """Lines over logarithmic axes, each named at its end."""
    (left, right), (low, high) = (
        (min(values), max(values)) for values in zip(*(p for points in series.values() for p in points), strict=True)
    )
    low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))

    def place(x: float, y: float) -> tuple[float, float]:
        up = math.log(y / low) / math.log(high / low)
        return LEFT + math.log(x / left) / math.log(right / left) * WIDTH, TOP + (1 - up) * HEIGHT

    shapes = [text(LEFT - 70, 16, y_label), text(LEFT + WIDTH / 2, TOP + HEIGHT + 40, x_label, "middle")]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        _, y = place(left, 10.0**power)
        shapes += [
            line([(LEFT, y), (LEFT + WIDTH, y)], INK, "1 4", 1),
            text(LEFT - 8, y + 4, f"{10.0**power:g}", "end"),
        ]
    for x in sorted({x for points in series.values() for x, _ in points}):
        shapes.append(text(place(x, low)[0], TOP + HEIGHT + 20, f"{x:g}", "middle"))
    below = -math.inf
    for i, (name, points) in enumerate(series.items()):
        is_floor, places = name.startswith("floor"), [place(*point) for point in points]
        color = FLOOR_COLOR if is_floor else COLORS[i]
        shapes.append(line(places, color, "5 4" if is_floor else ""))
        shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places if not is_floor]
        y = places[-1][1] + 4
        y += 15 if 0 <= y - below < 15 else -15 if -15 < y - below < 0 else 0  # beside the other line's name
        shapes.append(text(LEFT + WIDTH + 8, y, name).replace("<text", f'<text fill="{color}"', 1))
        below = y
    return picture(LEFT + WIDTH + 190, TOP + HEIGHT + 50, shapes, INK)


def bars(parts: dict[str, dict[str, float]], what: str) -> str:
    """A bar for each entry, of its parts side by side."""
    names = list(dict.fromkeys(name for bar in parts.values() for name in bar))
    scale = WIDTH / max(sum(bar.values()) for bar in parts.values())
    shapes = [text(LEFT, 16, what)]
    for i, (label, bar) in enumerate(parts.items()):
        x, y = LEFT, TOP + i * 40
        shapes.append(text(LEFT - 8, y + 20, label, "end"))
        for name, length in bar.items():
            shapes.append(rect(x, y, length * scale, 28, COLORS[names.index(name)]))
            x += length * scale
        shapes.append(text(x + 8, y + 20, f"{sum(bar.values()):.2f}"))
    x, y = LEFT, TOP + len(parts) * 40 + 12
    for name, color in zip(names, COLORS, strict=False):
        shapes += [rect(x, y, 12, 12, color), text(x + 16, y + 11, name)]
        x += 30 + 7 * len(name)
    return picture(max(LEFT + WIDTH + 60, x), y + 24, shapes, INK)


def panels(table: dict[str, dict[str, float]], what: dict[str, list[str]]) -> str:
    """A row for each of the table's, and for each title of `what` a panel with a bar for each of its columns."""
    x, row, bottom = 130, 46, TOP + 46 * len(table)
    shapes = [text(x - 10, TOP + i * row + 28, name, "end") for i, name in enumerate(table)]
    colors = dict(zip((column for names in what.values() for column in names), COLORS, strict=False))
    for title, names in what.items():
        width, height = 120 * len(names), 32 / len(names)
        scale = width / max(values[column] for values in table.values() for column in names if column in values)
        shapes += [text(x, 16, title), line([(x, TOP), (x, bottom)], INK, width=1)]
        for i, values in enumerate(table.values()):
            shown = [column for column in names if column in values]
            for j, column in enumerate(shown):
                y, length = TOP + i * row + 24 + (j - len(shown) / 2) * height, values[column] * scale
                shapes.append(rect(x, y, length, height - 2, colors[column]))
                shapes.append(text(x + length + 6, y + height / 2 + 4, str(values[column])))
        for k, column in enumerate(names if len(names) > 1 else ()):
            shapes.append(rect(x + 100 * k, bottom + 12, 12, 12, colors[column]))
            shapes.append(text(x + 100 * k + 16, bottom + 23, column))
        x += width + 70
    return picture(x, bottom + 32, shapes, INK)


def number_line(tokens: list[tuple[str, float]], uniforms: list[float], temperatures: list[float]) -> str:
    """For each temperature the tokens' probabilities side by side from 0 to 1, and where the random numbers fall."""
    shapes, rows = [], len(temperatures)
    for i, temperature in enumerate(temperatures):
        weights = [p ** (1 / temperature) for _, p in tokens]
        x, y = LEFT, TOP + 20 + i * 50
        shapes.append(text(LEFT - 8, y + 20, f"T = {temperature:g}", "end"))
        for k, ((token, _), weight) in enumerate(zip(tokens, weights, strict=True)):
            width = weight / sum(weights) * WIDTH
            shapes.append(rect(x, y, width, 28, COLORS[k % len(COLORS)]))
            if width > 8 * len(token) + 4:
                label = text(x + width / 2, y + 19, escape(token), "middle")
                shapes.append(label.replace("<text", '<text fill="#1f2328"', 1))
            x += width
    bottom = TOP + 20 + rows * 50 - 12
    for draw, uniform in enumerate(uniforms, 1):
        x = LEFT + uniform * WIDTH
        shapes += [line([(x, TOP + 8), (x, bottom)], INK), text(x, TOP + 2, f"u{draw} = {uniform:.3f}", "middle")]
    for x in (0, 0.5, 1):
        shapes.append(text(LEFT + x * WIDTH, bottom + 16, f"{x:g}", "middle"))
    return picture(LEFT + WIDTH + 40, bottom + 26, shapes, INK)


def exchange(calls: list[tuple[str, int, int]]) -> str:
    """Two lifelines, and what goes between them, from the top: what, how many bytes, how often in a row."""
    left, right, shapes = 150, 450, [text(150, 16, "rank 0", "middle"), text(450, 16, "rank 1", "middle")]
    bottom = TOP + 34 * len(calls)
    for x in (left, right):
        shapes.append(line([(x, 24), (x, bottom)], INK, "2 4", 1))
    for i, (name, num_bytes, times) in enumerate(calls):
        y, is_message = TOP + 24 + 34 * i, name == "publish"
        color = COLORS[0] if is_message else COLORS[1]
        shapes.append(line([(left, y), (right, y)], color, width=2 if is_message else 4))
        heads = [(right, -1)] if is_message or name == "gather" else [(left, 1), (right, -1)]
        if name == "gather":
            heads = [(left, 1)]
        shapes += [line([(x + 9 * d, y - 5), (x, y), (x + 9 * d, y + 5)], color) for x, d in heads]
        words = f"{name}, {num_bytes:,} bytes" + f", {times} times" * (times > 1)
        shapes.append(text((left + right) / 2, y - 7, words, "middle"))
    return picture(600, bottom + 14, shapes, INK)
