"""Figures: what a study found, drawn. Each takes what it shows and gives a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from selfspec.skip_set import SkipSet
from selfspec_search.report.canvas import (
    CHOSEN,
    GRID,
    INK,
    KEPT,
    MEASURED,
    MUTED,
    PAPER,
    PREDICTED,
    SKIPPED,
    WIDTH,
    new_figure,
)
from selfspec_search.report.data import StudyData, Sublayer, Trial

ISO_SPEEDUPS = (1.0, 1.2, 1.5, 2.0, 3.0)
KINDS = ("attn", "mlp")
NUMBERED_CELLS = 20
"""Up to so many layers, every cell has room for its number."""
OUTLIERS = 0.1
"""So large a share of the sub-layers may be darker than the scale shows: the first MLP of many models is needed so much
that all others would look alike."""
_SPEED = LinearSegmentedColormap.from_list("speed", ["#d6dde5", "#7fa3cc", "#1f5f8b", "#0d2b45"])
_MATTERS = LinearSegmentedColormap.from_list("matters", ["#8a2f14", "#dd8452", "#f4d9c4", "#faf7f4"])
_HELPS = LinearSegmentedColormap.from_list("helps", ["#a63a1b", "#f7f5f2", "#1f5f8b"])


def strip(skip_set: SkipSet, num_layers: int) -> Figure:
    """Two rows of cells, one column a layer: dark runs in the draft, light is skipped."""
    figure, (axes,) = new_figure(_strip_height(num_layers) + 0.3)
    rows = (skip_set.attn, skip_set.mlp)
    _cells(axes, num_layers)
    for y, skipped in enumerate(rows):
        for layer in range(num_layers):
            face = SKIPPED if layer in skipped else KEPT
            axes.add_patch(_cell(layer, y, face, hatch="////" if layer in skipped else None))
    marks = [Patch(facecolor=KEPT, label="runs"), Patch(facecolor=SKIPPED, edgecolor=_HATCH, hatch="////")]
    marks[1].set_label("skipped")
    figure.legend(handles=marks, loc="outside upper right", ncols=2, handlelength=1.1, handleheight=1.0)
    return figure


def pareto(study: StudyData, chosen: Trial | None, name: str) -> Figure:
    """Draft cost against agreement: all trials, their front, the chosen one, and where speedups would be equal."""
    figure, (axes,) = new_figure(4.2)
    known = [(trial, trial.point) for trial in study.trials if trial.point is not None]
    pruned = [point for trial, point in known if trial.is_pruned]
    whole = [(trial, point) for trial, point in known if not trial.is_pruned]
    axes.scatter(*_columns(pruned), s=12, facecolors="none", edgecolors="#a3adb8", linewidths=0.7, label="ended early")
    dots = axes.scatter(
        *_columns([point for _, point in whole]),
        s=22,
        c=[trial.speedup or 0.0 for trial, _ in whole],
        cmap=_SPEED,
        edgecolors=PAPER,
        linewidths=0.4,
        label="whole trial",
        zorder=3,
    )
    if len({trial.speedup for trial, _ in whole}) > 1:
        figure.colorbar(dots, ax=axes, label="predicted speedup", shrink=0.6, aspect=25).outline.set_visible(False)  # type: ignore[operator]
    front = _columns([trial.point for trial in study.front() if trial.point is not None])
    axes.plot(*front, color=INK, linewidth=1.0, drawstyle="steps-post", label="Pareto front", zorder=2)
    if chosen is not None and chosen.point is not None:
        x, y = chosen.point
        axes.scatter([x], [y], s=110, facecolors="none", edgecolors=CHOSEN, linewidths=1.8, label=name, zorder=5)
    _frame(axes, [point for _, point in known])
    _iso_speedups(axes, study.gamma_max)
    axes.set_xlabel("cost of a draft step, in plain steps")
    axes.set_ylabel("agreement at the first draft position")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend_above(figure)
    return figure


def ideal_cost(agreement: float, speedup: float, gamma_max: int) -> float:
    """The cost c of a draft step, in plain steps, at which the best gamma gives this speedup; below 0 where none does.

    From speedup = ((1 - a^(gamma + 1)) / (1 - a)) / (gamma c + 1): each drafted token agrees with the same
    probability a, and a verify pass costs a plain step.
    """
    tokens = accumulate((agreement**depth for depth in range(1, gamma_max + 1)), initial=1.0)
    return max((each / speedup - 1) / gamma for gamma, each in enumerate(tokens) if gamma)


def history(study: StudyData) -> Figure:
    """Predicted speedup by trial number, and the best so far."""
    figure, (axes,) = new_figure(2.9)
    whole = [(t.number, t.speedup) for t in study.trials if t.speedup is not None]
    pruned = [(t.number, t.estimate) for t in study.trials if t.is_pruned and t.estimate is not None]
    axes.axhline(1.0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.scatter(*_columns(pruned), s=12, facecolors="none", edgecolors="#a3adb8", linewidths=0.7, label="ended early")
    axes.scatter(*_columns(whole), s=14, color=PREDICTED, edgecolors="none", label="whole trial")
    best = list(accumulate(sorted(whole), lambda a, b: (b[0], max(a[1], b[1]))))
    if best:
        best.append((max(trial.number for trial in study.trials), best[-1][1]))
    axes.plot(*_columns(best), color=MEASURED, linewidth=1.6, drawstyle="steps-post", label="best so far")
    axes.annotate("plain", (1, 1.0), xycoords=("axes fraction", "data"), xytext=(3, -3), textcoords="offset points")
    axes.set_xlabel("trial")
    axes.set_ylabel("predicted speedup")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    _legend_above(figure)
    return figure


def comparison(bars: Mapping[str, Mapping[str, float]]) -> Figure:
    """Small bar charts side by side: for each figure's name, its value by where it is from ('measured' stands out)."""
    figure, columns = new_figure(0.55 + 0.32 * max(map(len, bars.values())), len(bars))
    for axes, (title, values) in zip(columns, bars.items(), strict=True):
        labels = list(values)
        for y, (label, value) in enumerate(values.items()):
            axes.barh(y, value, 0.68, **_BARS[label == "measured"])
            axes.annotate(
                f"{value:.2f}" if value < 100 else f"{value:.0f}",
                (value, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_title(title, loc="left")
        axes.set_yticks(range(len(labels)), labels if axes is columns[0] else [""] * len(labels))
        axes.invert_yaxis()
        axes.set_xlim(0, max([*values.values(), 1e-9]) * 1.28)
        axes.tick_params(left=False, bottom=False, labelbottom=False)
        axes.spines[["bottom"]].set_visible(False)
    return figure


_BARS: dict[bool, dict[str, Any]] = {
    True: {"color": MEASURED},
    False: {"color": SKIPPED, "edgecolor": MEASURED, "hatch": "///"},
}


def positions(lines: Mapping[str, Sequence[float]]) -> Figure:
    """Agreement by draft position, and how likely the round comes so far; one line for where each is from."""
    figure, columns = new_figure(2.9, 2)
    titles = ("agreement, given that all before it agreed", "accepted up to here, if drafted so far")
    for axes, title, product in zip(columns, titles, (False, True), strict=True):
        for label, values in lines.items():
            shown = list(accumulate(values, lambda a, b: a * b)) if product else list(values)
            axes.plot(range(1, len(shown) + 1), shown, label=label, **_LINES.get(label, _PREDICTED))
        axes.set_title(title, loc="left")
        axes.set_xlabel("draft position")
        axes.set_ylim(0, 1.04)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y")
    columns[0].legend(loc="lower left")
    return figure


_PREDICTED: dict[str, Any] = {
    "color": PREDICTED,
    "marker": "s",
    "markersize": 3.5,
    "linewidth": 1.2,
    "linestyle": (0, (5, 2)),
}
_LINES: dict[str, dict[str, Any]] = {
    "measured": {"color": MEASURED, "marker": "o", "markersize": 4.5, "linewidth": 1.6, "zorder": 3},
    "predicted, calibration": {**_PREDICTED, "color": MUTED, "marker": "^", "linestyle": (0, (1, 1.5))},
}


def sensitivity(values: Mapping[Sublayer, float], num_layers: int, skipped: SkipSet, *, differences: bool) -> Figure:
    """A 2 x L heat map, the skipped sub-layers dotted.

    `values` are agreements with that one sub-layer skipped, or, with `differences`, gains in predicted speedup; NaN is
    left blank.
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
    label = "gain in predicted speedup" if differences else "agreement when it alone is skipped"
    bar = figure.colorbar(
        image,
        ax=axes,
        location="bottom",
        label=label,
        extend="neither" if differences else "min",
        aspect=50,
        fraction=0.08,
    )
    bar.outline.set_visible(False)  # type: ignore[operator]
    if not differences:
        bar.ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


_HATCH = "#b9c3cd"


def _cell(layer: int, y: int, face: str, hatch: str | None) -> Patch:
    return Rectangle((layer - 0.45, y - 0.42), 0.9, 0.84, facecolor=face, edgecolor=_HATCH, linewidth=0.0, hatch=hatch)


def _legend_above(figure: Figure) -> None:
    figure.legend(loc="outside upper right", ncols=4, columnspacing=1.4, handletextpad=0.5)


def _strip_height(num_layers: int) -> float:
    """So that cells are as high as they are wide, within reason."""
    return 0.35 + 2 * min(0.34, max(0.2, (WIDTH - 0.6) / max(num_layers, 1)))


def _cells(axes: Axes, num_layers: int) -> None:
    step = 1 if num_layers <= NUMBERED_CELLS else 2 if num_layers <= 2 * NUMBERED_CELLS else 5
    axes.set_xlim(-0.5, max(num_layers, 1) - 0.5)
    axes.set_ylim(1.5, -0.5)
    axes.set_xticks(range(0, num_layers, step))
    axes.set_yticks([0, 1], ["attention", "MLP"])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)


def _frame(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """All points with room around them, agreement at most 1 and costs from 0."""
    costs, agreements = _columns(points)
    axes.set_xlim(0, max([*costs, 1.0]) * 1.04)
    low = min([*agreements, 0.9])
    axes.set_ylim(max(0.0, low - 0.06), 1.015)


def _iso_speedups(axes: Axes, gamma_max: int) -> None:
    bottom, top = axes.get_ylim()
    right = axes.get_xlim()[1]
    agreements: NDArray[np.float64] = np.linspace(bottom, min(top, 1.0), 200)
    for speedup in ISO_SPEEDUPS:
        costs = np.array([ideal_cost(a, speedup, gamma_max) for a in agreements])
        shown = (costs >= 0) & (costs <= right)
        if shown.any():
            axes.plot(costs[shown], agreements[shown], color=GRID, linewidth=1.0, zorder=0)
            x, y = costs[shown][-1], agreements[shown][-1]
            axes.annotate(f"{speedup:g}x", (x, y), color=MUTED, fontsize=7.5, ha="center", va="bottom", zorder=1)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
