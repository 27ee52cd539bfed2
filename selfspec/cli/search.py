"""selfspec search: find a plan for a model and write it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from selfspec.cli import options
from selfspec.cli.terminal import Report, asides, at_least, load_model, progress_bar, results
from selfspec.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from selfspec_search import OnProgress, Progress, SearchResult

    from selfspec.plan import Figures
    from selfspec.prompts import Prompt

HELD_OUT_SHARE = 4
"""One prompt in so many is held out, where no held-out prompts are given."""
PHASES = {
    "texts": "writing texts",
    "profile": "timing passes",
    "trials": "trying skip sets",
    "confirm": "decoding with the best",
}


def search(
    model: options.Model,
    prompts: options.PromptFile,
    out: Annotated[Path, typer.Option(metavar="PLAN", help="Where to write the plan: a file, or a directory.")],
    held_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts to confirm plans on; by default a quarter of --prompts."),
    ] = None,
    trials: options.Trials = 200,
    timeout: Annotated[float | None, typer.Option(help="Start no further trial after so many seconds.")] = None,
    seed: options.Seed = 0,
    gamma_max: Annotated[int, typer.Option(help="The longest draft to consider.")] = 8,
    new_tokens: options.NewTokens = 128,
    compile: options.Compile = False,
    backend: options.Backend = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    storage: Annotated[
        str | None, typer.Option(help="Keep trials, and go on from them: an SQLite file, or a URL that Optuna takes.")
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Find what to skip, and write a plan.

    The model writes text once; what any draft would have got accepted is computed from it, timed on this device, and
    the best few plans are confirmed by decoding held-out prompts. Ctrl-C ends the trials and keeps the best so far.
    """
    from selfspec.prompts import encode_prompts, read_prompts

    out = writable(out)
    at_least("--new-tokens", new_tokens, 2)
    at_least("--trials", trials, 1)
    read = read_prompts(prompts)
    held = read_prompts(held_out) if held_out is not None else []
    if not held:
        read, held = split(read, seed)
    loaded = load_model(model, device=device, dtype=dtype, quiet=quiet)

    import selfspec_search

    from selfspec.compiling import compile_obstacle

    settings = selfspec_search.SearchSettings(
        trials=trials,
        timeout=timeout,
        seed=seed,
        gamma_max=gamma_max,
        new_tokens=new_tokens,
        compile=compile,
        backend=backend,
        storage=storage,
    )
    calibration, confirmation = (
        encode_prompts(some, loaded.tokenizer, context=loaded.context, new_tokens=new_tokens) for some in (read, held)
    )
    if compile and (obstacle := compile_obstacle(loaded.model.device)):
        asides().print(f"passes run eagerly: {obstacle}", style="yellow", markup=False)
    with progress_bar("searching", quiet=quiet) as report, _storage_errors(storage):
        result = selfspec_search.search(loaded.model, calibration, confirmation, settings, in_phases(report))
    result.plan.save(out)
    report_search(results(), result)
    results().print(f"wrote {out}", markup=False, soft_wrap=True)


@contextmanager
def _storage_errors(storage: str | None) -> Iterator[None]:
    """One line for a storage that cannot be opened."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (OptunaError, SQLAlchemyError, ModuleNotFoundError) as error:
        if storage is None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"storage '{storage}' cannot be used: {reason}; give an SQLite file or a URL") from None


def writable(out: Path) -> Path:
    """The file to write, found out before minutes are spent; a directory gets a `selfspec_plan.json`."""
    from selfspec.plan import PLAN_FILE

    file = out / PLAN_FILE if os.path.isdir(out) else out
    if not os.path.isdir(file.parent):
        raise InputError(f"cannot write {out}: there is no directory {file.parent}; make it first")
    if not os.access(file.parent, os.W_OK) or os.path.isdir(file):
        raise InputError(f"cannot write {out}: choose a directory that is writable")
    return file


def split(prompts: list[Prompt], seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Calibration prompts, and a quarter held out, drawn by `seed`: files may be in some order."""
    if len(prompts) < 2:
        raise InputError("one prompt cannot be split into calibration and held-out ones; give more, or --held-out")
    count = max(1, len(prompts) // HELD_OUT_SHARE)
    held = set(Random(seed).sample(range(len(prompts)), count))
    return (
        [prompt for index, prompt in enumerate(prompts) if index not in held],
        [prompt for index, prompt in enumerate(prompts) if index in held],
    )


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
        ("plan", _plan_in_words(result)),
    ]
    if (winner := result.winner) is None:
        return lines
    equal = f"equal in all {winner.rounds} rounds" if winner.rounds_equal else "NOT equal in every round"
    calibration, held_out = winner.prediction.figures, winner.predicted_on_held_out
    return [
        *lines,
        (
            "tokens per round",
            f"{winner.tokens_per_round_replayed:.3f} by replay, {winner.tokens_per_round_decoded:.3f} by decoding "
            f"{winner.measured.texts} held-out prompts: {equal}; {winner.differing_texts} texts differ from the plain "
            "model's",
        ),
        (
            "calibration, held-out",
            f"{calibration.tokens_per_round:.3f} on {calibration.texts} prompts, {held_out.tokens_per_round:.3f} on "
            f"{held_out.texts} held-out ones: {_gap(held_out.tokens_per_round, calibration.tokens_per_round)}",
        ),
        ("tokens per second", _speed(held_out, winner.measured, result.plain)),
    ]


def _plan_in_words(result: SearchResult) -> str:
    plan = result.plan
    if not plan.speculates:
        return "do not speculate: nothing decodes faster than the plain model"
    threshold = f", exit below {plan.exit_threshold:.3f}" if plan.exit_threshold is not None else ""
    return f"skip {plan.skip_set}; gamma {plan.gamma}{threshold}"


def _speed(predicted: Figures, measured: Figures, plain: Figures) -> str:
    return (
        f"{predicted.tokens_per_second:.1f} predicted, {measured.tokens_per_second:.1f} measured "
        f"({_gap(measured.tokens_per_second, predicted.tokens_per_second)}); plain {plain.tokens_per_second:.1f}, "
        f"so {measured.speedup:.2f}x measured, {predicted.speedup:.2f}x predicted"
    )


def _gap(value: float, base: float) -> str:
    return f"{value / base - 1:+.1%}"
