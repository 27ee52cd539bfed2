"""selfspec demo: the whole story on the embedded model, with no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.panel import Panel
from rich.text import Text

from selfspec.cli import options
from selfspec.cli.terminal import load_model, progress_bar, results

if TYPE_CHECKING:
    from selfspec_search import SearchSettings

NEW_TOKENS = 128
PROMPTS, REPEATS = 6, 2
"""What the closing table is measured on."""
CALIBRATION = 32
"""How many prompts the search compares plans on."""
PROMPT_LINES = 8
SECONDS_OF_TRIALS = 60.0
"""Keeps the whole within some three minutes on two slow cores; on a quick machine all trials fit."""


def demo(
    trials: options.Trials = 100,
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option(metavar="PLAN", help="Keep the plan: a file, or a directory.")] = None,
    quiet: options.Quiet = False,
) -> None:
    """See it work: a small trained model searches its own plan, then races against itself.

    Takes a few minutes on two cores, needs no network, and writes nothing unless --out is given.
    """
    from selfspec.cli.found import in_phases, report_search
    from selfspec.cli.search import writable

    file = writable(out) if out is not None else None
    settings = _settings(trials, seed)
    loaded = load_model("demo", device="cpu", dtype="float32", quiet=quiet)

    import selfspec_search

    from selfspec.benchmark.contenders import GENERATE, PLAIN, Ours, line_up
    from selfspec.benchmark.measure import measure
    from selfspec.cli.bench import notes, print_scores
    from selfspec.cli.race import race
    from selfspec.demo import calibration_prompts, held_out_prompts
    from selfspec.huggingface.prompts import load_prompts

    console = results()
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
    console.print(result.plan.recipe.strip(layers), markup=False)
    if file is not None:
        result.plan.save(file)
        console.print(f"wrote {file}", markup=False, soft_wrap=True)

    console.print("\n[bold]2. Decode[/bold]  a prompt that the search did not see; in [green]green[/green], drafted")
    entrants = line_up(loaded.model, result.plan, unseen, NEW_TOKENS, peers=False)
    specs = [(entrant.name, entrant.spec) for entrant in entrants.contenders if isinstance(entrant, Ours)]
    prompt = loaded.tokenizer.decode(unseen[0], skip_special_tokens=True)
    console.print(Panel(Text(_end_of(prompt)), title="the prompt's end", title_align="left"))
    race(console, specs, loaded.tokenizer, unseen[0], NEW_TOKENS)

    console.print(f"\n[bold]3. Measure[/bold]  {len(unseen)} such prompts, everything interleaved")
    with progress_bar("decoding", quiet=quiet) as report:
        measured = measure(
            entrants.contenders,
            unseen,
            new_tokens=NEW_TOKENS,
            repeats=REPEATS,
            on_progress=lambda done, total: report(done, total, "decoding"),
        )
    scores = measured.scores(entrants.ours.runtime, against=(PLAIN, GENERATE), gamma=result.plan.longest_draft)
    print_scores(console, scores)
    for note in notes(loaded, entrants, measured, scores):
        console.print(note, markup=False, soft_wrap=True, style="dim")


def _settings(trials: int, seed: int) -> SearchSettings:
    from selfspec_search import SearchSettings

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
