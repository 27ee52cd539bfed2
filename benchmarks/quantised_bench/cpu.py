"""The part `cpu`: a shape of one billion parameters, bfloat16, on a CPU."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from gpu_bench.budget import Budget
from rich.console import Console

from quantised_bench.effort import CPU, TOY, Effort, as_told
from quantised_bench.shape_run import Estimates, ShapeRun
from quantised_bench.shapes import LLAMA_1B, TOY_LLAMA
from quantised_bench.tables import stages_table, tell
from selfspec.plan.draft_spec import INT4, INT8

BUDGET = 1500.0
REAL_ESTIMATES, TOY_ESTIMATES = Estimates(passes=200, ends=60, cell=240), Estimates(passes=10, ends=2, cell=5)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Passes in 8 and 4 bits; decoding in 4 bits, which are the faster ones."""
    effort: Effort = as_told(TOY if options.toy else CPU, options)
    run = ShapeRun(
        effort=effort,
        device=torch.device("cpu"),
        seed=options.seed,
        budget=Budget(seconds=options.budget or BUDGET, tell=tell(console)),
        console=console,
    )
    estimates = TOY_ESTIMATES if options.toy else REAL_ESTIMATES
    run.measure(TOY_LLAMA if options.toy else LLAMA_1B, INT4, estimates, beside=[INT8])
    console.print(stages_table(run.budget.stages))
    return {"shapes": run.found, "stages": [stage.to_dict() for stage in run.budget.stages]}
