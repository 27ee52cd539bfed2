"""Show: where every token of a text comes from, in colour, and how often drafts were right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich.text import Text

from selfspec.cli.terminal import ORIGINS, asides

if TYPE_CHECKING:
    from rich.console import Console

    from selfspec.decoding.request import Committed
    from selfspec.decoding.stats import Stats
    from selfspec.plan import Plan

RECOVERED, BONUS, UNDRAFTED = "recovered", "bonus", "undrafted"
BLOCKS = "▏▎▍▌▋▊▉█"
"""One eighth of a column to eight."""
LONGEST_BAR = 40
MOST_BARS = 12
"""Positions beyond share the last bar."""


def origin_of(committed: Committed, index: int) -> str:
    """Who wrote a round's token: whoever drafted it; or the model, and then after what kind of draft."""
    if index < committed.accepted:
        return committed.origin or "layers"
    if not committed.drafted:
        return UNDRAFTED
    return RECOVERED if committed.accepted < committed.drafted else BONUS


class Show:
    """Gives every token the colour of its origin, and counts them.

    Args:
        drafts: who drafts by the plan's gamma.
    """

    def __init__(self, plan: Plan, drafts: Literal["layers", "draft model"] = "layers") -> None:
        self.plan, self.drafts = plan, drafts
        self.written: Counter[str] = Counter()
        """Tokens by origin."""
        self.accepted_at: list[Counter[str]] = []
        """By draft position: accepted tokens by origin."""

    def style(self, committed: Committed, index: int) -> str:
        """The style of one token, which is thereby counted."""
        origin = origin_of(committed, index)
        self.written[origin] += 1
        if index < committed.accepted:
            self.accepted_at.extend(Counter() for _ in range(index + 1 - len(self.accepted_at)))
            self.accepted_at[index][origin] += 1
        return ORIGINS[origin]

    def legend(self) -> Text:
        """What the colours mean, in one line; empty for a plan under which there is but one."""
        if not self.plan.speculates:
            return Text()
        said = {"lookup": "by lookup"} if self._may_look_up else {}
        said |= {self.drafts: f"by {self.drafts}"} if self.plan.gamma else {}
        said |= {RECOVERED: "recovered (draft wrong)", BONUS: "bonus (draft right)", UNDRAFTED: UNDRAFTED}
        return Text("  ").join(Text(words, style=ORIGINS[origin]) for origin, words in said.items())

    @property
    def _may_look_up(self) -> bool:
        """Whether tokens may come from lookup alone."""
        if self.plan.prompt_lookup is not None:
            return True
        # A policy looks up unasked, but none serves a draft model.
        return self.drafts == "layers" and self.plan.outlook is not None and bool(self.plan.outlook.matches)

    def summary(self, stats: Stats, console: Console) -> list[Text]:
        """How often drafts were right at each of their positions, and how many tokens came from where."""
        if not stats.drafted:
            why = "" if self.plan.speculates else ": this plan does not speculate"
            return [Text(f"nothing was drafted{why}")]
        heading = Text("acceptance by position in the draft, after an accepted prefix")
        return [heading, *_chart(self._bars(stats), console), self._by_origin(stats)]

    def _bars(self, stats: Stats) -> list[_Bar]:
        """One for each position, counted from 1."""
        counted = self.accepted_at + [Counter()] * (len(stats.reached_at) - len(self.accepted_at))
        columns = zip(stats.accepted_at, stats.reached_at, counted, strict=True)
        bars = [_Bar(str(number), *column) for number, column in enumerate(columns, start=1)]
        if len(bars) > MOST_BARS:
            rest = bars[MOST_BARS - 1 :]
            origins = sum((bar.origins for bar in rest), Counter[str]())
            together = sum(bar.accepted for bar in rest), sum(bar.reached for bar in rest), origins
            bars[MOST_BARS - 1 :] = [_Bar(f"{rest[0].name}+", *together)]
        return bars

    def _by_origin(self, stats: Stats) -> Text:
        parts = []
        for origin, style in ORIGINS.items():
            if origin in stats.by_origin:
                drafted, accepted = stats.by_origin[origin]
                words = f"{self.written[origin]} of {drafted} by {origin} ({accepted / drafted:.0%})"
            else:
                words = f"{self.written[origin]} {origin}"
            if self.written[origin] or origin in stats.by_origin:
                parts.append(Text(words, style=style))
        return Text(f"{self.written.total()} tokens: ") + Text(", ").join(parts)


def tell(lines: Sequence[Text]) -> None:
    """Print to stderr; broken between words on a terminal alone."""
    aside = asides()
    for line in lines:
        if line:
            aside.print(line, soft_wrap=not aside.is_terminal)


@dataclass
class _Bar:
    """One position of the draft, or several: tokens accepted there, in all and by origin, of those that it reached."""

    name: str
    accepted: int
    reached: int
    origins: Counter[str]

    @property
    def count(self) -> str:
        """What the bar says, in figures."""
        share = f"{self.accepted / self.reached:.0%}" if self.reached else "-"
        return f"{share:>4}  {self.accepted} of {self.reached}"

    def drawn(self, width: int, *, blocks: bool) -> Text:
        """At most `width` columns long, in the colours of its origins."""
        bar = Text(bar_of(self.accepted / self.reached if self.reached else 0.0, width, blocks=blocks))
        end, total = 0, self.origins.total()
        for origin, style in ORIGINS.items():
            start, end = end, end + self.origins[origin]
            if total:
                bar.stylize(style, round(start / total * len(bar)), round(end / total * len(bar)))
        bar.pad_right(width - len(bar))
        return bar


def _chart(bars: Sequence[_Bar], console: Console) -> list[Text]:
    """A line for each bar, of the console's width at most."""
    names = max(len(bar.name) for bar in bars)
    counts = [bar.count for bar in bars]
    room = console.width - names - max(map(len, counts)) - len("   ") - 1
    width, blocks = max(1, min(LONGEST_BAR, room)), holds_blocks(console)
    return [
        Text(f" {bar.name:>{names}} ") + bar.drawn(width, blocks=blocks) + Text(f" {count}")
        for bar, count in zip(bars, counts, strict=True)
    ]


def bar_of(share: float, width: int, *, blocks: bool) -> str:
    """A bar of at most `width` columns: to an eighth of one where `blocks` can be shown, else in plain ASCII."""
    if not blocks:
        return "#" * round(share * width)
    whole, eighths = divmod(round(share * width * len(BLOCKS)), len(BLOCKS))
    return BLOCKS[-1] * whole + (BLOCKS[eighths - 1] if eighths else "")


def holds_blocks(console: Console) -> bool:
    """Whether the stream's encoding has the characters that bars are drawn with."""
    try:
        BLOCKS.encode(getattr(console.file, "encoding", None) or "utf8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
