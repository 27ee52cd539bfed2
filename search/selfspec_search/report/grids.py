"""Grids: a model's sub-layers as two rows of cells, one column per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.sublayers import SkipSet
from selfspec_search.report.canvas import INK, KEPT, PAPER, QUANTISED, SKIPPED, WIDTH, legend_above, new_figure
from selfspec_search.space import Sublayer, sublayers

KINDS = ("attn", "mlp")
MOST_NUMBERS = 20
"""Labels: the most layer numbers below a figure. In deeper models only every `STEPS`-th layer has a number."""
STEPS = (1, 2, 5, 10, 20, 50)
SCALE_STEPS = 4
OUTLIERS = 0.1
"""Share of the sub-layers whose values may be below the colour scale.

In many models the first MLP matters so much that all other sub-layers would have the same colour."""
_LOOKS: dict[str, Any] = {
    choice: {"facecolor": face, "edgecolor": "#b9c3cd", "linewidth": 0.0, "hatch": "////" if choice == "skip" else None}
    for choice, face in (("keep", KEPT), ("quantise", QUANTISED), ("skip", SKIPPED))
}
_MATTERS = LinearSegmentedColormap.from_list("matters", ["#8a2f14", "#dd8452", "#f4d9c4", "#faf7f4"])
_HELPS = LinearSegmentedColormap.from_list("helps", ["#a63a1b", "#f7f5f2", "#1f5f8b"])


def strip(draft_spec: DraftSpec, num_layers: int) -> Figure:
    """Two rows of cells: dark sub-layers run in the draft, lighter ones run quantised, light ones are skipped."""
    figure, (axes,) = new_figure(_strip_height(num_layers) + 0.3)
    _cells(axes, num_layers)
    for kind, layer in sublayers(num_layers):
        corner = (layer - 0.45, KINDS.index(kind) - 0.42)
        axes.add_patch(Rectangle(corner, 0.9, 0.84, **_LOOKS[draft_spec.choice(kind, layer)]))
    quantised = {"quantise": f"runs in {draft_spec.format.name}"} if draft_spec.format else {}
    named = {"keep": "runs", **quantised, "skip": "skipped"}
    marks = [Patch(**_LOOKS[choice]) for choice in named]
    legend_above(figure, marks, list(named.values()), handlelength=1.1, handleheight=1.0)
    return figure


def sensitivity(
    values: Mapping[Sublayer, float],
    num_layers: int,
    skipped: SkipSet,
    *,
    differences: bool,
    happens: str = "is skipped",
) -> Figure:
    """A heat map of all sub-layers, `2 L`, with dots on the skipped sub-layers.

    Args:
        values: agreement by the only sub-layer that is changed, or with `differences` gains in predicted speedup. Cells
            without a value, or with NaN, are blank.
        happens: how that sub-layer is changed.
    """
    figure, (axes,) = new_figure(_strip_height(num_layers) + 0.75)
    grid = np.array([[values.get((kind, layer), np.nan) for layer in range(num_layers)] for kind in KINDS])
    _cells(axes, num_layers)
    span = float(np.nanmax(np.abs(grid))) or 1e-9
    low = float(np.nanquantile(grid, OUTLIERS))
    norm = TwoSlopeNorm(0.0, -span, span) if differences else Normalize(low, max(float(np.nanmax(grid)), low + 1e-3))
    image = axes.pcolormesh(
        np.arange(num_layers + 1) - 0.5,
        [-0.5, 0.5, 1.5],
        np.ma.masked_invalid(grid),
        cmap=_HELPS if differences else _MATTERS,
        norm=norm,
        edgecolors=PAPER,
        linewidth=1.2,
    )
    for kind, layer in skipped:
        axes.scatter([layer], [KINDS.index(kind)], s=9, color=INK, edgecolors=PAPER, linewidths=0.5)
    label = "gain in predicted speedup" if differences else f"agreement when it alone {happens}"
    extend = "neither" if differences else "min"
    bar = figure.colorbar(image, ax=axes, location="bottom", label=label, extend=extend, aspect=50, fraction=0.08)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.xaxis.set_major_locator(MaxNLocator(SCALE_STEPS))
    if not differences:
        bar.ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    return figure


def _strip_height(num_layers: int) -> float:
    """Inches: the height that makes cells approximately square."""
    return 0.35 + 2 * min(0.34, max(0.2, (WIDTH - 0.6) / max(num_layers, 1)))


def _cells(axes: Axes, num_layers: int) -> None:
    step = next((step for step in STEPS if num_layers <= step * MOST_NUMBERS), num_layers)
    axes.set_xlim(-0.5, max(num_layers, 1) - 0.5)
    axes.set_ylim(1.5, -0.5)
    axes.set_xticks(range(0, num_layers, step))
    axes.set_yticks([0, 1], ["attention", "MLP"])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
