"""selfspec demo: the whole story on the embedded model, with no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from selfspec_search.settings import SearchSettings, Seed, Trials

from selfspec.cli import options
from selfspec.cli.formatting import in_phases, report_search
from selfspec.cli.terminal import (
    DRAFTED,
    check_replaceable,
    load_model,
    progress_bar,
    results_beside,
    tell_written,
    writable,
)
from selfspec.cli.token_view import Detokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from selfspec.speculator import SelfSpeculator

NEW_TOKENS = 128
PROMPTS, REPEATS = 6, 2
"""Prompts: the table at the end is measured on them."""
CALIBRATION = 32
"""Prompts on which the search confirms plans."""
PROMPT_LINES = 8
FRAMES_PER_SECOND = 20
SECONDS_OF_TRIALS = 60.0
"""Seconds: keeps the demo within about three minutes on two slow cores."""


def demo(
    trials: Trials = 100,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(metavar="PLAN", help="Keep the plan: a file, or a directory.")] = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """See it work: a small trained model searches its own plan, then races against itself.

    Takes a few minutes on two cores, needs no network, and writes nothing unless --out is given.
    """
    file = writable(out) if out is not None else None
    settings = _settings(trials, seed)
    loaded = load_model("demo", options.Placement(device="cpu", dtype="float32"), quiet=quiet)
    check_replaceable(file, loaded.model.config, force=force)

    import selfspec_search

    from selfspec.benchmark.contenders import Ours, line_up
    from selfspec.benchmark.measure import measure
    from selfspec.cli.bench import notes, print_scores
    from selfspec.demo import calibration_prompts, held_out_prompts
    from selfspec.huggingface.prompts import load_prompts

    console = results_beside(file)
    calibration, held_out = (
        load_prompts(prompts, loaded.tokenizer, context=loaded.context, new_tokens=NEW_TOKENS)
        for prompts in (calibration_prompts(), held_out_prompts())
    )
    calibration, confirming, unseen = calibration[:CALIBRATION], held_out[::2], held_out[1::2][:PROMPTS]
    layers = loaded.model.config.num_hidden_layers
    console.print(f"[bold]1. Search[/bold]  which of the model's {2 * layers} sub-layers can a draft do without?")
    with progress_bar("searching", quiet=quiet) as report:
        result = selfspec_search.search(loaded.model, calibration, confirming, settings, in_phases(report))
    report_search(console, result)
    console.print(result.plan.draft_spec.strip(layers), markup=False)
    if file is not None:
        result.plan.save(file)
        tell_written(file)

    console.print("\n[bold]2. Decode[/bold]  a prompt that the search did not see; in [green]green[/green], drafted")
    entrants = line_up(loaded.model, result.plan, unseen, NEW_TOKENS, peers=False)
    specs = [(entrant.name, entrant.spec) for entrant in entrants.contenders if isinstance(entrant, Ours)]
    prompt = loaded.tokenizer.decode(unseen[0], skip_special_tokens=True)
    console.print(Panel(Text(_end_of(prompt)), title="the prompt's end", title_align="left"))
    race(console, specs, loaded.tokenizer, unseen[0], NEW_TOKENS)

    console.print(f"\n[bold]3. Measure[/bold]  {len(unseen)} held-out prompts, contenders interleaved")
    with progress_bar("decoding", quiet=quiet) as report:
        measured = measure(
            entrants.contenders,
            unseen,
            new_tokens=NEW_TOKENS,
            repeats=REPEATS,
            on_progress=lambda done, total: report(done, total, "decoding"),
        )
    scores = measured.scores(entrants.ours.runtime, gamma=result.plan.longest_draft)
    print_scores(console, scores)
    for note in notes(loaded, entrants, measured, scores):
        console.print(note, markup=False, soft_wrap=True, style="dim")


def _settings(trials: int, seed: int) -> SearchSettings:
    return SearchSettings(
        draft="skip",  # the model is too small to gain from quantised copies
        trials=trials,
        timeout=SECONDS_OF_TRIALS,
        seed=seed,
        new_tokens=NEW_TOKENS,
        confirm=2,
        confirm_texts=6,
        repeats=2,
    )


def _end_of(prompt: str | list[str]) -> str:
    assert isinstance(prompt, str)
    return "\n".join(prompt.splitlines()[-PROMPT_LINES:])


@dataclass
class Runner:
    """A way to decode, its text so far, and a clock that runs only while it decodes."""

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
    """Decode `prompt` with each contender, and show all texts side by side, each as far as its own clock allows.

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
