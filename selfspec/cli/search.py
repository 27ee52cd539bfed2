"""selfspec search: find a plan for a model and write it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from selfspec_search.replay.sampling_settings import Sampling
from selfspec_search.settings import SearchSettings

from selfspec.cli import options
from selfspec.cli.formatting import in_phases, report_search
from selfspec.cli.options import Placement, SamplingOptions, Without, flag
from selfspec.cli.terminal import (
    asides,
    check_replaceable,
    load_model,
    progress_bar,
    results_beside,
    tell_written,
    writable,
)
from selfspec.errors import InputError
from selfspec.utils.files import is_stream

if TYPE_CHECKING:
    from selfspec_search import SearchResult
    from selfspec_search.storage.study_store import StoredStudy

    from selfspec.huggingface.loading import Loaded
    from selfspec.huggingface.prompts import Prompt

LEAST_TOKENS = 2
"""Tokens: the shortest prompt that a search can use."""
_OF_A_STUDY = (
    *("prompts", "held_out", "start_from", "draft", "temperature", "top_p", "top_k"),
    *("trials", "budget", "timeout", "seed", "sampler", "gamma_max", "lookup_max", "new_tokens"),
)
"""Options that `--repick` refuses."""
_SET_OTHERWISE = Without({"start_from", "sampling", "storage", "study_name", "confirm", "confirm_texts", "repeats"})
"""Settings that other options set, or that only the library offers."""
DEFAULT_BUDGET = 900.0
"""Seconds: the budget of a search without `--budget`."""
HELD_OUT_SHARE = 4
"""Prompts: every n-th prompt is held out, if no held-out prompts are given."""
INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of ctrl-C and SIGTERM. A plan of the best draft so far is still written if either ended the trials."""


@dataclass(frozen=True, kw_only=True)
class PromptFiles:
    """Prompts to search on, and prompts to confirm plans on."""

    prompts: options.PromptFileOrNone = None
    held_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts to confirm plans on; by default a quarter of --prompts."),
    ] = None

    def read(self, model: str, seed: int) -> tuple[list[Prompt], list[Prompt]]:
        """Calibration and held-out prompts; without files, those that come with the embedded model."""
        from selfspec.huggingface.loading import DEMO
        from selfspec.huggingface.prompts import read_prompts

        if self.prompts is None and self.held_out is None and model == DEMO:
            from selfspec.demo import calibration_prompts, held_out_prompts

            return read_prompts(calibration_prompts()), read_prompts(held_out_prompts())
        if self.prompts is None:
            raise typer.BadParameter(
                "give --prompts FILE: 32 or more prompts of the model's later use, text lines or .jsonl "
                "(--repick needs none)"
            )
        prompts = read_prompts(self.prompts)
        return (prompts, read_prompts(self.held_out)) if self.held_out is not None else split(prompts, seed)


def search(
    model: options.Model,
    out: Annotated[Path, typer.Option(metavar="PLAN", help="Where to write the plan: a file, or a directory.")],
    files: PromptFiles,
    settings: Annotated[SearchSettings, _SET_OTHERWISE],
    start_from: Annotated[
        list[Path] | None, typer.Option(metavar="PLAN", help="Try this plan's draft first; may be repeated.")
    ] = None,
    *,
    sampling: SamplingOptions,
    place: Placement,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Where trials are kept, and shared by workers: an SQLite file, a .journal file on a shared disk, or a "
            "URL (postgresql://...); by default PLAN with the ending .db."
        ),
    ] = None,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Join or resume this study; by default named by its settings.")
    ] = None,
    force: options.Force = False,
    pick_again: Annotated[
        bool, typer.Option("--repick", help="No new trials: price those of the study for this device and --rows.")
    ] = False,
    quiet: options.Quiet = False,
    context: typer.Context,
) -> None:
    """Find what to skip and what to quantise, and write a plan.

    The model writes text once; what any draft would have got accepted is computed from it, timed on this device, and
    the best few plans are confirmed by decoding held-out prompts. Trials are kept: the same command goes on where an
    earlier one ended, and on other machines joins in. Ctrl-C ends the trials, confirms the best so far, writes the plan
    and exits with 130. SIGTERM does the same, and exits with 143.
    """
    from selfspec.plan.plan import PLAN_FILE, Plan

    out = writable(out)
    storage = storage or str(Path(PLAN_FILE if is_stream(out) else out).with_suffix(".db"))
    _refuse_one_file_for_both(out, storage)
    known = [Plan.from_pretrained(path) for path in start_from or ()]
    settings = replace(
        settings,
        budget=settings.budget or DEFAULT_BUDGET,
        start_from=[plan.draft_spec for plan in known],
        sampling=Sampling(**sampling.arguments),
        storage=storage,
        study_name=study,
    )
    if pick_again:
        _refuse_with_repick(context)
    study_to_price = _study_of(settings) if pick_again else None
    prompts = files.read(model, settings.seed) if study_to_price is None else ([], [])
    with _explaining_interrupts(storage) as exit_code:
        loaded = load_model(model, place, quiet=quiet)
        for plan in known:
            plan.check_fits(loaded.model.config)
        check_replaceable(out, loaded.model.config, force=force)
        if study_to_price is None:
            result = _search(loaded, *prompts, settings, quiet=quiet)
        else:
            result = _repick(loaded, study_to_price, settings, quiet=quiet)
    result.plan.save(out)
    report_search(results_beside(out), result)
    tell_written(out)
    if result.interrupted:
        raise typer.Exit(exit_code())


def _refuse_with_repick(context: typer.Context) -> None:
    """Raise a usage error for options that `--repick` takes from the study or does not need."""
    for name in _OF_A_STUDY:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(
                f"--repick tries nothing, and takes texts and sampling from the study; leave out {flag(name)}"
            )


def _refuse_one_file_for_both(out: Path, storage: str) -> None:
    """Raise `InputError` if plan and storage are the same file."""
    file = storage.removeprefix("journal://").removeprefix("sqlite:///")
    if "://" not in file and os.path.realpath(os.path.expanduser(file)) == os.path.realpath(out):
        raise InputError(f"--out is {out}, where the trials would be kept too; give another file to one of them")


@contextmanager
def _explaining_interrupts(storage: str) -> Iterator[Callable[[], int]]:
    """Print one line for a ctrl-C outside the trials, after which no plan is written. SIGTERM acts as ctrl-C does.

    Yields a function that returns the exit code of an interrupted search.
    """
    codes = [INTERRUPTED]

    def terminate(number: int, frame: FrameType | None) -> None:
        codes.append(TERMINATED)
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    usual = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        yield lambda: codes[-1]
    except KeyboardInterrupt:
        from selfspec_search.storage.open import without_password

        asides().print(
            f"interrupted, and no plan was written; trials that ended are kept in {without_password(storage)}: "
            "give the same command again to go on",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(codes[-1]) from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, usual)


def _search(
    loaded: Loaded, calibration: list[Prompt], confirmation: list[Prompt], settings: SearchSettings, *, quiet: bool
) -> SearchResult:
    import selfspec_search

    from selfspec.huggingface.prompts import encode_prompts
    from selfspec.runtime.compiling import uncompiled_reason, will_compile

    first, second = (
        encode_prompts(
            some,
            loaded.tokenizer,
            at_least=LEAST_TOKENS,
            context=loaded.context,
            new_tokens=settings.new_tokens,
            vocabulary=loaded.vocabulary,
        )
        for some in (calibration, confirmation)
    )
    where = loaded.model.device
    if will_compile(settings.compile, where) and (unsupported_reason := uncompiled_reason(where)):
        asides().print(f"passes run eagerly: {unsupported_reason}", style="yellow", markup=False)
    with progress_bar("searching", quiet=quiet) as report:
        return selfspec_search.search(loaded.model, first, second, settings, in_phases(report), _notice)


def _study_of(settings: SearchSettings) -> StoredStudy:
    import selfspec_search

    study: StoredStudy = selfspec_search.load_study(settings.storage or "", settings.study_name)
    return study


def _repick(loaded: Loaded, study: StoredStudy, settings: SearchSettings, *, quiet: bool) -> SearchResult:
    import selfspec_search

    with progress_bar("picking again", quiet=quiet) as report:
        return selfspec_search.repick(loaded.model, study, settings, in_phases(report))


def _notice(line: str) -> None:
    asides().print(line, style="yellow", markup=False)


def split(prompts: list[Prompt], seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Calibration prompts, and a quarter held out. Drawn by `seed`, since a file may be sorted."""
    if len(prompts) < 2:
        raise InputError("one prompt cannot be split into calibration and held-out ones; give more, or --held-out")
    count = max(1, len(prompts) // HELD_OUT_SHARE)
    held = set(Random(seed).sample(range(len(prompts)), count))
    return (
        [prompt for index, prompt in enumerate(prompts) if index not in held],
        [prompt for index, prompt in enumerate(prompts) if index in held],
    )
