"""The file that `--stats` names: one run's figures, for scripts and dashboards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from selfspec.cli.terminal import check_writable
from selfspec.errors import InputError

if TYPE_CHECKING:
    from selfspec.stats import Stats


def check_stats_file(path: Path) -> None:
    """Find out before anything is decoded whether the file can be written."""
    if str(path) == "-" or path.parent == Path("/dev"):
        raise InputError(f"--stats is '{path}', but stdout is for the text, and stderr for asides; name a file")
    check_writable(path)


def write_stats(stats: Stats, path: Path) -> None:
    """Write the figures as JSON; whoever reads the file never sees half of it."""
    from selfspec.files import write_atomically

    write_atomically(path, stats.to_json(indent=2) + "\n")
