"""selfspec profile: measure what passes and sub-layers cost on this device, print it, keep it, plot it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from selfspec.cli import options
from selfspec.cli.formatting import print_facts
from selfspec.cli.options import Placement
from selfspec.cli.terminal import asides, load_model, progress_bar, results_beside, tell_written, writable
from selfspec.decode_options import Backend, Compile
from selfspec.errors import InputError
from selfspec.utils.settings import Described

if TYPE_CHECKING:
    from rich.console import Console
    from selfspec_search.profile.profile import Profile

    from selfspec.plan.round_costs import PassLengths

PROFILE_FILE = "profile.json"
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
SHOWN = (1, 2, 3, 5, 9, 17, 33, 65)
"""Tokens: pass lengths that the table shows, in addition to the longest."""


def profile(
    model: options.Model,
    contexts: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="Tokens in the cache when a pass begins; by default 128, 512 and 2048, if they fit."
        ),
    ] = None,
    rows: Annotated[int, Described("Rows decoded together.", least=1)] = 1,
    gamma_max: Annotated[int, Described("The longest draft to verify, in tokens.", least=1)] = 8,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the profile as JSON, in seconds.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: a .png, .svg or .pdf.")] = None,
    compile: Compile = None,
    backend: Backend = None,
    *,
    place: Placement,
    quiet: options.Quiet = False,
) -> None:
    """Measure what passes and sub-layers cost on this device.

    Passes of the real runtime over one and more tokens, and steps of drafts that skip this and that: what the search
    prices its plans with. Medians, in milliseconds.
    """
    lengths = parse_contexts(contexts)
    check_longest_draft(gamma_max)
    out, plot = checked_out(out), checked_plot(plot)
    loaded = load_model(model, place, quiet=quiet)

    from selfspec_search.profile.draft_costs import FORMATS
    from selfspec_search.profile.profile import ProfileSettings, measure

    from selfspec.runtime.compiling import uncompiled_reason, will_compile

    where = loaded.model.device
    if will_compile(compile, where) and (unsupported_reason := uncompiled_reason(where)):
        asides().print(f"passes run eagerly: {unsupported_reason}", style="yellow", markup=False)
    with progress_bar("timing passes", quiet=quiet) as report:
        measured = measure(
            loaded.model,
            settings=ProfileSettings(rows=rows, backend=backend, compile=compile, formats=FORMATS),
            gamma_max=gamma_max,
            contexts=lengths,
            on_cycle=lambda done, total: report(done, total, "timing passes"),
        )
    report_profile(results_beside(out), measured)
    if out is not None:
        write(measured, out)
    if plot is not None:
        draw(measured, loaded.name, plot)


def parse_contexts(text: str | None) -> list[int] | None:
    """Context lengths from text such as '128,512'; None stays None."""
    if text is None:
        return None
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--contexts is '{text}', but numbers of tokens are expected, as in 128,512,1024") from None
    if min(lengths) < 1:
        raise InputError(f"--contexts is {min(lengths)}, but it must be at least 1")
    return lengths


def check_longest_draft(gamma_max: int) -> None:
    """Raise `InputError` for a draft longer than a plan allows."""
    from selfspec.plan.lookup import MOST_DRAFTED

    if gamma_max > MOST_DRAFTED:
        raise InputError(f"--gamma-max is {gamma_max}, but a plan's draft length is at most {MOST_DRAFTED}")


def checked_out(out: Path | None) -> Path | None:
    """The file to write, checked before the measurement. In a directory: `profile.json`."""
    if out is None:
        return None
    return writable(out / PROFILE_FILE if os.path.isdir(out) else out)


def checked_plot(plot: Path | None) -> Path | None:
    """The file of the plot, checked before the measurement."""
    if plot is None:
        return None
    if plot.suffix.lower() not in PLOT_SUFFIXES or os.path.isdir(plot):
        raise InputError(f"--plot is {plot}, but a file that ends in {', '.join(PLOT_SUFFIXES)} is expected")
    return writable(plot)


def report_profile(out: Console, profile: Profile) -> None:
    """Print milliseconds at every context, and what they mean for drafting."""
    shown = [tokens for tokens in SHOWN if tokens <= profile.gamma_max] + [profile.gamma_max + 1]
    table = Table(box=None, pad_edge=False, header_style="bold", title="milliseconds", title_justify="left")
    passes = [f"pass of {shown[0]}", *map(str, shown[1:])]
    for column in ("context", *passes, "draft step", "attention", "MLP", "layer", "fixed", "prefill"):
        table.add_column(column, justify="right")
    for context, costs in zip(profile.contexts, profile.costs, strict=True):
        seconds = [
            *(costs.rounds[tokens - 1] for tokens in shown),
            costs.measured["nothing"],
            costs.attention,
            costs.mlp,
            costs.layer,
            costs.fixed,
            costs.prefill,
        ]
        table.add_row(str(context), *map(milliseconds, seconds))
    out.print(table)
    print_facts(out, facts(profile))


def milliseconds(seconds: float) -> str:
    """Milliseconds with at least three digits."""
    return f"{seconds * 1e3:.{3 if seconds < 1e-3 else 2 if seconds < 0.1 else 1}f}"


def facts(profile: Profile) -> list[tuple[str, str]]:
    """The figures in words."""
    longest = profile.gamma_max + 1
    at = [(f"at {context}", costs) for context, costs in zip(profile.contexts, profile.costs, strict=True)]
    verify = ", ".join(f"{costs.rounds[-1] / costs.rounds[0]:.2f} {where}" for where, costs in at)
    saved = {
        kind: ", ".join(f"{costs.saved(kind) / costs.measured['nothing']:.1%} {where}" for where, costs in at)
        for kind in ("attn", "mlp")
    }
    return [
        ("measured on", profile.conditions),
        ("verify", f"a pass of {longest} tokens costs, in plain passes: {verify}"),
        ("skip an attention", f"saves of a draft step: {saved['attn']}"),
        ("skip an MLP", f"saves of a draft step: {saved['mlp']}"),
        *_draft_weights(profile),
        *([("pass_lengths", _pass_lengths(profile.pass_lengths))] if profile.pass_lengths else []),
    ]


def _draft_weights(profile: Profile) -> Iterator[tuple[str, str]]:
    """The cost of a draft step with everything quantised, or why a format was left out."""
    costs = profile.costs[len(profile.costs) // 2]
    for code, savings in costs.formats.items():
        parts = {"an attention": savings.attention, "an MLP": savings.mlp, "the head": savings.head}
        step = costs.measured["nothing"]
        yield code, "saves of a draft step: " + ", ".join(f"{part} {s / step:.1%}" for part, s in parts.items())
    for code, reason in profile.slower_formats.items():
        yield code, f"left out: {reason}"


def _pass_lengths(pass_lengths: PassLengths) -> str:
    longer = [f"{t} to {padded}" for t, padded in enumerate(pass_lengths.target, start=1) if padded > t]
    longer += [f"the draft's to {pass_lengths.draft}"] * (pass_lengths.draft > 1)
    return "faster are passes that are padded: " + ", ".join(longer) + " tokens"


def write(profile: Profile, out: Path) -> None:
    """Write the profile as JSON."""
    from selfspec.utils.files import write_atomically

    write_atomically(out, json.dumps(profile.to_dict(), indent=2) + "\n")
    tell_written(out)


def draw(profile: Profile, model: str, out: Path) -> None:
    """Draw the profile into a file."""
    from selfspec_search.report.profile_plot import plot

    from selfspec.utils.files import write_atomically

    drawn = BytesIO()
    plot(profile, model).savefig(drawn, format=out.suffix.lower().removeprefix("."))
    write_atomically(out, drawn.getvalue())
    tell_written(out)
