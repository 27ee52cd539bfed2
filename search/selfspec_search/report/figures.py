"""Figures of a study and its plan. Each public function of drawing returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from selfspec_search.report import canvas
from selfspec_search.report.canvas import legend_above, new_figure
from selfspec_search.report.data import Point, StudyData, Trial

ISO_SPEEDUPS = (1.0, 1.2, 1.5, 2.0, 3.0)
TABLE_COSTS, TABLE_AGREEMENTS = (0.55, 0.45, 0.28, 0.20), (0.80, 0.90, 0.95, 0.98)
"""Draft costs of the ceiling table: from published skip sets to quantised drafts that also skip."""
_SPEED = LinearSegmentedColormap.from_list("speed", ["#b9c8d8", "#7fa3cc", "#1f5f8b", "#0d2b45"])
_BAR: dict[str, Any] = {"color": canvas.SKIPPED, "edgecolor": canvas.MEASURED, "hatch": "///"}
_INTERVAL: dict[str, Any] = {
    "color": canvas.INK,
    "linewidth": 1.1,
    "marker": "|",
    "markersize": 6,
    "solid_capstyle": "butt",
}
_PREDICTED: dict[str, Any] = {
    "color": canvas.INK,
    "marker": "s",
    "markersize": 3,
    "linewidth": 1.1,
    "linestyle": (0, (4, 2)),
    "zorder": 3,
}
_LINES: dict[str, dict[str, Any]] = {
    # Broad and below the other line: replay is exact, so the two lines often coincide.
    "measured": {"color": canvas.PALE, "marker": "o", "markersize": 9, "linewidth": 5, "zorder": 2},
    "predicted, calibration": {**_PREDICTED, "color": canvas.MUTED, "marker": "^", "linestyle": (0, (1, 1.5))},
}


def pareto(study: StudyData, chosen: Trial | None, name: str) -> Figure:
    """Draft cost against agreement: all trials, their Pareto front, the chosen trial, and lines of equal speedup."""
    figure, (axes,) = new_figure(4.2)
    points = [point for _, point in study.placed]
    _ended_early(axes, [point for trial, point in study.placed if trial.is_pruned])
    complete = [(point, trial.speedup) for trial, point in study.placed if trial.speedup is not None]
    colours: dict[str, Any] = {"c": [speedup for _, speedup in complete], "cmap": _SPEED}
    dots = axes.scatter(
        *_columns([point for point, _ in complete]), s=22, edgecolors=canvas.PAPER, linewidths=0.4, zorder=3, **colours
    )
    axes.scatter([], [], s=22, color=_SPEED(0.5), label="complete")  # for the legend: dots differ in colour
    if len({speedup for _, speedup in complete}) > 1:
        figure.colorbar(dots, ax=axes, label="predicted speedup", shrink=0.6, aspect=25).outline.set_visible(False)  # type: ignore[operator]
    front = _columns([trial.point for trial in study.front() if trial.point is not None])
    axes.plot(*front, color=canvas.INK, linewidth=1.0, drawstyle="steps-post", label="Pareto front", zorder=2)
    if chosen is not None and chosen.point is not None:
        axes.scatter(
            *chosen.point, s=110, facecolors="none", edgecolors=canvas.CHOSEN, linewidths=1.8, label=name, zorder=5
        )
    axes.set_xlim(0, max([x for x, _ in points] + [1.0]) * 1.04)
    axes.set_ylim(max(0.0, min([y for _, y in points] + [0.9]) - 0.06), 1.015)
    _iso_speedups(axes, study.gamma_max)
    axes.set_xlabel("cost of a draft step, in plain steps")
    _agreement_axis(axes, "agreement at the first draft position")
    legend_above(figure)
    return figure


def ideal_cost(agreement: float, speedup: float, gamma_max: int) -> float:
    """The cost c of a draft step, in plain steps, at which the best gamma gives this speedup; below 0 if no cost does.

    From speedup = ((1 - a^(gamma + 1)) / (1 - a)) / (gamma c + 1): each drafted token agrees with the same
    probability a, and a verify pass costs a plain step.
    """
    tokens = _ideal_tokens(agreement, gamma_max)
    return max((each / speedup - 1) / gamma for gamma, each in enumerate(tokens) if gamma)


def ideal_speedup(agreement: float, cost: float, gamma_max: int) -> float:
    """The inverse of `ideal_cost`: the best speedup over gamma for a cost; 1 where plain decoding is faster."""
    return max(each / (gamma * cost + 1) for gamma, each in enumerate(_ideal_tokens(agreement, gamma_max)))


def _ideal_tokens(agreement: float, gamma_max: int) -> Iterable[float]:
    """Expected tokens per round, for gamma from 0."""
    return accumulate((agreement**depth for depth in range(1, gamma_max + 1)), initial=1.0)


def ceilings(points: Mapping[str, Sequence[Point]], gamma_max: int) -> Figure:
    """The table of ideal speedups by draft cost and agreement, with the drafts of each name as points.

    Drafts of low agreement are left out.
    """
    figure, (axes,) = new_figure(4.2)
    for cost in TABLE_COSTS:
        for agreement in TABLE_AGREEMENTS:
            speedup = f"{ideal_speedup(agreement, cost, gamma_max):.2f}"
            axes.text(cost, agreement, speedup, ha="center", va="center", color=canvas.MUTED, fontsize=8.5)
    shades = (canvas.PALE, canvas.PREDICTED, canvas.MEASURED, canvas.CHOSEN)
    for index, (name, some) in enumerate(points.items()):
        colour = shades[index % len(shades)]
        axes.scatter(*_columns(some), s=26, color=colour, edgecolors=canvas.PAPER, linewidths=0.5, label=name, zorder=3)
    costs, _ = _columns([point for some in points.values() for point in some] + [(TABLE_COSTS[0], 1.0)])
    axes.set_xlim(0, min(1.2, max(costs) * 1.08))
    axes.set_ylim(TABLE_AGREEMENTS[0] - 0.1, 1.01)
    axes.set_xlabel("cost of a draft step, in plain steps")
    _agreement_axis(axes, "agreement")
    legend_above(figure)
    return figure


def history(study: StudyData) -> Figure:
    """Predicted speedup by trial number, and the best so far."""
    figure, (axes,) = new_figure(2.9)
    complete = [(t.number, t.speedup) for t in study.trials if t.speedup is not None]
    axes.axhline(1.0, color=canvas.MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    _ended_early(axes, [(t.number, t.estimate) for t in study.trials if t.is_pruned and t.estimate is not None])
    axes.scatter(*_columns(complete), s=14, color=canvas.PREDICTED, edgecolors="none", label="complete")
    best = list(accumulate(sorted(complete), lambda a, b: (b[0], max(a[1], b[1]))))
    if best:
        best.append((max(trial.number for trial in study.trials), best[-1][1]))
    axes.plot(*_columns(best), color=canvas.MEASURED, linewidth=1.6, drawstyle="steps-post", label="best so far")
    axes.annotate("plain", (1, 1.0), xycoords=("axes fraction", "data"), xytext=(3, -3), textcoords="offset points")
    axes.set_xlabel("trial")
    axes.set_ylabel("predicted speedup")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    legend_above(figure)
    return figure


def comparison(bars: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Sequence[float]]) -> Figure:
    """Bar charts side by side, each with one bar per source.

    Args:
        bars: values by source, by the chart's title.
        intervals: ends of the measured value's interval, by the chart's title; empty if unknown.
    """
    figure, columns = new_figure(0.55 + 0.32 * max(map(len, bars.values())), len(bars))
    for axes, (title, values) in zip(columns, bars.items(), strict=True):
        ends: Sequence[float] = ()
        for y, (label, value) in enumerate(values.items()):
            ends = intervals.get(title, ()) if label == "measured" else ()
            axes.barh(y, value, 0.68, **({"color": canvas.MEASURED} if label == "measured" else _BAR))
            if ends:
                axes.plot(ends, [y, y], **_INTERVAL)
            text = f"{value:.2f}" if value < 100 else f"{value:.0f}"
            axes.annotate(text, (max([value, *ends]), y), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set_title(title, loc="left")
        axes.set_yticks(range(len(values)), list(values) if axes is columns[0] else [""] * len(values))
        axes.invert_yaxis()
        axes.set_xlim(0, max([*values.values(), *ends, 1e-9]) * 1.28)
        axes.tick_params(left=False, bottom=False, labelbottom=False)
        axes.spines[["bottom"]].set_visible(False)
    return figure


def positions(lines: Mapping[str, Sequence[float]], layers_end: int | None = None) -> Figure:
    """Agreement by draft position, and the probability that a round accepts all tokens up to there, by source.

    Beyond position `layers_end` only prompt lookup drafts. These positions are shaded and have no products, because
    only some rounds reach them.
    """
    figure, (each, product) = new_figure(3.1, 2)
    for label, values in lines.items():
        together = list(accumulate(values[:layers_end], lambda a, b: a * b))
        for axes, shown in ((each, values), (product, together)):
            axes.plot(range(1, len(shown) + 1), shown, label=label, **_LINES.get(label, _PREDICTED))
    longest = max(map(len, lines.values()))
    if layers_end is not None and layers_end < longest:
        each.axvspan(layers_end + 0.5, longest + 0.5, color=canvas.SHADE, zorder=0, label="prompt lookup only")
    _by_position(each, "agreement, given that all before it agreed", longest)
    _by_position(product, "accepted up to here, if drafted so far", min(longest, layers_end or longest))
    legend_above(figure, *each.get_legend_handles_labels())
    return figure


def _by_position(axes: Axes, title: str, longest: int) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel("draft position")
    axes.set_xlim(0.5, longest + 0.5)
    axes.set_ylim(0, 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _agreement_axis(axes, "")
    axes.grid(axis="y")


def _agreement_axis(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _ended_early(axes: Axes, points: Sequence[Point]) -> None:
    axes.scatter(*_columns(points), s=12, facecolors="none", edgecolors="#a3adb8", linewidths=0.7, label="ended early")


def _iso_speedups(axes: Axes, gamma_max: int) -> None:
    bottom, top = axes.get_ylim()
    right = axes.get_xlim()[1]
    agreements: NDArray[np.float64] = np.linspace(bottom, min(top, 1.0), 200)
    for speedup in ISO_SPEEDUPS:
        costs = np.array([ideal_cost(a, speedup, gamma_max) for a in agreements])
        shown = (costs >= 0) & (costs <= right)
        if shown.any():
            axes.plot(costs[shown], agreements[shown], color=canvas.ISO, linewidth=0.9, zorder=0)
            x, y = costs[shown][-1], agreements[shown][-1]
            axes.annotate(f"{speedup:g}x", (x, y), color=canvas.MUTED, fontsize=7.5, ha="center", va="bottom", zorder=1)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
