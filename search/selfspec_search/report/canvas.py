"""Canvas: the style of a report's figures, and their SVG and PNG."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 6.8
"""Inches: the width of every figure, so that all figures have letters of the same size."""
PNG_DPI = 200

INK, MUTED, GRID, PAPER = "#1f2933", "#6b7785", "#e3e7eb", "#ffffff"
ISO, SHADE = "#b4bdc7", "#e9edf2"
KEPT, QUANTISED, SKIPPED = "#34516e", "#8fb0cf", "#e1e7ed"
PREDICTED, MEASURED, PALE, CHOSEN = "#7fa3cc", "#1f5f8b", "#a9cbe3", "#c8462b"

_STYLE: Any = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib; in the page, CSS replaces it by the reader's own font
    "font.size": 8.5,
    "axes.titlesize": 9.0,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "figure.facecolor": PAPER,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",  # letters, not outlines: they can be selected and searched
    "svg.hashsalt": "selfspec",  # the same figure is the same text
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@contextmanager
def style() -> Iterator[None]:
    """A context in which figures have the report's style."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the report's width and `height` inches, with `columns` axes side by side."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def legend_above(figure: Figure, *entries: Any, **options: Any) -> None:
    """Put a legend above all axes, on the left: a phone does not show the right part of a wide figure."""
    figure.legend(*entries, loc="outside upper left", ncols=4, columnspacing=1.2, handletextpad=0.7, **options)


def to_svg(figure: Figure) -> str:
    """An `<svg>` element that scales with the page. Group names are removed, since pages hold several figures."""
    out = StringIO()
    figure.savefig(out, format="svg", metadata=_NO_METADATA, facecolor="none")
    element = out.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r'<g id="[^"]*"', "<g", element)  # only clip paths and markers are referred to, by hashes
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1))


def to_png(figure: Figure) -> bytes:
    out = BytesIO()
    figure.savefig(out, format="png", dpi=PNG_DPI)
    return out.getvalue()
