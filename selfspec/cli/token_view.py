"""Shows a text while it is decoded: the origin of each token in colour, then acceptance by draft position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.text import Text

from selfspec.cli.formatting import Bar, chart
from selfspec.cli.terminal import DRAFTED, ORIGINS, asides, results

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from selfspec.decoding.acceptance import Committed
    from selfspec.decoding.stats import Stats
    from selfspec.plan.plan import Plan
    from selfspec.speculator import SelfSpeculator

RECOVERED, BONUS, UNDRAFTED = "recovered", "bonus", "undrafted"
MOST_BARS = 12
"""Bars: later draft positions share the last bar."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6
"""Tokens of the prompt that are detokenized with the first new token, which decides whether a space precedes it."""


class Detokenizer:
    """Turns tokens into text, token by token. The returned pieces add up to the whole text.

    A token may hold part of a character's bytes, or a space only where something stands before it. So new text is
    what a short stretch of tokens decodes to, less what it did without the new ones, once no character is in pieces.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        self._shown = len(self._tokens)

    def put(self, token: int) -> str:
        """The text that `token` completes: often a word, and nothing inside a character."""
        self._tokens.append(token)
        new = self._new_text()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._tokens = self._tokens[self._shown :]
        self._shown = len(self._tokens)
        return new

    def end(self) -> str:
        """The text held back: bytes that did not become a character."""
        return self._new_text()

    def _new_text(self) -> str:
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._shown])) :]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def origin_of(committed: Committed, index: int) -> str:
    """The origin of a round's token: its drafter, or the model (recovered, bonus, undrafted)."""
    if index < committed.accepted:
        return committed.origin or "layers"
    if not committed.drafted:
        return UNDRAFTED
    return RECOVERED if committed.accepted < committed.drafted else BONUS


class Show:
    """Gives each token the colour of its origin, and counts tokens by origin.

    Args:
        drafts: the drafter that the plan's gamma is of.
    """

    def __init__(self, plan: Plan, drafts: Literal["layers", "draft model"] = "layers") -> None:
        self.plan, self.drafts = plan, drafts
        self.written: Counter[str] = Counter()
        """Tokens by origin."""
        self.accepted_at: list[Counter[str]] = []
        """By draft position: accepted tokens by origin."""

    def style(self, committed: Committed, index: int) -> str:
        """The style of a token. Counts the token."""
        origin = origin_of(committed, index)
        self.written[origin] += 1
        if index < committed.accepted:
            self.accepted_at.extend(Counter() for _ in range(index + 1 - len(self.accepted_at)))
            self.accepted_at[index][origin] += 1
        return ORIGINS[origin]

    def legend(self) -> Text:
        """The meaning of the colours in one line; empty if the plan leads to one colour only."""
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
        return self.drafts == "layers" and any(costs.matches for costs in self.plan.round_costs)

    def summary(self, stats: Stats, console: Console) -> list[Text]:
        """Acceptance by draft position, and tokens by origin."""
        if not stats.drafted:
            why = "" if self.plan.speculates else ": this plan does not speculate"
            return [Text(f"nothing was drafted{why}")]
        heading = Text("acceptance by position in the draft, after an accepted prefix")
        return [heading, *chart(self._bars(stats), console), self._by_origin(stats)]

    def _bars(self, stats: Stats) -> list[Bar]:
        """The bars, one for each draft position, counted from 1."""
        counted = self.accepted_at + [Counter()] * (len(stats.reached_at) - len(self.accepted_at))
        columns = zip(stats.accepted_at, stats.reached_at, counted, strict=True)
        bars = [Bar(str(number), *column) for number, column in enumerate(columns, start=1)]
        if len(bars) > MOST_BARS:
            rest = bars[MOST_BARS - 1 :]
            origins = sum((bar.origins for bar in rest), Counter[str]())
            together = sum(bar.accepted for bar in rest), sum(bar.reached for bar in rest), origins
            bars[MOST_BARS - 1 :] = [Bar(f"{rest[0].name}+", *together)]
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
    """Print to stderr. Lines wrap on a terminal only."""
    aside = asides()
    for line in lines:
        if line:
            aside.print(line, soft_wrap=not aside.is_terminal)


class Writer:
    """Writes continuations round by round, and sums their figures. Ctrl-C ends a continuation early."""

    def __init__(self, spec: SelfSpeculator, tokenizer: PreTrainedTokenizerBase, show: Show | None) -> None:
        from selfspec.decoding.stats import Stats

        self._spec, self._tokenizer = spec, tokenizer
        self._style = show.style if show is not None else _drafted
        self._out = results()
        self.stats = Stats()
        self.interrupted = False
        if show is not None and self._out.color_system is not None and not self._out.no_color:
            tell([show.legend()])

    def write(self, prompt: Tensor, **options: Any) -> None:
        """Write a continuation, then its figures."""
        text, before = Detokenizer(self._tokenizer, prompt.tolist()), self._spec.stats
        row = prompt.to(self._spec.model.device)[None]
        rounds = self._spec.stream_rounds(row, tokenizer=self._tokenizer, **options)
        try:
            for committed in rounds:
                for index, token in enumerate(committed.tokens):
                    style = self._style(committed, index)
                    if piece := text.put(token):
                        self._put(piece, style)
        except KeyboardInterrupt:
            self.interrupted = True
        self._put(text.end() + "\n")
        rounds.close()
        if self._spec.stats is not before:  # else it was interrupted before it began
            self.stats.add(self._spec.stats)
            asides().out(_figures(self._spec), style="dim", highlight=False)

    def _put(self, piece: str, style: str = "") -> None:
        self._out.out(printable(piece), style=style or None, end="", highlight=False)
        self._out.file.flush()


def _drafted(committed: Committed, index: int) -> str:
    """The style of a token; only drafted tokens have a style."""
    return DRAFTED if index < committed.accepted else ""


def printable(text: str) -> str:
    """The text without control characters, which could command the terminal."""
    return "".join(char for char in text if char in "\n\t" or not (char < " " or "\x7f" <= char < "\xa0"))


def _figures(spec: SelfSpeculator) -> str:
    stats = spec.stats
    how = [stats.backend, *["compiled"] * stats.compiled, *["captured"] * stats.captured]
    chosen = ", ".join(f"{choice} ({passes}x)" for choice, passes in sorted(stats.choices.items()))
    adapted = [f"drafted by {chosen}"] if stats.policy == "adaptive" else []
    return "; ".join([str(stats), *adapted, ", ".join(how), *stats.slower_paths])
