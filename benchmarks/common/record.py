"""The record of a run: which code was measured, on which device, with which versions and settings."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from selfspec import SelfspecError
from selfspec.huggingface.loading import processor_name, quiet_hugging_face, versions

NOT_SETTINGS = ("out", "figure", "redraw")
"""Options that say where results go."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser described by the first line of a script's docstring, with the options that every script has."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--seed", type=int, default=0)
    return made


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option that keeps the JSON."""
    parser.add_argument("--out", type=Path, help="write the JSON here too")


class Record:
    """One run of a script. The commit is that of the start: the tree may change while the script runs."""

    def __init__(self, benchmark: str, options: argparse.Namespace, *, threads: int | None = None) -> None:
        self.benchmark, self.options, self.commit = benchmark, options, commit()
        if options.out is not None:
            warn_if_dirty(self.commit)
        quiet_hugging_face()
        if threads is not None:
            torch.set_num_threads(threads)

    def of(self, device: object, **measured: Any) -> dict[str, Any]:
        """The record with what was measured."""
        return {
            "benchmark": self.benchmark,
            "commit": self.commit,
            "device": device_name(str(device)),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions()},
            "settings": {name: value for name, value in vars(self.options).items() if name not in NOT_SETTINGS},
            **measured,
        }

    def end(self, device: object, **measured: Any) -> dict[str, Any]:
        """Write the record to `--out`, print it as the last line, and return it."""
        result = self.of(device, **measured)
        if self.options.out is not None:
            write(result, self.options.out)
        print(json.dumps(result, default=str))
        return result


def write(result: dict[str, Any], path: Path) -> None:
    """A result as a file of JSON."""
    path.write_text(json.dumps(result, indent=1, default=str) + "\n", "utf8")


def run_script(main: Callable[[], dict[str, Any]]) -> None:
    """Run a script's `main` and exit: 1, with one line, for an error of the user; 1 where a stage failed."""
    try:
        stages = main().get("stages", [])
    except SelfspecError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if any(stage["status"] == "failed" for stage in stages) else 0)


def commit() -> str:
    """The commit of the tree, with a mark if the tree differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def warn_if_dirty(code: str) -> None:
    """Results that are kept should name the code that they came from."""
    if code.endswith("-dirty"):
        print(f"warning: the tree differs from its commit; the results will name '{code}'", file=sys.stderr)


def device_name(device: str) -> str:
    """The name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else processor_name()
