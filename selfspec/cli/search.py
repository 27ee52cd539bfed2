"""selfspec search: find a plan for a model and write it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selfspec.cli import options


def search(
    model: options.Model,
    prompts: options.PromptFile,
    out: Annotated[Path, typer.Option(metavar="PLAN", help="Where to write the plan.")],
) -> None:
    """Find what to skip, and write a plan."""
