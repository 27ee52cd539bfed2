"""Figure: measured speedups of every method, one panel for each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.judging import OURS, best_of_each

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS_COLOUR, RIVAL_COLOUR, INK = "#1b6ca8", "#b9c2cc", "#222222"


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the figure; `results` holds the result of `benchmarks/selection.py` for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    most = max(len(best_of_each(result["rows"])) for result in results)
    figure, panels = plt.subplots(
        1, len(results), figsize=(1 + 5 * len(results), 1.5 + 0.42 * most), sharex=True, squeeze=False
    )
    for panel, result in zip(panels[0], results, strict=True):
        _draw_panel(panel, result)
    figure.suptitle("Choosing what to skip: speedup over plain decoding, measured", color=INK, fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _draw_panel(panel: Axes, result: dict[str, Any]) -> None:
    rows = best_of_each(result["rows"])[::-1]
    for place, row in enumerate(rows):
        speedup, ours = row["speedup"], row["method"] == OURS
        panel.barh(place, speedup["value"], height=0.66, color=OURS_COLOUR if ours else RIVAL_COLOUR)
        panel.plot([speedup["low"], speedup["high"]], [place, place], color=INK, linewidth=1.4)
        panel.annotate(
            f"{speedup['value']:.2f}x",
            (speedup["high"], place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    panel.set_yticks(range(len(rows)), [row["method"] for row in rows])
    for label, row in zip(panel.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["method"] == OURS else "normal")
    panel.axvline(1.0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    panel.set_title(result["title"], fontsize=10, color=INK)
    panel.set_xlabel("times plain decoding, with 95 % interval", fontsize=9)
    panel.margins(x=0.14)
    panel.tick_params(length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
