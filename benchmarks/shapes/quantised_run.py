"""Runs of `benchmarks/quantised.py` on shapes: a billion parameters on a CPU, 8 and 32 billion on a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from common.budget import Budget, free_memory
from common.machine import device_of
from common.tables import stages_table
from rich.console import Console

from selfspec import Format, InputError
from selfspec.models.quantised_linear import device_unsupported_reason
from selfspec.plan.draft_spec import INT4, INT8
from selfspec.utils.devices import dtype_name
from shapes.drafts import drafts_for
from shapes.effort import CPU, GPU, TOY, Effort
from shapes.limits import weight_bytes
from shapes.passes import Ceiling, measure_passes
from shapes.quantised_cells import QuantisedBench
from shapes.shape import LLAMA_1B, LLAMA_8B, QWEN3_32B, TOY_LLAMA, TOY_QWEN3, Shape
from shapes.subject import Subjects
from shapes.tables import drafts_table, quantised_ceilings_table, quantised_cell_table, target_table
from shapes.trained import Trained, TrainedRun

FORMATS = {"int4": INT4, "int8": INT8}
"""By name, the most important first."""
CPU_BUDGET, GPU_BUDGET = 1500.0, 570.0
EIGHT, THIRTY_TWO, MIDSIZE = "8B", "32B", "midsize"
SUBJECTS = (EIGHT, MIDSIZE, THIRTY_TWO)
SKIPPING, ANY = "selfspec, skips alone", "selfspec, all choices"
LEAST = {"prompts": 1, "new_tokens": 2, "repeats": 1}
"""The least value of each option."""


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Seconds of the stages of a shape, until a stage of the kind was measured."""

    passes: float  # with drawing the weights and making their copies
    ends: float  # agreement at both ends of the dial
    cell: float


TOY_ESTIMATES = Estimates(passes=5, ends=1, cell=3)
REAL_SHAPES = {
    EIGHT: (LLAMA_8B, Estimates(passes=120, ends=20, cell=60)),
    THIRTY_TWO: (QWEN3_32B, Estimates(passes=150, ends=30, cell=90)),
}
TOY_SHAPES = {EIGHT: (TOY_LLAMA, TOY_ESTIMATES), THIRTY_TWO: (TOY_QWEN3, TOY_ESTIMATES)}


def measure_on_cpu(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Time passes in 8 and 4 bits; decode in 4 bits, the faster format."""
    effort = as_given(TOY if options.toy else CPU, options)
    run = ShapeRun(effort, torch.device("cpu"), options.seed, Budget(options.budget or CPU_BUDGET, console), console)
    real = LLAMA_1B, Estimates(passes=200, ends=60, cell=240)
    run.measure(*((TOY_LLAMA, TOY_ESTIMATES) if options.toy else real), INT4, also_timed=[INT8])
    console.print(stages_table(run.budget.stages))
    return {"shapes": run.found, "stages": run.budget.to_list()}


def measure_on_gpu(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure 4 bits at 8 billion parameters, the trained model, other formats, then all formats at 32 billion."""
    if options.device is None and not options.toy and not torch.cuda.is_available():
        raise InputError("this part needs a CUDA device, and there is none here; try the code with --toy")
    device, effort = device_of(options.device, toy=options.toy), as_given(TOY if options.toy else GPU, options)
    budget = Budget(options.budget or GPU_BUDGET, console)
    run = ShapeRun(effort, device, options.seed, budget, console)
    shapes: Mapping[str, tuple[Shape, Estimates]] = TOY_SHAPES if options.toy else REAL_SHAPES
    trained_run = TrainedRun(
        folder=options.midsize,
        device=device,
        dtype="float32" if options.toy else "bfloat16",
        effort=effort.search,
        drafts={SKIPPING: "skip", ANY: "both"},
        seconds=20 if options.toy else 240,
    )
    trained: Trained | None = None
    formats = [FORMATS[name] for name in options.formats or FORMATS]
    for subject, format in order(options.only or SUBJECTS, formats):
        if format is not None:
            run.measure(*shapes[subject], format)
        elif (trained := trained_run.measure(budget)) is not None:
            trained.show(console)
    console.print(stages_table(budget.stages))
    return {
        "device": device,
        "shapes": run.found,
        "trained": trained.to_dict if trained else None,
        "stages": budget.to_list(),
    }


def order(wanted: Sequence[str], formats: Sequence[Format]) -> Iterator[tuple[str, Format | None]]:
    """Models and formats; the trained model follows the first format of the smaller shape."""
    small, large = ([(name, format) for format in formats if name in wanted] for name in (EIGHT, THIRTY_TWO))
    yield from small[:1]
    if MIDSIZE in wanted:
        yield MIDSIZE, None
    yield from [*small[1:], *large]


def as_given(effort: Effort, options: argparse.Namespace) -> Effort:
    """The effort with the sizes that the user gave.

    Raises:
        InputError: a size is too small.
    """
    for name, least in LEAST.items():
        at_least(name, getattr(options, name), least)
    return replace(effort, **{name: value for name in LEAST if (value := getattr(options, name)) is not None})


def at_least(name: str, value: int | None, least: int) -> None:
    """Raise `InputError` if a given option is less than `least`."""
    if value is not None and value < least:
        raise InputError(f"--{name.replace('_', '-')} is {value}, but it must be at least {least}")


@dataclass
class ShapeRun:
    """One run over some shapes; `found` holds the figures so far, by shape and format."""

    effort: Effort
    device: torch.device
    seed: int
    budget: Budget
    console: Console
    found: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.subjects = Subjects(self.device, self.seed, damped=True)

    def measure(self, shape: Shape, estimates: Estimates, format: Format, *, also_timed: Sequence[Format] = ()) -> None:
        """Measure a shape with drafts in one format. Passes of drafts in other formats may be timed too."""
        name = f"{shape.name}, {format.name}"
        if (reason := device_unsupported_reason(format, self.device)) is not None:
            self.budget.skip(name, reason)
            return
        timed = [other for other in also_timed if device_unsupported_reason(other, self.device) is None]
        make = partial(self._bench, shape, format, [*timed, format])
        bench = self.budget.run(f"{name}: passes", estimates.passes, make, kind=f"passes of {shape.name}")
        if bench is None:
            return
        result = self._begin(bench)
        kind = f"agreement of {shape.name}"
        result["agreement"] = self.budget.run(f"{name}: agreement, unset", estimates.ends, bench.ends, kind=kind)
        cells = [(agreement, False) for agreement in self.effort.agreements]
        for agreement, skipping in [*cells, (min(self.effort.agreements), True)]:
            stage = f"{name}: agreement {agreement:g}{' with skips' if skipping else ''}"
            work = partial(bench.measure, agreement, skipping=skipping)
            cell = self.budget.run(stage, estimates.cell, work, kind=f"cell of {shape.name}")
            if cell is not None:
                result["cells"].append(cell)
                self.console.print(quantised_cell_table(cell))
        self.console.print(quantised_ceilings_table(result, self.effort.agreements))

    def _bench(self, shape: Shape, format: Format, timed: Sequence[Format]) -> QuantisedBench:
        """A bench with timed passes; copies in other formats are freed."""
        free_memory()
        subject = self.subjects.of(shape)
        bench = QuantisedBench(subject, format, self.effort)
        vocabulary = subject.model.config.vocab_size
        drafts = drafts_for(timed, subject.num_layers, vocabulary, self.effort.trimmed, subject.skip_set)
        draft_weights = bench.spec.runtime.views.draft_weights
        bench.passes = measure_passes(subject, drafts, draft_weights, self.effort)
        draft_weights.keep_only(bench.everything)
        free_memory()
        return bench

    def _begin(self, bench: QuantisedBench) -> dict[str, Any]:
        """The result of a shape, with its passes and no cells yet."""
        assert bench.passes is not None
        model, passes = bench.subject.model, bench.passes
        result: dict[str, Any] = {
            "shape": bench.subject.shape.name,
            "dtype": dtype_name(model.dtype),
            "format": bench.format.code,
            "bytes_a_pass_reads": weight_bytes(model, 1),
            "passes": passes.to_dict(),
            "ceilings": [
                Ceiling.of(passes, draft, agreement).to_dict()
                for draft in passes.drafts
                for agreement in self.effort.agreements
            ],
            "cells": [],
        }
        self.found.append(result)
        self.console.print(target_table(result))
        self.console.print(drafts_table(result))
        return result
