"""Where commands write: results to stdout, progress and notes to stderr."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from selfspec.errors import InputError, PlanError, PlanWarning, printable
from selfspec.utils.files import check_writable, is_stdout, is_stream

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from selfspec.cli.options import Placement
    from selfspec.huggingface.loading import Loaded
    from selfspec.plan.plan import Plan

Report = Callable[[int, int, str], None]
"""Draws progress: (done, total, description)."""
PIPE_WIDTH = 140
SECONDS_PER_LINE = 10
"""Seconds: from one line of progress to the next where there is no terminal."""
DRAFTED = "green"
"""The style of tokens that were drafted and accepted."""
ORIGINS = {
    "lookup": "cyan",
    "layers": DRAFTED,
    "draft model": "bright_blue",
    "recovered": "yellow",
    "bonus": "magenta",
    "undrafted": "",
}
"""The style of a token by its origin: accepted drafts first, then the model's own tokens."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave the exit code to the command line."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def results() -> Console:
    """Stdout. In a file or a pipe: plain text, wide enough for tables."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return _Console(highlight=False)
    return _Console(highlight=False, width=PIPE_WIDTH)


def results_beside(out: Path | None) -> Console:
    """Where results go while a file may be written: stdout; or stderr if stdout is the file."""
    return asides() if out is not None and is_stdout(out) else results()


def asides() -> Console:
    """Stderr: progress and notes."""
    return _Console(stderr=True, highlight=False)


def tell_written(out: Path) -> None:
    """Print a line about a written file."""
    results_beside(out).print(f"wrote {printable(out)}", markup=False, soft_wrap=True)


def load_model(name: str, place: Placement, *, quiet: bool = False) -> Loaded:
    """Load MODEL. On a terminal, a line says so meanwhile."""
    with _loading(name, quiet=quiet):
        from selfspec.huggingface.loading import DEMO, load, quiet_hugging_face

        quiet_hugging_face()
        loaded = load(name, device=place.device, dtype=place.dtype)
    if name == DEMO and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)  # it is too small to gain from more, and loses where cores are shared
    return loaded


def load_draft_model(name: str | None, target: Loaded, *, quiet: bool = False) -> PreTrainedModel | None:
    """Load the model that `--draft-model` names; None without the option."""
    if name is None:
        return None
    with _loading(name, quiet=quiet):
        from selfspec.huggingface.loading import load_draft_model

        return load_draft_model(name, target).model


def tell_draft_bytes(model: PreTrainedModel, plan: Plan) -> None:
    """Print the memory of the draft weights, before it is taken."""
    from selfspec.speculator import draft_bytes
    from selfspec.utils.sizes import in_words

    if size := draft_bytes(model, plan):
        asides().print(f"the draft weights take {in_words(size)} in addition to the model", style="dim", markup=False)


@contextmanager
def progress_bar(what: str, *, quiet: bool = False) -> Iterator[Report]:
    """Yields a function of (done, total, description): a bar on a terminal, else a line every `SECONDS_PER_LINE`.

    Both are written in that call only, so that no thread disturbs a timing.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    aside = asides()
    hidden = quiet or not aside.is_terminal
    with Progress(*columns, console=aside, transient=True, auto_refresh=False, disable=hidden) as bar:
        task, said = bar.add_task(what, total=None), monotonic()

        def report(done: int, total: int, description: str) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total, description=description, refresh=True)
            if not aside.is_terminal and not quiet and monotonic() - said >= SECONDS_PER_LINE:
                said = monotonic()
                aside.print(f"{description}: {done} of {total}", markup=False, soft_wrap=True)

        yield report


@contextmanager
def _loading(name: str, *, quiet: bool) -> Iterator[None]:
    aside = asides()
    with aside.status(escape(f"loading {printable(name)}")) if aside.is_terminal and not quiet else nullcontext():
        yield


def writable(out: Path) -> Path:
    """The plan file to write, checked before the search. In a directory: `selfspec_plan.json`."""
    from selfspec.plan.plan import PLAN_FILE

    file = out / PLAN_FILE if os.path.isdir(out) else out
    check_writable(file)
    return file


def check_replaceable(out: Path | None, config: PretrainedConfig, *, force: bool) -> None:
    """Raise `InputError` if `out` holds anything but a plan for the model with this config, unless `force`."""
    from selfspec.plan.plan import Plan

    if out is None or force or is_stream(out) or not os.path.exists(out) or not os.path.getsize(out):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlanWarning)
            plan = Plan.from_pretrained(out)
    except PlanError:
        raise InputError(f"{out} exists and is not a plan; give another --out, or --force to overwrite it") from None
    try:
        if plan.model is not None:
            plan.check_fits(config)
    except PlanError as error:
        reason = str(error).partition(";")[0]
        raise InputError(f"{out} would be overwritten: {reason}; give another --out, or --force") from None
