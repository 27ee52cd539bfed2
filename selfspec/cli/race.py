"""A race: two ways to decode one prompt, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from selfspec.cli.detokenizer import Detokenizer
from selfspec.cli.terminal import DRAFTED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from selfspec.speculator import SelfSpeculator

FRAMES_PER_SECOND = 20


@dataclass
class Runner:
    """One way to decode, its text so far, and a clock that runs only while it does."""

    name: str
    spec: SelfSpeculator
    detokenizer: Detokenizer
    text: Text = field(default_factory=Text)
    seconds: float = 0.0
    tokens: int = 0
    done: bool = False

    def start(self, prompt: Tensor, new_tokens: int) -> None:
        row = prompt.to(self.spec.model.device)[None]
        self._rounds = iter(self.spec.stream_rounds(row, max_new_tokens=new_tokens, do_sample=False))

    def step(self) -> None:
        """One round."""
        start = perf_counter()
        committed = next(self._rounds, None)
        self.seconds += perf_counter() - start
        if committed is None:
            self.done = True
            self.text.append(self.detokenizer.end())
            return
        self.tokens += len(committed.tokens)
        for index, token in enumerate(committed.tokens):
            self.text.append(self.detokenizer.put(token), style=DRAFTED if index < committed.accepted else "")

    def panel(self, lines: int | None = None) -> Panel:
        shown = self.text if lines is None else Text("\n").join(self.text.split("\n", allow_blank=True)[-lines:])
        title = f"{self.name}: {self.tokens} tokens in {self.seconds:.2f} s"
        return Panel(shown, title=title, title_align="left", border_style="bold" if self.done else "dim")


def race(
    out: Console,
    contenders: Sequence[tuple[str, SelfSpeculator]],
    tokenizer: PreTrainedTokenizerBase,
    prompt: Tensor,
    new_tokens: int,
) -> list[Runner]:
    """Decode `prompt` with each contender and show them side by side, each as far as its own clock says.

    They take turns, never run at once, and whoever has used the least time goes next.
    """
    runners = [Runner(name, spec, Detokenizer(tokenizer, prompt.tolist())) for name, spec in contenders]
    for runner in runners:
        runner.spec.generate(prompt.to(runner.spec.model.device)[None], max_new_tokens=new_tokens, do_sample=False)
        runner.start(prompt, new_tokens)
    with Live(console=out, auto_refresh=False, transient=True) as live:
        _run(runners, lambda: live.update(_side_by_side(runners, max(4, out.height - 4)), refresh=out.is_terminal))
    out.print(_side_by_side(runners))
    return runners


def _run(runners: Sequence[Runner], draw: Callable[[], None]) -> None:
    drawn = 0.0
    while running := [runner for runner in runners if not runner.done]:
        min(running, key=lambda runner: runner.seconds).step()
        if (now := perf_counter()) - drawn > 1 / FRAMES_PER_SECOND:
            draw()
            drawn = now


def _side_by_side(runners: Sequence[Runner], lines: int | None = None) -> Table:
    grid = Table.grid(expand=True)
    for _ in runners:
        grid.add_column(ratio=1)
    grid.add_row(*(runner.panel(lines) for runner in runners))
    return grid
