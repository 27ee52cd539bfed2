"""Record: the commit, device, versions and settings of a run, for its JSON."""

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


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with `--seed`, described by the first line of a script's docstring."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--seed", type=int, default=0)
    return made


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add `--out`."""
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


class Record:
    """One run of a script. The commit is read at the start, since the tree may change during the run."""

    def __init__(self, benchmark: str, options: argparse.Namespace, *, threads: int | None = None) -> None:
        self.benchmark, self.options, self.commit = benchmark, options, commit()
        if options.out is not None:
            warn_if_dirty(self.commit)
        quiet_hugging_face()
        if threads is not None:
            torch.set_num_threads(threads)

    def of(self, device: object, **measured: Any) -> dict[str, Any]:
        """The record and the measured figures."""
        return {
            "benchmark": self.benchmark,
            "commit": self.commit,
            "device": device_name(str(device)),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions()},
            "settings": {name: value for name, value in vars(self.options).items() if name != "out"},
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
    """Write a result to a JSON file."""
    path.write_text(json.dumps(result, indent=1, default=str) + "\n", "utf8")


def run_script(main: Callable[[], dict[str, Any]]) -> None:
    """Run a script's `main` and exit: with 1 and one line for a user error, with 1 if a stage failed."""
    try:
        stages = main().get("stages", [])
    except SelfspecError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if any(stage["status"] == "failed" for stage in stages) else 0)


def commit() -> str:
    """The commit of the tree, with the suffix `-dirty` if the tree has changes."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def warn_if_dirty(code: str) -> None:
    """Warn if written results would name a commit with changes."""
    if code.endswith("-dirty"):
        print(f"warning: the tree differs from its commit; the results will name '{code}'", file=sys.stderr)


def device_name(device: str) -> str:
    """The name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else processor_name()
