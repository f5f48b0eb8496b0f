"""Figures by matplotlib: as SVG that takes its colours from the page, and as PNG.

A figure is a function that draws on axes. Colours are those of a light page; in SVG each is replaced by
a variable of the page's, so that the same figure is right on a dark one. They keep 3:1 against both,
and no meaning hangs on a colour alone: shapes differ too, and every mark is labelled or in a table.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_align.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, LINE, PAPER = "#1b1f25", "#59636f", "#d0d7df", "#fffffe"
SAFE, REFUSED, CHOSEN = "#0072b1", "#d55e01", "#a0277d"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAPER: "--paper",
    SAFE: "--safe",
    REFUSED: "--refused",
    CHOSEN: "--chosen",
}
SCALE = "cividis"
"""The colour map of what is coloured by value: even in lightness, and alike for the colour-blind."""

Titles = dict[str, str]
"""What a reader is told of a mark, by the `gid` of its artist."""


class Figure(NamedTuple):
    """A picture, not yet drawn."""

    key: str
    """Names it among the figures of a page: letters, digits and hyphens."""
    title: str
    alt: str
    """What it shows, for those who do not see it."""
    draw: Callable[[Axes], Titles]
    height: float = 4.2
    """In inches, of a width of 5.6."""


WIDTH = 5.6


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element to be put into a page."""
    with _style() as new_figure:
        drawn = new_figure(figsize=(WIDTH, figure.height), layout="constrained")
        titles = figure.draw(drawn.add_subplot())
        out = io.StringIO()
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), figure, titles)


def png(figures: Sequence[Figure], path: str | os.PathLike[str]) -> None:
    """Write the figures one below the other."""
    with _style() as new_figure:
        heights = [figure.height for figure in figures]
        size = (WIDTH, sum(heights))
        drawn = new_figure(figsize=size, dpi=200, facecolor=PAPER, layout="constrained")
        parts = drawn.subfigures(len(figures), height_ratios=heights, squeeze=False)
        for part, figure in zip(parts.flat, figures, strict=True):
            part.suptitle(figure.title, fontsize=12)
            figure.draw(part.add_subplot())
        drawn.savefig(path, format="png", facecolor=PAPER)


@contextmanager
def _style() -> Iterator[Any]:
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Drawn
    except ImportError as error:
        raise InputError(
            "figures: found no matplotlib; expected it installed (pip install matplotlib)"
        ) from error

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "mergekit-align",  # the same file from the same data
        "text.parse_math": False,  # a name may have dollar signs
        "font.family": "sans-serif",
        "font.size": 10.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The reader's browser has glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")

        def new_figure(**options: Any) -> Drawn:
            drawn = Drawn(**options)
            FigureCanvasAgg(drawn)  # which can measure text
            return drawn

        yield new_figure


def _inline(text: str, figure: Figure, titles: Titles) -> str:
    """matplotlib's file as an element: its own names, the page's colours, titles on its marks."""
    body = text[text.index("<svg") :].rstrip()
    head, body = body.split(">", 1)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    for gid, title in titles.items():
        mark = f'<g id="{gid}">'
        body = body.replace(mark, f'<g id="{gid}" class="mark"><title>{escape(title)}</title>')
    body = re.sub(r"<[^<>]*>", lambda tag: _own(tag[0], figure.key), body)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} '
        f'role="img" aria-label="{escape(figure.alt)}">{body}'
    )


def _own(tag: str, key: str) -> str:
    """A tag with its names beginning with `key`, and its colours the page's."""
    tag = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{key}-", tag)
    return re.sub(
        r"#[0-9a-f]{6}\b",
        lambda colour: f"var({_VARIABLES[colour[0]]})" if colour[0] in _VARIABLES else colour[0],
        tag,
    )


def place_labels(
    axes: Axes,
    labels: Sequence[tuple[float, float, str, str]],
    marks: Sequence[tuple[float, float, float, float]],
) -> None:
    """Write a label beside each point, where it covers no other label and no mark.

    Args:
        labels: x, y, text and colour of each.
        marks: what is drawn, each as the least and the greatest x, and the least and the greatest y.
    """
    from matplotlib.transforms import Bbox

    figure: Any = axes.get_figure(root=True)
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    reach = 6.0 * renderer.points_to_pixels(1.0)
    taken = []
    for left, right, low, high in marks:
        (x0, y0), (x1, y1) = axes.transData.transform([(left, low), (right, high)])
        thin = 2.0 if (left, low) != (right, high) else reach
        taken.append(Bbox.from_extents(x0 - thin, y0 - thin, x1 + thin, y1 + thin))
    frame = axes.get_window_extent(renderer)
    for x, y, text, colour in labels:
        best: tuple[float, Any, Any] | None = None
        for rank, (dx, dy, across, along) in enumerate(_places()):
            label = axes.annotate(
                text,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha=across,
                va=along,
                fontsize=9.5,
                color=colour,
                annotation_clip=False,
                zorder=6,
            )
            box = label.get_window_extent(renderer)
            outside = box.width * box.height - _area(box, frame)
            cost = sum(_area(box, other) for other in taken) + 2 * outside + 4 * rank
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, label, box)
            else:
                label.remove()
        assert best is not None
        taken.append(best[2])


def _places() -> Iterator[tuple[float, float, str, str]]:
    """Offsets in points and alignments, nearest first."""
    for far in (9.0, 17.0, 27.0, 40.0):
        near = far * 0.6
        yield near, near, "left", "bottom"
        yield -near, near, "right", "bottom"
        yield near, -near, "left", "top"
        yield -near, -near, "right", "top"
        yield 0, far, "center", "bottom"
        yield 0, -far, "center", "top"
        yield far, 0, "left", "center"
        yield -far, 0, "right", "center"


def _area(one: Any, other: Any) -> float:
    width: float = min(one.x1, other.x1) - max(one.x0, other.x0)
    height: float = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)
