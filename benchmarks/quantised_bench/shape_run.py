"""ShapeRun: the stages of shapes and formats, each left out where the time or the memory left is not enough."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from gpu_bench.budget import Budget
from gpu_bench.limits import weight_bytes
from gpu_bench.shapes import Shape
from rich.console import Console

from quantised_bench.bench import Bench
from quantised_bench.ceilings import ceiling
from quantised_bench.cells import Cell, cell_of, cell_with_skips, measure_cell
from quantised_bench.drafts import drafts_for
from quantised_bench.effort import Effort
from quantised_bench.passes import measure_passes
from quantised_bench.subject import Subject
from quantised_bench.tables import ceilings_table, cell_table, drafts_table, target_table
from selfspec import Format
from selfspec.models.quantised_linear import device_unsupported_reason


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Seconds that stages may take before one of their kind was measured.

    Args:
        passes: with drawing the shape and making its copies.
        ends: the agreement at both ends of the dial.
    """

    passes: float
    ends: float
    cell: float


@dataclass(kw_only=True)
class ShapeRun:
    """One run over some shapes; `found` is what it measured so far, by shape and format."""

    effort: Effort
    device: torch.device
    seed: int
    budget: Budget
    console: Console
    found: list[dict[str, Any]] = field(default_factory=list)
    _subject: Subject | None = None

    def measure(self, shape: Shape, format: Format, estimates: Estimates, *, beside: Sequence[Format] = ()) -> None:
        """All stages of a shape with drafts in one format; passes of drafts in others may be timed `beside` theirs."""
        name = f"{shape.name}, {format.name}"
        if (unsupported_reason := device_unsupported_reason(format, self.device)) is not None:
            self.budget.skip(name, unsupported_reason)
            return
        timed = [other for other in beside if device_unsupported_reason(other, self.device) is None]
        make = partial(self._bench, shape, format, [*timed, format])
        bench = self.budget.run(f"{name}: passes", estimates.passes, make, kind=f"passes of {shape.name}")
        if bench is None:
            return
        result = self._begin(bench)
        kind = f"agreement of {shape.name}"
        result["agreement"] = self.budget.run(f"{name}: agreement, unset", estimates.ends, bench.ends, kind=kind)
        for agreement in self.effort.agreements:
            self._cell(bench, result, f"agreement {agreement:g}", estimates, partial(cell_of, bench, agreement))
        least = min(self.effort.agreements)
        skipping = partial(cell_with_skips, bench, least)
        self._cell(bench, result, f"agreement {least:g} with skips", estimates, skipping)
        self.console.print(ceilings_table(result, self.effort.agreements))

    def _bench(self, shape: Shape, format: Format, timed: Sequence[Format]) -> Bench:
        """A bench, its passes timed; the copies of other formats are let go of."""
        self._free()
        subject = self._of(shape)
        bench = Bench(subject, format, self.effort)
        vocabulary = subject.model.config.vocab_size
        drafts = drafts_for(timed, subject.num_layers, vocabulary, self.effort.trimmed, subject.skip_set)
        draft_weights = bench.spec.runtime.views.draft_weights
        bench.passes = measure_passes(subject, drafts, draft_weights, self.effort)
        draft_weights.keep_only(bench.everything)
        self._free()
        return bench

    def _begin(self, bench: Bench) -> dict[str, Any]:
        """What is known when the passes are."""
        assert bench.passes is not None
        model, passes = bench.subject.model, bench.passes
        result: dict[str, Any] = {
            "shape": bench.subject.shape.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "format": bench.format.code,
            "bytes_a_pass_reads": weight_bytes(model, 1),
            "passes": passes.to_dict(),
            "ceilings": [
                ceiling(passes, draft, agreement).to_dict()
                for draft in passes.drafts
                for agreement in self.effort.agreements
            ],
            "cells": [],
        }
        self.found.append(result)
        self.console.print(target_table(result))
        self.console.print(drafts_table(result))
        return result

    def _cell(
        self, bench: Bench, result: dict[str, Any], what: str, estimates: Estimates, cell: Callable[[], Cell]
    ) -> None:
        name = f"{result['shape']}, {bench.format.name}: {what}"
        measured = self.budget.run(
            name, estimates.cell, lambda: measure_cell(bench, cell()), kind=f"cell of {result['shape']}"
        )
        if measured is not None:
            result["cells"].append(measured)
            self.console.print(cell_table(measured))

    def _of(self, shape: Shape) -> Subject:
        """The shape, built; the one before makes room first."""
        if self._subject is None or self._subject.shape is not shape:
            self._subject = None
            self._free()
            self._subject = Subject(shape, self.device, self.seed)
        return self._subject

    def _free(self) -> None:
        """Views and what they compiled know each other, and go only when somebody looks for such rings."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
