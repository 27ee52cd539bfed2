"""What a search found, on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from selfspec.utils.sizes import in_words

if TYPE_CHECKING:
    from rich.console import Console
    from selfspec_search import Confirmed, OnProgress, Progress, SearchResult

    from selfspec.cli.terminal import Report
    from selfspec.plan import Figures

PHASES = {
    "texts": "writing texts",
    "profile": "timing passes",
    "trials": "trying drafts",
    "confirm": "decoding with the best",
    "rows": "timing other rows",
}


NOTHING_FASTER = "do not speculate: nothing decodes faster than the plain model"


def in_phases(report: Report) -> OnProgress:
    """Shows a search's progress on one bar."""

    def on_progress(progress: Progress) -> None:
        best = f", best {progress.best:.2f}x predicted" if progress.best is not None else ""
        report(progress.done, progress.total, PHASES[progress.phase] + best)

    return on_progress


def report_search(out: Console, result: SearchResult) -> None:
    """What was tried, the plan, and what it is worth: by replay and by decoding, predicted and measured."""
    rows = result.rows()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "plan" else "right", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    out.print(table)
    words = Table.grid(padding=(0, 2, 0, 0))
    for name, text in facts(result):
        words.add_row(Text(name, style="bold"), text)
    out.print(words)


def facts(result: SearchResult) -> list[tuple[str, str]]:
    """The figures of the plan that is written, in words."""
    phases = ", ".join(f"{PHASES[name]} {seconds:.0f} s" for name, seconds in result.seconds.items())
    early = ", then interrupted" if result.interrupted else ""
    lines = [
        ("search", f"{result.trials_complete} trials whole, {result.trials_pruned} ended early{early} ({phases})"),
        ("plan", str(result.plan) if result.plan.speculates else NOTHING_FASTER),
    ]
    if slower := result.profile.slower_formats:
        lines.append(("left out", "; ".join(f"{code.partition('/')[0]}: {why}" for code, why in slower.items())))
    if (winner := result.winner) is None:
        return lines
    if len(rows := result.plan.rows) > 1:
        lines.append(
            ("rows", f"the policy adapts for {rows[0]} to {rows[-1]}, by what {', '.join(map(str, rows))} cost")
        )
    if winner.draft_bytes:
        lines.append(("draft's own layers", f"{in_words(winner.draft_bytes)} beside the model"))
    calibration, held_out = winner.prediction.figures, winner.predicted_on_held_out
    return [
        *lines,
        ("tokens per round", _rounds(winner)),
        (
            "calibration, held-out",
            f"{calibration.tokens_per_round:.3f} on {calibration.texts} prompts, {held_out.tokens_per_round:.3f} on "
            f"{held_out.texts} held-out ones: {_gap(held_out.tokens_per_round, calibration.tokens_per_round)}",
        ),
        ("tokens per second", _speed(winner.expected_here, winner.measured, result.plain)),
        ("drafted per round", _drafted(winner)),
    ]


def _rounds(winner: Confirmed) -> str:
    figures = (
        f"{winner.tokens_per_round_replayed:.3f} by replay, {winner.tokens_per_round_decoded:.3f} by decoding "
        f"{winner.measured.texts} held-out prompts"
    )
    if winner.samples:
        return f"{figures}, sampled"
    differing = f"{winner.differing_texts} texts differ from the plain model's"
    equal = f"equal in all {winner.rounds} rounds" if winner.rounds_equal else "NOT equal in every round"
    if not winner.rounds_equal and winner.prediction.recipe.quantised is not None:
        equal += ", as may be where copies round"
    return f"{figures}: {equal}; {differing}"


def _speed(predicted: Figures, measured: Figures, plain: Figures) -> str:
    return (
        f"{predicted.tokens_per_second:.1f} predicted, {measured.tokens_per_second:.1f} measured "
        f"({_gap(measured.tokens_per_second, predicted.tokens_per_second)}); plain {plain.tokens_per_second:.1f}, "
        f"so {measured.speedup:.2f}x measured, {predicted.speedup:.2f}x predicted"
    )


def _drafted(winner: Confirmed) -> str:
    expected, decoded = winner.drafted_replayed, winner.drafted_decoded
    return f"{expected:.2f} expected, {decoded:.2f} decoded" + (f" ({_gap(decoded, expected)})" if expected else "")


def _gap(value: float, base: float) -> str:
    return f"{value / base - 1:+.1%}"
