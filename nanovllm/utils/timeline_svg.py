"""A few steps of a timeline as a picture: what the host does above what the device does, and how long each phase takes.

Lengths are in pixels.
"""

from collections import defaultdict

from nanovllm.utils.timeline import Span

LEFT, WIDTH, MARGIN = 70, 1100, 20
ROWS = {"steps": (40, 16), "host": (62, 40), "device": (108, 40)}  # from the top, and height
BOTTOM = 160  # of the rows, where the axis is
LEGEND = 215
COLORS = ("#4e79a7", "#f28e2b", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#e15759", "#9c755f", "#ff9da7", "#d3d3d3")


def draw(rows: dict[str, list[Span]], num_steps: int = 8) -> str:
    """SVG of `num_steps` steps in the middle of `Timeline.rows`, of which there must be one at least."""
    first = max(len(rows["steps"]) - num_steps, 0) // 2
    steps = rows["steps"][first : first + num_steps]
    start, end = steps[0][1], steps[-1][2]
    shown = {name: [span for span in spans if start <= span[1] and span[2] <= end] for name, spans in rows.items()}
    colors = dict(zip(dict.fromkeys(phase for phase, *_ in shown["host"]), COLORS, strict=False)) | {"step": "#ececec"}

    def x(seconds: float) -> float:
        return LEFT + (seconds - start) / (end - start) * WIDTH

    title = f"Steps {first + 1} to {first + len(steps)} of {len(rows['steps'])}, {1e3 * (end - start):.2f} ms"
    shapes = ['<rect width="100%" height="100%" fill="white"/>', text(LEFT, 24, title)]
    for name, (y, height) in ROWS.items():
        shapes.append(text(LEFT - 8, y + height / 2 + 4, name, "end"))
        for phase, begin, stop in shown[name]:
            width, color = x(stop) - x(begin), colors.get(phase, COLORS[-1])
            tip = f"<title>{phase}: {1e3 * (stop - begin):.3f} ms</title>"
            rect = f'x="{x(begin):.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{color}"'
            rect += ' stroke="white"' * (name == "steps")
            shapes.append(f"<rect {rect}>{tip}</rect>")
    shapes += _axis(end - start)
    shapes += _legend(shown["host"], sum(stop - begin for _, begin, stop in steps), colors)
    size = LEFT + WIDTH + MARGIN, LEGEND + 24 * len(colors)
    return picture(*size, shapes)


def picture(width: float, height: float, shapes: list[str], color: str = "black") -> str:
    """SVG of the shapes, with texts and what says no other fill in `color`."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}" '
    head = head.format(width, height) + f'fill="{color}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, *shapes, "</svg>", ""])


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.2f}" y="{y}" text-anchor="{anchor}">{words}</text>'


def _axis(seconds: float) -> list[str]:
    """Ticks at 1, 2 or 5 times a power of ten of milliseconds, at most ten of them."""
    steps = (factor * 10.0**power for power in range(-6, 9) for factor in (1, 2, 5))
    step = next(step for step in steps if 1e3 * seconds / step <= 10)
    ticks = [i * step for i in range(int(1e3 * seconds / step) + 1)]
    shapes = [f'<path d="M{LEFT} {BOTTOM}h{WIDTH}" stroke="black"/>']
    for i, tick in enumerate(ticks):
        x = LEFT + tick / (1e3 * seconds) * WIDTH
        label = f"{tick:g}" + " ms" * (i == len(ticks) - 1)
        shapes += [f'<path d="M{x:.2f} {BOTTOM}v5" stroke="black"/>', text(x, BOTTOM + 20, label, "middle")]
    return shapes


def _legend(spans: list[Span], total: float, colors: dict[str, str]) -> list[str]:
    """Each phase with its share of the steps' time on the host."""
    seconds: dict[str, float] = defaultdict(float)
    for phase, begin, stop in spans:
        seconds[phase] += stop - begin
    shapes = []
    for i, (phase, taken) in enumerate(seconds.items()):
        y = LEGEND + 24 * i
        shapes.append(f'<rect x="{LEFT}" y="{y - 12}" width="16" height="16" fill="{colors.get(phase, COLORS[-1])}"/>')
        shapes.append(text(LEFT + 26, y, phase))
        shapes.append(text(LEFT + 220, y, f"{1e3 * taken:.3f} ms", "end"))
        shapes.append(text(LEFT + 300, y, f"{100 * taken / total:.2f} %", "end"))
    return shapes
