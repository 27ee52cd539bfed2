"""selfspec search: find a plan for a model and write it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from selfspec.cli import options
from selfspec.cli.found import in_phases, report_search
from selfspec.cli.terminal import asides, at_least, check_writable, load_model, progress_bar, results
from selfspec.errors import InputError

if TYPE_CHECKING:
    from selfspec_search import SearchResult, SearchSettings

    from selfspec.loading import Loaded
    from selfspec.plan import Plan
    from selfspec.prompts import Prompt

DraftName = Literal["both", "skip", "quantised"]
LEAST_TOKENS = 2
"""Of a prompt that a search can use."""
_OF_A_STUDY = (
    *("prompts", "held_out", "start_from", "draft", "temperature", "top_p", "top_k"),
    *("trials", "timeout", "seed", "sampler", "gamma_max", "lookup_max", "new_tokens"),
)
"""What picking again has no use for."""
HELD_OUT_SHARE = 4
"""One prompt in so many is held out, where no held-out prompts are given."""
INTERRUPTED = 130
"""Exit code of ctrl-C. Where it ended the trials, the plan of the best so far is written all the same."""


def search(
    model: options.Model,
    out: Annotated[Path, typer.Option(metavar="PLAN", help="Where to write the plan: a file, or a directory.")],
    prompts: options.PromptFileOrNone = None,
    held_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts to confirm plans on; by default a quarter of --prompts."),
    ] = None,
    trials: options.Trials = 200,
    timeout: Annotated[float | None, typer.Option(help="Start no further trial after so many seconds.")] = None,
    seed: options.Seed = 0,
    sampler: Annotated[str, typer.Option(help="Who proposes drafts: tpe, gp, nsga2 or random.")] = "tpe",
    draft: Annotated[
        DraftName,
        typer.Option(
            help="What drafts may do: skip sub-layers, run quantised copies, or both, as far as it is faster."
        ),
    ] = "both",
    draft_memory: options.DraftMemory = None,
    max_draft_cost: Annotated[
        float | None, typer.Option(help="The most that a step of the draft may cost, as a share of the model's.")
    ] = None,
    start_from: Annotated[
        list[Path] | None, typer.Option(metavar="PLAN", help="Try this plan's draft first; may be repeated.")
    ] = None,
    lookup: Annotated[bool, typer.Option("--lookup/--no-lookup", help="Let prompt lookup take part.")] = True,
    gamma_max: Annotated[int, typer.Option(help="The longest draft to consider.")] = 8,
    lookup_max: Annotated[
        int | None, typer.Option(help="The longest draft by prompt lookup; by default twice --gamma-max.")
    ] = None,
    new_tokens: options.NewTokens = 128,
    rows: Annotated[int, typer.Option(help="How many rows will decode together.")] = 1,
    other_rows: Annotated[
        list[int] | None,
        typer.Option(help="Another number of rows that the plan should serve; may be repeated."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Search for sampling at this temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(help="... from the most likely tokens of this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="... from this many tokens.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What trials may take beside the model, such as 512M or 4G.")
    ] = None,
    compile: options.Compile = None,
    backend: options.Backend = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
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
    pick_again: Annotated[
        bool, typer.Option("--repick", help="No new trials: price those of the study for this device and --rows.")
    ] = False,
    quiet: options.Quiet = False,
    *,
    context: typer.Context,
) -> None:
    """Find what to skip and what to quantise, and write a plan.

    The model writes text once; what any draft would have got accepted is computed from it, timed on this device, and
    the best few plans are confirmed by decoding held-out prompts. Trials are kept: the same command goes on where an
    earlier one ended, and on other machines joins in. Ctrl-C ends the trials, confirms the best so far, writes the plan
    and exits with 130.
    """
    out = writable(out)
    at_least("--new-tokens", new_tokens, 2)
    at_least("--trials", trials, 1)
    storage = storage or str(out.with_suffix(".db"))
    _refuse_one_file_for_both(out, storage)
    known = [_plan(path) for path in start_from or ()]

    given: dict[str, Any] = {
        "trials": trials,
        "timeout": timeout,
        "seed": seed,
        "sampler": sampler,
        "draft": draft,
        "max_draft_cost": max_draft_cost,
        "start_from": [plan.recipe for plan in known],
        "gamma_max": gamma_max,
        "new_tokens": new_tokens,
        "rows": rows,
        "other_rows": other_rows or (),
        "lookup_max": lookup_max,
        "lookup": lookup,
        "compile": compile,
        "backend": backend,
        "storage": storage,
        "study_name": study,
    }
    settings = _settings(given, memory, draft_memory, temperature, top_p, top_k)
    if pick_again:
        _refuse_beside_repick(context)
        with _told_of_interrupts(storage):
            result = _repick(model, settings, device=device, dtype=dtype, quiet=quiet)
    else:
        calibration, confirmation = _prompts(prompts, held_out, seed)
        with _told_of_interrupts(storage):
            loaded = load_model(model, device=device, dtype=dtype, quiet=quiet)
            for plan in known:
                plan.check_fits(loaded.model.config)
            result = _search(loaded, calibration, confirmation, settings, quiet=quiet)
    result.plan.save(out)
    report_search(results(), result)
    results().print(f"wrote {out}", markup=False, soft_wrap=True)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _refuse_beside_repick(context: typer.Context) -> None:
    """A usage error for what picking again takes from the study, or does not need."""
    for name in _OF_A_STUDY:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(
                f"--repick tries nothing, and takes texts and sampling from the study; leave out {_option(name)}"
            )


def _refuse_one_file_for_both(out: Path, storage: str) -> None:
    """The plan must not be written over the trials."""
    file = storage.removeprefix("journal://").removeprefix("sqlite:///")
    if "://" not in file and os.path.realpath(os.path.expanduser(file)) == os.path.realpath(out):
        raise InputError(f"--out is {out}, where the trials would be kept too; give another file to one of them")


@contextmanager
def _told_of_interrupts(storage: str) -> Iterator[None]:
    """One line for a ctrl-C that comes too early or too late for a plan."""
    try:
        yield
    except KeyboardInterrupt:
        from selfspec_search.storage.open import without_password

        asides().print(
            f"interrupted, and no plan was written; trials that ended are kept in {without_password(storage)}: "
            "give the same command again to go on",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED) from None


def _option(text: str) -> str:
    """A parameter, which the text begins with, as it is typed."""
    name, space, rest = text.partition(" ")
    return f"--{name.replace('_', '-')}{space}{rest}"


def _settings(
    given: dict[str, Any],
    memory: str | None,
    draft_memory: str | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
) -> SearchSettings:
    from selfspec_search import Sampling, SearchSettings

    from selfspec.cli.generate import sampling_options
    from selfspec.sizes import parse_size

    try:
        size = None if memory is None else parse_size(memory)
        draft_size = None if draft_memory is None else parse_size(draft_memory, "draft_memory")
        sampling = Sampling(**sampling_options(temperature, top_p, top_k))
        return SearchSettings(**given, memory=size, draft_memory=draft_size, sampling=sampling)
    except InputError as error:  # it begins with the setting's name
        raise InputError(str(error) if str(error).startswith("-") else _option(str(error))) from None


def _search(
    loaded: Loaded, calibration: list[Prompt], confirmation: list[Prompt], settings: SearchSettings, *, quiet: bool
) -> SearchResult:
    import selfspec_search

    from selfspec.compiling import compile_obstacle, will_compile
    from selfspec.prompts import encode_prompts

    first, second = (
        encode_prompts(
            some, loaded.tokenizer, at_least=LEAST_TOKENS, context=loaded.context, new_tokens=settings.new_tokens
        )
        for some in (calibration, confirmation)
    )
    where = loaded.model.device
    if will_compile(settings.compile, where) and (obstacle := compile_obstacle(where)):
        asides().print(f"passes run eagerly: {obstacle}", style="yellow", markup=False)
    with progress_bar("searching", quiet=quiet) as report:
        return selfspec_search.search(loaded.model, first, second, settings, in_phases(report), _notice)


def _repick(model: str, settings: SearchSettings, *, device: str, dtype: str, quiet: bool) -> SearchResult:
    import selfspec_search

    study = selfspec_search.load_study(settings.storage or "", settings.study_name)
    loaded = load_model(model, device=device, dtype=dtype, quiet=quiet)
    with progress_bar("picking again", quiet=quiet) as report:
        return selfspec_search.repick(loaded.model, study, settings, in_phases(report))


def _notice(line: str) -> None:
    asides().print(line, style="yellow", markup=False)


def _plan(path: Path) -> Plan:
    from selfspec.plan import Plan

    return Plan.from_pretrained(path)


def _prompts(prompts: Path | None, held_out: Path | None, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Calibration and held-out prompts."""
    from selfspec.prompts import read_prompts

    if prompts is None:
        raise typer.BadParameter("give --prompts FILE (or --repick, which needs none)")
    read = read_prompts(prompts)
    return (read, read_prompts(held_out)) if held_out is not None else split(read, seed)


def writable(out: Path) -> Path:
    """The file to write, found out before minutes are spent; a directory gets a `selfspec_plan.json`."""
    from selfspec.plan import PLAN_FILE

    file = out / PLAN_FILE if os.path.isdir(out) else out
    check_writable(file)
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
