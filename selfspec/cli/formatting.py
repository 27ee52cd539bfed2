"""Tables and bars: the result of a search, and acceptance by draft position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from selfspec.cli.terminal import ORIGINS
from selfspec.utils.sizes import in_words

if TYPE_CHECKING:
    from rich.console import Console
    from selfspec_search import Confirmed, OnProgress, Progress, SearchResult

    from selfspec.cli.terminal import Report
    from selfspec.plan.provenance import Figures

PHASES = {
    "texts": "writing texts",
    "profile": "timing passes",
    "sensitivity": "trying sub-layers",
    "trials": "trying drafts",
    "confirm": "decoding with the best",
    "rows": "timing more rows",
}
NOTHING_FASTER = "do not speculate: nothing decodes faster than the plain model"
BLOCKS = "▏▎▍▌▋▊▉█"
"""Characters for one eighth to eight eighths of a column."""
LONGEST_BAR = 40


def in_phases(report: Report) -> OnProgress:
    """Shows a search's progress on one bar."""

    def on_progress(progress: Progress) -> None:
        best = f", best {progress.best:.2f}x predicted" if progress.best is not None else ""
        left = f", {progress.left:.0f} s of the budget left" if progress.left is not None else ""
        report(progress.done, progress.total, PHASES[progress.phase] + best + left)

    return on_progress


def report_search(out: Console, result: SearchResult) -> None:
    """Print the trials, the plan, and its figures: predicted by replay and measured by decoding."""
    rows = result.rows()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "plan" else "right", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    out.print(table)
    print_facts(out, facts(result))


def print_facts(out: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Print a line for each (name, text), all texts in one column."""
    words = Table.grid(padding=(0, 2, 0, 0))
    for name, text in facts:
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
    if result.cuts:
        lines.append(("cut short", "; ".join(result.cuts)))
    if result.why:
        lines.append(("why", result.why))
    if slower := result.profile.slower_formats:
        lines.append(("left out", "; ".join(f"{code.partition('/')[0]}: {why}" for code, why in slower.items())))
    if (winner := result.winner) is None:
        return lines
    if len(rows := result.plan.rows) > 1:
        lines.append(
            ("rows", f"the policy adapts for {rows[0]} to {rows[-1]}, by what {', '.join(map(str, rows))} cost")
        )
    if winner.draft_bytes:
        lines.append(("draft weights", f"{in_words(winner.draft_bytes)} in addition to the model"))
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
    if not winner.rounds_equal and winner.prediction.draft_spec.quantised is not None:
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


@dataclass
class Bar:
    """A draft position, or several: how many drafted tokens reached it, and how many were accepted, by origin."""

    name: str
    accepted: int
    reached: int
    origins: Counter[str]

    @property
    def count(self) -> str:
        """The figures of the bar."""
        share = f"{self.accepted / self.reached:.0%}" if self.reached else "-"
        return f"{share:>4}  {self.accepted} of {self.reached}"

    def drawn(self, width: int, *, blocks: bool) -> Text:
        """The bar, at most `width` columns long, in the colours of the origins."""
        bar = Text(bar_of(self.accepted / self.reached if self.reached else 0.0, width, blocks=blocks))
        end, total = 0, self.origins.total()
        for origin, style in ORIGINS.items():
            start, end = end, end + self.origins[origin]
            if total:
                bar.stylize(style, round(start / total * len(bar)), round(end / total * len(bar)))
        bar.pad_right(width - len(bar))
        return bar


def chart(bars: Sequence[Bar], console: Console) -> list[Text]:
    """A line for each bar, at most as wide as the console."""
    names = max(len(bar.name) for bar in bars)
    counts = [bar.count for bar in bars]
    room = console.width - names - max(map(len, counts)) - len("   ") - 1
    width, blocks = max(1, min(LONGEST_BAR, room)), holds_blocks(console)
    return [
        Text(f" {bar.name:>{names}} ") + bar.drawn(width, blocks=blocks) + Text(f" {count}")
        for bar, count in zip(bars, counts, strict=True)
    ]


def bar_of(share: float, width: int, *, blocks: bool) -> str:
    """A bar of at most `width` columns: exact to an eighth of a column with `blocks`, else in ASCII."""
    if not blocks:
        return "#" * round(share * width)
    whole, eighths = divmod(round(share * width * len(BLOCKS)), len(BLOCKS))
    return BLOCKS[-1] * whole + (BLOCKS[eighths - 1] if eighths else "")


def holds_blocks(console: Console) -> bool:
    """Whether the stream's encoding has the characters of the bars."""
    try:
        BLOCKS.encode(getattr(console.file, "encoding", None) or "utf8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
