"""What does a first hour on a GPU say: do the tests pass, and how fast is what?

Stages by value, each a process of its own with its own time limit. A stage writes its log and its result as it ends, so
that a cut-off loses nothing. A stage that does not fit into the time left is skipped and named. Prints a table; the
last line is JSON.

    python benchmarks/gpu_day.py --minutes 25 --model DIR     # DIR: a real model, carried along; optional
    python benchmarks/gpu_day.py --toy                        # the same stages at toy sizes, on a CPU
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.machine import device_of
from common.record import Record, add_out, parser, run_script
from common.tables import figures_table
from rich.console import Console

HERE = Path(__file__).parent
LEAST_SECONDS = 20.0
"""Seconds: a stage does not begin with less time left."""
_RULES = "└┴─┘ "
LINES_OF_A_FAILURE = 40
"""Lines: of a failed stage's log that are printed."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command, and the most minutes of the whole that it may take."""

    name: str
    command: Sequence[str]
    minutes: float


@dataclass(kw_only=True)
class Outcome:
    """What became of a stage."""

    name: str
    status: str  # done, failed, timed out or skipped
    seconds: float = 0.0
    said: str = ""  # the last line that is no JSON
    result: Any = None  # the JSON of the last line


def stages(model: str | None, *, toy: bool) -> list[Stage]:
    """The stages, the most valuable first: correctness, then speed end to end, then the parts."""
    device = "cpu" if toy else "cuda"

    def script(name: str, *arguments: object) -> list[str]:
        return [sys.executable, str(HERE / f"{name}.py"), *map(str, arguments)]

    few = ("--prompts", 2, "--repeats", 1, "--trials", 4, "--new-tokens", 16) if toy else ("--trials", 80)
    decode = ("--device", device, *few)
    quick = ("--prompts", 2, "--repeats", 1, "--batch-repeats", 1, "--trials", 4, "--new-tokens", 16) if toy else ()
    real = [Stage(name="decode, real model", command=script("decode", "--model", model, *decode), minutes=5)]
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--maxfail", "5", str(HERE.parent / "tests")]
    tests += ["--collect-only"] if toy else []  # they need a GPU
    return [
        Stage(name="tests", command=tests, minutes=8),
        Stage(name="decode, embedded model", command=script("decode", *decode), minutes=4),
        *(real if model else []),
        Stage(name="shapes", command=script("gpu", *_size(toy, 400)), minutes=8),
        Stage(name="quantised drafts", command=script("quantised", "gpu", *_size(toy, 300)), minutes=6),
        Stage(name="drafters", command=script("drafters", "--device", device, "--rows", 1, 16, *quick), minutes=6),
    ]


def _size(toy: bool, budget: int) -> list[object]:
    return ["--toy", "--budget", 60] if toy else ["--budget", budget]


def run(stage: Stage, folder: Path, seconds: float) -> Outcome:
    """Run a stage within `seconds`; its log and its result lie in `folder`."""
    log, start = folder / f"{stage.name.replace(', ', '-').replace(' ', '-')}.log", time.monotonic()
    limit, status = min(seconds, 60 * stage.minutes), "done"
    with log.open("w", encoding="utf8") as file:
        try:
            ended = subprocess.run(stage.command, stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=False)
            status = "done" if ended.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
    lines = [line for line in log.read_text("utf8", errors="replace").splitlines() if line.strip()]
    result = _json(lines[-1]) if lines else None
    said = next((line for line in reversed(lines) if _json(line) is None and line.strip(_RULES)), "")
    outcome = Outcome(
        name=stage.name, status=status, seconds=round(time.monotonic() - start, 1), said=said[:200], result=result
    )
    log.with_suffix(".json").write_text(json.dumps(asdict(outcome), indent=1) + "\n", "utf8")
    if status != "done":
        print("\n".join(lines[-LINES_OF_A_FAILURE:]))
    return outcome


def _json(line: str) -> Any:
    try:
        return json.loads(line) if line.startswith("{") else None
    except json.JSONDecodeError:
        return None


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    record, device = Record("gpu_day", options), device_of(None, toy=options.toy)
    options.folder.mkdir(parents=True, exist_ok=True)
    end, outcomes = time.monotonic() + 60 * options.minutes, list[Outcome]()
    for stage in stages(options.model, toy=options.toy):
        if (left := end - time.monotonic()) < LEAST_SECONDS:
            outcomes.append(Outcome(name=stage.name, status="skipped", said=f"{max(0.0, left):.0f} s were left"))
            continue
        print(f"{stage.name}: {' '.join(stage.command)}", flush=True)
        outcomes.append(run(stage, options.folder, left))
    rows = [(one.name, one.status, f"{one.seconds:.0f}", one.said) for one in outcomes]
    Console(width=160).print(figures_table("stages", ("stage", "status", "seconds", "last line"), rows))
    # A stage that was cut off counts as failed. The stages' own results stay in the folder.
    kept = [{**asdict(one), "status": one.status.replace("timed out", "failed"), "result": None} for one in outcomes]
    return record.end(device, stages=kept)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=25.0, help="for all stages together")
    options.add_argument("--model", help="a real model to decode too: a directory or a hub id")
    options.add_argument("--toy", action="store_true", help="toy sizes, to try the code; the figures mean nothing")
    options.add_argument("--folder", type=Path, default=Path("gpu_day"), help="for the stages' logs and results")
    add_out(options)
    return options.parse_args(argv)


if __name__ == "__main__":
    run_script(main)
