"""The profile as a figure: the cost of passes by length, and the parts of a step of the full draft."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfspec_search.profile.costs import Costs
from selfspec_search.profile.profile import Profile
from selfspec_search.report.canvas import PAPER, style

LINE_COLOURS = ("#8fb4d9", "#4a7fb0", "#1d4f7c", "#0b2a47")
"""From light to dark by context, so that the lines also differ without colour."""
MARKERS = ("o", "s", "^", "D")
PARTS: tuple[tuple[str, str, str, Callable[[Costs], float]], ...] = (
    ("MLP", "#1d4f7c", "", lambda costs: costs.num_layers * costs.mlp),
    ("attention", "#7fa3cc", "////", lambda costs: costs.num_layers * costs.attention),
    ("layers' own", "#cfdae5", "", lambda costs: costs.num_layers * costs.layer),
    ("fixed", "#8a949e", "", lambda costs: costs.fixed),
)
"""Parts of a step from the bottom up: name, colour, hatching, and seconds of a step that skips nothing."""


def plot(profile: Profile, model: str) -> Figure:
    """Two panels, side by side; `model` is the model's name in the title."""
    with style(), matplotlib.rc_context({"axes.titlelocation": "left", "axes.titlepad": 10.0}):
        figure = Figure(figsize=(9.6, 4.2), dpi=160, layout="constrained")
        passes, steps = figure.subplots(1, 2, width_ratios=(3, 2))
        _plot_passes(passes, profile)
        _plot_steps(steps, profile)
        figure.suptitle(f"{model} on {profile.conditions}", x=0.01, ha="left", size=11)
    return figure


def _plot_passes(axes: Axes, profile: Profile) -> None:
    tokens = np.arange(1, profile.gamma_max + 2)
    for index, (context, costs) in enumerate(zip(profile.contexts, profile.costs, strict=True)):
        shade = index * (len(LINE_COLOURS) - 1) // max(1, len(profile.contexts) - 1)
        axes.plot(
            tokens,
            np.array(costs.rounds) * 1e3,
            color=LINE_COLOURS[shade] if len(profile.contexts) > 1 else LINE_COLOURS[-2],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4.5,
            linewidth=1.6,
            label=f"{context:,}",
        )
    axes.set(title="A pass of the full model", xlabel="tokens in the pass, per row", ylabel="milliseconds")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    axes.legend(title="tokens in the cache", title_fontsize=8.5, loc="lower right", reverse=True)


def _plot_steps(axes: Axes, profile: Profile) -> None:
    places = np.arange(len(profile.contexts))
    bottom = np.zeros(len(places))
    for name, colour, hatch, seconds in PARTS:
        heights = np.array([seconds(costs) for costs in profile.costs]) * 1e3
        axes.bar(places, heights, 0.62, bottom, color=colour, hatch=hatch, edgecolor=PAPER, linewidth=0.8, label=name)
        bottom += heights
    for place, total in zip(places, bottom, strict=True):
        axes.annotate(f"{total:.3g}", (place, total), (0, 3), textcoords="offset points", ha="center")
    axes.set(title="A step of the draft that skips nothing", xlabel="tokens in the cache", ylabel="milliseconds")
    axes.set_xticks(places, [f"{context:,}" for context in profile.contexts])
    margin = 1.0 if len(places) == 1 else 0.6
    axes.set_xlim(-margin, places[-1] + margin)
    axes.set_ylim(0, bottom.max() * 1.1)
    axes.grid(axis="y")
    axes.legend(reverse=True, loc="upper left", bbox_to_anchor=(1.0, 1.0))
