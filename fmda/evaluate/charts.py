"""Charts of the report as SVG, and images as data addresses. Equal input gives equal bytes."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Int
from matplotlib.colors import to_hex
from PIL import Image

from fmda.evaluate.overlay import shrink

INK, PALE = "#1f2933", "#d9dee4"
LINES = ("#2563a8", "#c2541b", "#2e7d4f", "#8a3ffc", "#a8871f", "#0e7c86")
WIDEST = 1600
HEAT_CLASSES = 40


def curves(lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], title: str) -> str:
    """Returns an SVG document of value over step.

    Args:
        lines: (label, steps, values) each; labels are shown when there are several lines.
        title: the metric's name.
    """
    from matplotlib.figure import Figure  # needs no display and no pyplot state

    # text stays text, which is small; a fixed salt keeps ids equal
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fmda", "font.size": 9}):
        figure = Figure(figsize=(4.2, 2.3))
        axes = figure.add_subplot()
        for index, (label, steps, values) in enumerate(lines):
            dots = "." if len(steps) < 40 else None
            axes.plot(steps, values, color=LINES[index % len(LINES)], linewidth=1.4, marker=dots, label=label)
        every = np.concatenate([np.asarray(values, float) for _, _, values in lines])
        if every.min(initial=1) > 0 and every.max(initial=1) > 50 * every.min(initial=1):
            axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("step", color=INK)
        axes.grid(color=PALE, linewidth=0.6)
        axes.tick_params(colors=INK, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        figure.tight_layout(pad=0.4)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def heat_map(confusion: Int[np.ndarray, "K C"], names: Sequence[str]) -> str:
    """Returns an inline SVG of a confusion matrix, each row as shares of the truth's pixels.

    Hovering over a cell shows its numbers. Above 40 classes only the classes with the most pixels are drawn.
    """
    order = list(range(len(names)))
    if len(names) > HEAT_CLASSES:
        order = sorted(np.argsort(-confusion.sum(1), kind="stable")[:HEAT_CLASSES].tolist())
    share = confusion[:, : len(names)] / np.maximum(confusion.sum(1, keepdims=True), 1)
    cell, left = 22, 10 + 6.4 * max(len(names[k]) for k in order)
    top = left * 0.8 + 6
    size = cell * len(order)
    parts = [f'<svg role="img" aria-label="confusion" width="{left + size + 60:.0f}" height="{top + size + 4:.0f}">']
    for row, truth in enumerate(order):
        y = top + row * cell
        parts.append(f'<text x="{left - 5:.0f}" y="{y + 15:.0f}" text-anchor="end">{escape(names[truth])}</text>')
        x = left + row * cell + 14
        parts.append(f'<text transform="translate({x:.0f},{top - 5:.0f}) rotate(-50)">{escape(names[truth])}</text>')
        for column, guess in enumerate(order):
            value = float(share[truth, guess])
            label = f"{names[truth]} predicted as {names[guess]}: {100 * value:.1f} %"
            parts.append(
                f'<rect x="{left + column * cell:.0f}" y="{y:.0f}" width="{cell - 1}" height="{cell - 1}" '
                f'fill="{_heat(value, truth == guess)}"><title>{escape(label)}</title></rect>'
            )
            if value >= 0.005:
                colour = "#fff" if value > 0.55 else INK
                parts.append(
                    f'<text class="n" x="{left + column * cell + 10.5:.1f}" y="{y + 14:.0f}" fill="{colour}">'
                    f"{100 * value:.0f}</text>"
                )
    return "".join([*parts, "</svg>"])


def _heat(value: float, correct: bool) -> str:
    """Returns white to green on the diagonal, white to red elsewhere; the root makes small shares visible."""
    start, end = np.array([244, 246, 248]), np.array([24, 107, 74] if correct else [176, 36, 42])
    return to_hex((start + (end - start) * np.sqrt(np.clip(value, 0, 1))) / 255)


def image_address(path: Path) -> str:
    """Returns an image file as a data address: SVG as it is, others as the smaller of PNG and JPEG."""
    data = path.read_bytes()
    if path.suffix.lower() == ".svg":
        return svg_address(data.decode())
    with Image.open(io.BytesIO(data)) as image:
        original = image.format in ("PNG", "JPEG") and image.width <= WIDEST
        kind = str(image.get_format_mimetype()) if original else "image/jpeg"
        flat = shrink(np.asarray(image.convert("RGB")), WIDEST)
    file = io.BytesIO()
    Image.fromarray(flat).save(file, "JPEG", quality=86, subsampling=0)
    if not original or len(data) > file.tell():
        kind, data = "image/jpeg", file.getvalue()
    return _address(kind, data)


def svg_address(svg: str) -> str:
    """Returns an SVG document as a data address, whose ids are separate from those of the page."""
    return _address("image/svg+xml", svg.encode())


def _address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
