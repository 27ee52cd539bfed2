"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from selfspec_search import SearchResult

from common.budget import Stage
from selfspec.benchmark.measure import Score


def figures_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]] = (), caption: str = "") -> Table:
    """A table with a left-aligned first column; all other columns are right-aligned."""
    table = Table(title=title, caption=caption or None)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table


def pairs_table(title: str, rows: Mapping[str, str]) -> Table:
    """A table of names and values."""
    table = Table(title=title, show_header=False)
    for row in rows.items():
        table.add_row(*row)
    return table


def interval(ratio: Mapping[str, float] | None) -> str:
    """A ratio of the JSON with its interval, as text."""
    return f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""


def scores_table(scores: Sequence[Score]) -> Table:
    """One row for each decoder."""
    bases = list(scores[0].ratios)
    table = figures_table(
        "", ("decoder", "tokens/s", *(f"x {base} (95 %)" for base in bases), "acceptance", "tokens/round", "differing")
    )
    for score in scores:
        stats = score.stats if score.stats is not None and score.stats.drafted else None
        table.add_row(
            score.name,
            f"{score.tokens_per_second:.1f}",
            *("1" if base == score.name else interval(score.ratios[base].to_dict()) for base in bases),
            f"{stats.acceptance_rate:.0%}" if stats else "",
            f"{stats.tokens_per_round:.2f}" if stats else "",
            str(score.differing),
        )
    return table


def print_search(console: Console, found: SearchResult) -> None:
    """Print the confirmed plans of a search, its phases and its plan."""
    rows = found.rows()
    console.print(figures_table("search", list(rows[0]), ([*row.values()] for row in rows)))
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found.seconds.items())
    console.print(f"{found.trials_complete} complete trials, {found.trials_pruned} pruned ({phases})")
    console.print(f"plan: {found.plan}", soft_wrap=True, highlight=False)


def stages_table(stages: Iterable[Stage]) -> Table:
    """The outcome of every stage."""
    table = Table(title="stages")
    for column in ("", "status", "seconds", "why"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for stage in stages:
        table.add_row(stage.name, stage.status, f"{stage.seconds:.1f}", stage.reason)
    return table
