"""Where commands write: results to stdout, progress and notes to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from selfspec.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def results() -> Console:
    """Stdout. In a file or a pipe: plain text, wide enough for tables."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return Console(highlight=False)
    return Console(highlight=False, width=PIPE_WIDTH)


def asides() -> Console:
    """Stderr: progress and notes."""
    return Console(stderr=True, highlight=False)


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
    with aside.status(f"loading {name}") if aside.is_terminal and not quiet else nullcontext():
        yield


def writable(out: Path) -> Path:
    """The plan file to write, checked before the search. In a directory: `selfspec_plan.json`."""
    from selfspec.plan.plan import PLAN_FILE

    file = out / PLAN_FILE if os.path.isdir(out) else out
    check_writable(file)
    return file


def check_writable(file: Path) -> None:
    """Raise `InputError` if the file cannot be written, before its content is computed."""
    if not os.path.isdir(file.parent):
        raise InputError(f"cannot write {file}: there is no directory {file.parent}; make it first")
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"cannot write {file}: choose a directory that is writable")
    if os.path.exists(file) and not os.path.isfile(file):  # a rename would put an ordinary file in a device's place
        raise InputError(f"cannot write {file}: it is there and is no ordinary file; choose another name")
