"""The part `gpu`: shapes of 8 and 32 billion parameters, and a trained model, on a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from devices import device_of
from gpu_bench.budget import Budget
from gpu_bench.real import missing
from gpu_bench.shapes import LLAMA_8B, QWEN3_32B, Shape
from rich.console import Console

from quantised_bench.effort import GPU, TOY, Effort, as_told
from quantised_bench.shape_run import Estimates, ShapeRun
from quantised_bench.shapes import TOY_LLAMA, TOY_QWEN3
from quantised_bench.tables import stages_table, tell
from quantised_bench.trained import REAL, Sizes, Trained, measure_trained
from quantised_bench.trained import TOY as TOY_SIZES
from selfspec import Format, InputError
from selfspec.cli.bench import print_scores
from selfspec.cli.formatting import report_search
from selfspec.plan.draft_spec import INT4, INT8

FORMATS = {"int4": INT4, "int8": INT8}
"""In the order of their importance."""
BUDGET, TRAINED = 570.0, "mid-size model"
EIGHT, THIRTY_TWO, MIDSIZE = "8B", "32B", "midsize"
SUBJECTS = (EIGHT, MIDSIZE, THIRTY_TWO)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """What a run covers.

    Args:
        shapes: by subject, and how long their stages may take.
        sizes, dtype, seconds: of the trained model's stage.
    """

    effort: Effort
    shapes: dict[str, tuple[Shape, Estimates]]
    sizes: Sizes
    dtype: str
    seconds: float


REAL_RUN = Extent(
    effort=GPU,
    shapes={
        EIGHT: (LLAMA_8B, Estimates(passes=120, ends=20, cell=60)),
        THIRTY_TWO: (QWEN3_32B, Estimates(passes=150, ends=30, cell=90)),
    },
    sizes=REAL,
    dtype="bfloat16",
    seconds=240,
)
TOY_RUN = Extent(
    effort=TOY,
    shapes={
        EIGHT: (TOY_LLAMA, Estimates(passes=5, ends=1, cell=3)),
        THIRTY_TWO: (TOY_QWEN3, Estimates(passes=5, ends=1, cell=3)),
    },
    sizes=TOY_SIZES,
    dtype="float32",
    seconds=20,
)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The most important first: 4 bits at 8 billion, the trained model, other formats, and all again at 32 billion."""
    device, extent = _device(options), TOY_RUN if options.toy else REAL_RUN
    budget = Budget(seconds=options.budget or BUDGET, tell=tell(console))
    effort = as_told(extent.effort, options)
    run = ShapeRun(effort=effort, device=device, seed=options.seed, budget=budget, console=console)
    wanted, formats = options.only or SUBJECTS, [FORMATS[name] for name in options.formats or FORMATS]
    trained = None
    for subject, format in _order(wanted, formats):
        if format is not None:
            shape, estimates = extent.shapes[subject]
            run.measure(shape, format, estimates)
        elif (trained := _trained(options.midsize, device, extent, budget)) is not None:
            _print(console, trained)
    console.print(stages_table(budget.stages))
    return {
        "device": device,
        "shapes": run.found,
        "trained": trained.to_dict if trained else None,
        "stages": [stage.to_dict() for stage in budget.stages],
    }


def _order(wanted: Sequence[str], formats: Sequence[Format]) -> Iterator[tuple[str, Format | None]]:
    """Subjects and formats, the trained model behind the first format of the smaller shape."""
    small, large = ([(name, format) for format in formats if name in wanted] for name in (EIGHT, THIRTY_TWO))
    yield from small[:1]
    if MIDSIZE in wanted:
        yield MIDSIZE, None
    yield from [*small[1:], *large]


def _device(options: argparse.Namespace) -> torch.device:
    if options.device is None and not options.toy and not torch.cuda.is_available():
        raise InputError("this part needs a CUDA device, and there is none here; try the code with --toy")
    return device_of(options.device, toy=options.toy)


def _trained(folder: Path, device: torch.device, extent: Extent, budget: Budget) -> Trained | None:
    if (reason := missing(folder)) is not None:
        return budget.skip(TRAINED, reason)

    def work() -> Trained:
        return measure_trained(folder, device, extent.dtype, extent.sizes, timeout=extent.seconds / 4)

    return budget.run(TRAINED, extent.seconds, work)


def _print(console: Console, trained: Trained) -> None:
    for name, result in trained.found.items():
        console.print(f"{name}:", style="bold")
        report_search(console, result)
    print_scores(console, trained.scores)
