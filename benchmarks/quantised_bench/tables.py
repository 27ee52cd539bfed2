"""Tables: what was measured, on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpu_bench.budget import Stage
from rich.console import Console
from rich.table import Table

from selfspec.utils.sizes import in_words


def target_table(result: dict[str, Any]) -> Table:
    """The target's passes by length."""
    table = _table(
        f"{result['shape']}, {result['dtype']}: a pass of the target reads {in_words(result['bytes_a_pass_reads'])}",
        ("tokens", "ms", "over one token's (least-greatest)", "padded to"),
    )
    passes = result["passes"]
    padded = (passes["pass_lengths"] or {"target": []})["target"]
    for t, milliseconds in passes["target_ms"].items():
        longer = padded[t - 1] if t <= len(padded) and padded[t - 1] > t else None
        table.add_row(str(t), f"{milliseconds:.1f}", _spread(passes["target_over_one_token"][t]), str(longer or ""))
    return table


def drafts_table(result: dict[str, Any]) -> Table:
    """Drafts' passes over one token."""
    table = _table(
        f"{result['shape']}: a pass of the draft, one token",
        ("draft", "padded to", "ms", "share of the target's (least-greatest)", "of the better plain pass", "memory"),
    )
    for name, draft in result["passes"]["drafts"].items():
        shares = (_spread(draft[key]) for key in ("share_of_target", "share_of_better_plain"))
        padded = str(draft["tokens"]) if draft["tokens"] > 1 else ""
        memory = in_words(draft["bytes"]) if draft["bytes"] else "none"
        table.add_row(name, padded, f"{draft['ms']:.1f}", *shares, memory)
    return table


def cell_table(cell: dict[str, Any]) -> Table:
    """One cell's contenders."""
    missed = ", which is out of reach here" if cell["out_of_reach"] else ""
    table = _table(
        f"{cell['draft']}, gamma {cell['gamma']}: agreement {cell['agreement']:.3f} of {cell['agreement_wanted']:g} "
        f"wanted{missed}",
        ("", "tokens/s", f"over {cell['better_plain']} (95 %)", "tokens per round", "differing from plain"),
    )
    for score in cell["contenders"]:
        ratio = score["ratios"].get(cell["better_plain"])
        per_round = score["tokens_per_round"]
        table.add_row(
            score["name"],
            f"{score['tokens_per_second']:.1f}",
            _spread(ratio) if ratio else "",
            f"{per_round:.2f}" if per_round else "",
            f"{score['differing_tokens']} ({score['near_ties']} near-ties, {score['errors']} errors)",
        )
    table.caption = (
        f"s = {cell['scale']:.3g}; a copy made anew would be {cell['requantised']:.3f} times as far from the target; "
        f"{cell['distinct_tokens']:.0%} of a text's tokens are different ones"
    )
    return table


def ceilings_table(result: dict[str, Any], agreements: Sequence[float]) -> Table:
    """What each draft allows at each agreement, beside what was measured."""
    table = _table(
        f"{result['shape']}: speedup over the better plain decoding, time real, agreement set",
        ("draft", *(f"{what} at {a:g}" for a in agreements for what in ("gamma", "ceiling", "measured"))),
    )
    found = {(cell["draft"], cell["agreement_wanted"]): cell for cell in result["cells"]}
    ceilings = {(one["draft"], one["agreement"]): one for one in result["ceilings"]}
    for draft in result["passes"]["drafts"]:
        cells = []
        for agreement in agreements:
            one, cell = ceilings[draft, agreement], found.get((draft, agreement))
            cells += [str(one["gamma"]), f"{one['speedup']:.2f}x", _spread(cell["speedup"]) if cell else ""]
        table.add_row(draft, *cells)
    if (found := result["agreement"]) is not None:
        table.caption = f"agreement of {found['highest']:.3f} at s = 0, of {found['as_drawn']:.3f} at s = 1, as drawn"
    return table


def rightness_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """How often drafts are right, by how they are made."""
    depths = range(1, 1 + len(rows[0]["agreement_by_depth"]))
    columns = ("of the weights read", "agreement", *(f"at depth {depth}" for depth in depths), "acceptance")
    table = _table(title, ("draft", *columns, "tokens per round"))
    for row in rows:
        by_depth = (f"{share:.3f}" for share in row["agreement_by_depth"])
        figures = (f"{row['agreement']:.3f}", *by_depth, f"{row['acceptance_rate']:.3f}")
        table.add_row(row["draft"], f"{row['read']:.1%}", *figures, f"{row['tokens_per_round']:.2f}")
    return table


def stages_table(stages: Iterable[Stage]) -> Table:
    """What was measured, and what was not and why."""
    table = _table("stages", ("", "status", "seconds", "why"))
    for stage in stages:
        table.add_row(stage.name, stage.status, f"{stage.seconds:.1f}", stage.reason)
    return table


def tell(console: Console) -> Callable[[Stage], None]:
    """Prints a stage as soon as it has ended."""

    def say(stage: Stage) -> None:
        reason = f": {stage.reason}" if stage.reason else ""
        console.print(f"{stage.name}: {stage.status}, {stage.seconds:.1f} s{reason}", highlight=False)

    return say


def _table(title: str, columns: Sequence[str]) -> Table:
    """The first column to the left, figures to the right."""
    table = Table(title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['value']:.2f} ({spread['low']:.2f}-{spread['high']:.2f})"
