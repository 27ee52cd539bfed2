"""selfspec bench: a plan against the plain model and the peers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from selfspec.cli import options
from selfspec.cli.options import DraftModel, Placement, Without
from selfspec.cli.terminal import (
    asides,
    load_draft_model,
    load_model,
    progress_bar,
    results,
    tell_draft_bytes,
)
from selfspec.decode_options import DecodeOptions
from selfspec.errors import InputError, printable
from selfspec.utils.settings import Described

if TYPE_CHECKING:
    from selfspec.benchmark.contenders import LineUp
    from selfspec.benchmark.measure import Measurement, Score
    from selfspec.huggingface.loading import Loaded

INTERVALS = "95 % intervals: bootstrap over prompts, and over the paired repeats of each"


def bench(
    model: options.Model,
    plan: options.PlanFile,
    prompts: options.PromptFile,
    new_tokens: Annotated[int, Described("Tokens to write after each prompt.", least=1)] = 128,
    repeats: Annotated[int, Described("Times that everything is decoded; the median counts.", least=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    *,
    decoding: Annotated[DecodeOptions, Without({"graphs"})],
    drafting: DraftModel,
    place: Placement,
    quiet: options.Quiet = False,
) -> None:
    """Measure a plan against the plain model, model.generate, assistant_early_exit and prompt lookup.

    Greedy, one prompt at a time, interleaved in one run. Where the plan pads passes over one token, the plain model
    runs with and without padding: the faster counts. With --draft-model, classic speculative decoding takes part, too.
    """
    if drafting.draft_gamma is not None and drafting.draft_model is None:
        raise InputError("--draft-gamma goes with --draft-model")

    from selfspec.huggingface.prompts import encode_prompts, read_prompts
    from selfspec.plan.plan import Plan

    chosen, read = Plan.from_pretrained(plan), read_prompts(prompts)
    loaded = load_model(model, place, quiet=quiet)
    draft_model = load_draft_model(drafting.draft_model, loaded, quiet=quiet)

    from selfspec.benchmark.contenders import line_up
    from selfspec.benchmark.measure import measure

    tell_draft_bytes(loaded.model, chosen)
    encoded = encode_prompts(
        read, loaded.tokenizer, context=loaded.context, new_tokens=new_tokens, vocabulary=loaded.vocabulary
    )
    with progress_bar("finding the rivals' best settings", quiet=quiet) as report:
        report(0, 1, "finding the rivals' best settings")
        entrants = line_up(
            loaded.model,
            chosen,
            encoded,
            new_tokens,
            decoding,
            draft_model=draft_model,
            draft_gamma=drafting.gamma,
        )
        measured = measure(
            entrants.contenders,
            encoded,
            new_tokens=new_tokens,
            repeats=repeats,
            on_progress=lambda done, total: report(done, total, "decoding"),
        )
    longest = max(chosen.longest_draft, drafting.gamma if draft_model is not None else 0)
    scores = measured.scores(entrants.ours.runtime, gamma=longest)
    out = results()
    print_scores(out, scores)
    for note in notes(loaded, entrants, measured, scores):
        out.print(printable(note), markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(to_dict(loaded, entrants, measured, scores)))
    if sum(score.differing.errors for score in scores if score.stats is not None):
        asides().print("the output of our runtime differs from the plain model's: please report this", style="red")


def print_scores(out: Console, scores: list[Score]) -> None:
    """A row for each contender."""
    bases = list(scores[0].ratios)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("decoder")
    for heading in ("tokens/s", *(f"x {base} (95 %)" for base in bases), "acceptance", "tokens/round", "differing"):
        table.add_column(heading, justify="right")
    for score in scores:
        drafted = score.stats is not None and score.stats.drafted > 0
        table.add_row(
            score.name,
            f"{score.tokens_per_second:.1f}",
            *("1" if base == score.name else str(score.ratios[base]).replace("x", "") for base in bases),
            f"{score.stats.acceptance_rate:.0%}" if drafted and score.stats else "",
            f"{score.stats.tokens_per_round:.2f}" if drafted and score.stats else "",
            str(score.differing),
        )
    out.print(table)


def notes(loaded: Loaded, entrants: LineUp, measured: Measurement, scores: list[Score]) -> list[str]:
    """The conditions of the figures, a line each."""
    from selfspec.benchmark.contenders import DRAFT_MODEL
    from selfspec.huggingface.loading import describe_device

    _, repeats, prompts = measured.seconds.shape
    runtime, stats = entrants.ours.runtime, scores[-1].stats
    lines = [
        f"{loaded.name}, {describe_device(loaded.model.device)}, {loaded.dtype_name}; {prompts} prompts, "
        f"{int(measured.tokens.max())} new tokens, medians of {repeats} repeats; {INTERVALS}",
        f"plan: {entrants.ours.plan}",
        *([f"policy: {stats.policy}"] if stats is not None and entrants.ours.plan.speculates else []),
        f"attention backend {runtime.backend.backend.name} ({runtime.backend.reason})",
        *(stats.slower_paths if stats is not None else []),
        *(f"{score.name}: {_settings(score)}" for score in scores if score.stats is None and score.settings),
        *(f"{DRAFT_MODEL}: {_settings(score)}" for score in scores if score.name == DRAFT_MODEL),
        *(f"left out: {reason}" for reason in entrants.absent),
        *(f"{name} did not write the same tokens in every repeat" for name in measured.unsteady),
    ]
    return lines + [f"{score.name}: {first}" for score in scores for first in score.differing.differences[:3]]


def _settings(score: Score) -> str:
    return ", ".join(f"{name}={value}" for name, value in score.settings.items())


def to_dict(loaded: Loaded, entrants: LineUp, measured: Measurement, scores: list[Score]) -> dict[str, Any]:
    """The JSON line."""
    from selfspec.huggingface.loading import describe_device, versions

    _, repeats, prompts = measured.seconds.shape
    runtime = entrants.ours.runtime
    return {
        "model": loaded.name,
        "device": describe_device(loaded.model.device),
        "dtype": loaded.dtype_name,
        "prompts": prompts,
        "repeats": repeats,
        "new_tokens": int(measured.tokens.max()),
        "backend": runtime.backend.backend.name,
        "backend_reason": runtime.backend.reason,
        "compiled": runtime.passes.compile,
        "intervals": INTERVALS,
        "plan": entrants.ours.plan.model_dump(mode="json", exclude={"round_costs", "model", "provenance"}),
        "draft_bytes": entrants.ours.runtime.views.draft_weights.nbytes,
        "baseline": measured.baseline,
        "contenders": [score.to_dict() for score in scores],
        "absent": entrants.absent,
        "unsteady": measured.unsteady,
        "versions": versions(),
    }
