"""Run: the stages, in the order of their importance."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gpu_bench.aims import judge_aims
from gpu_bench.budget import Budget, LeftOutError, Stage
from gpu_bench.ceilings import Ceilings, measure_ceilings
from gpu_bench.cells import Cell, CellBench
from gpu_bench.effort import REAL, TOY, Effort
from gpu_bench.peers import measure_peers
from gpu_bench.real import RealResult, measure_real, missing
from gpu_bench.searching import measure_search
from gpu_bench.shapes import LLAMA_8B, QWEN3_32B, TOY_LLAMA, TOY_QWEN3, Shape
from gpu_bench.subject import Subject
from gpu_bench.tables import aims_table, ceilings_table, cells_table, peers_table, search_table, stages_table
from selfspec import InputError
from selfspec.cli.bench import print_scores
from selfspec.cli.formatting import report_search

AIMED = 0.9
"""The agreement of the cell that has aims, and of the first cell at each number of rows and context."""
PEERS, SEARCH, REAL_MODEL = "Hugging Face's ways", "search", "mid-size model"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """What a run covers, and how many seconds its stages may take before one of their kind was measured.

    Args:
        main, other: the shape of most cells and the search; and one that is measured at its first sizes alone.
        sizes: rows and contexts, the most important first.
        real_dtype: of the trained model.
        estimates: seconds by kind of stage.
    """

    main: Shape
    other: Shape
    sizes: Sequence[tuple[int, int]]
    agreements: Sequence[float]
    real_dtype: str
    effort: Effort
    estimates: dict[str, float]


REAL_RUN = Extent(
    main=LLAMA_8B,
    other=QWEN3_32B,
    sizes=[(1, 512), (1, 4096), (16, 512), (64, 512), (4, 512), (1, 32768), (16, 4096), (4, 4096)],
    agreements=(0.9, 0.8, 0.7, 0.95),
    real_dtype="bfloat16",
    effort=REAL,
    estimates={"first cell": 90, "cell": 40, PEERS: 60, SEARCH: 150, REAL_MODEL: 120},
)
TOY_RUN = Extent(
    main=TOY_LLAMA,
    other=TOY_QWEN3,
    sizes=[(1, 17), (3, 13)],
    agreements=(0.9, 0.7),
    real_dtype="float32",
    effort=TOY,
    estimates={"first cell": 2, "cell": 1, PEERS: 1, SEARCH: 4, REAL_MODEL: 10},
)


@dataclass(kw_only=True)
class Run:
    """One run of the benchmark, and what it measured so far."""

    extent: Extent
    device: torch.device
    midsize: Path
    seed: int
    seconds: float
    console: Console
    ceilings: Ceilings | None = None
    cells: list[dict[str, Any]] = field(default_factory=list)
    peers: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    real: RealResult | None = None
    _subject: Subject | None = None

    def measure(self) -> dict[str, Any]:
        """All stages that the budget has room for; prints as it goes."""
        self.budget = Budget(seconds=self.seconds, tell=self._tell)
        main, other, (first, *rest) = self.extent.main, self.extent.other, self.extent.sizes
        self.ceilings = self.budget.run("ceilings", 0, lambda: measure_ceilings(self.device, self.extent.effort))
        if self.ceilings is None:  # the budget never leaves them out
            raise InputError(f"{self.device} has no ceilings: {self.budget.stages[-1].reason}")
        self.console.print(ceilings_table(self.ceilings))
        self._cell(main, first, AIMED, kind="first cell")
        self._peers(main, first)
        self._search(main)
        self._real()
        others = [agreement for agreement in self.extent.agreements if agreement != AIMED]
        for agreement in others:
            self._cell(main, first, agreement)
        for size in rest:
            self._cell(main, size, AIMED)
        for agreement in self.extent.agreements:
            self._cell(other, first, agreement, kind=f"cell of {other.name}")
        for size in rest:
            for agreement in others:
                self._cell(main, size, agreement)
        return self._result()

    # --- Stages ---

    def _cell(self, shape: Shape, size: tuple[int, int], agreement: float, kind: str = "cell") -> None:
        cell = Cell(shape=shape.name, rows=size[0], context=size[1], agreement=agreement)
        estimate = self.extent.estimates.get(kind, self.extent.estimates["first cell"])

        def work() -> dict[str, Any]:
            assert self.ceilings is not None
            return CellBench(self._of(shape), cell, self.extent.effort).measure(self.ceilings)

        if (measured := self.budget.run(str(cell), estimate, work, kind=kind)) is not None:
            self.cells.append(measured)

    def _peers(self, shape: Shape, size: tuple[int, int]) -> None:
        def work() -> dict[str, Any]:
            if not self.cells:
                raise LeftOutError("the cell that they are held against was not measured")
            ours = self.cells[0]["ours_tokens_per_second"]
            cell = Cell(shape=shape.name, rows=size[0], context=size[1], agreement=AIMED)
            return measure_peers(self._of(shape), cell, self.extent.effort, ours)

        self.peers = self.budget.run(PEERS, self.extent.estimates[PEERS], work)

    def _search(self, shape: Shape) -> None:
        def work() -> dict[str, Any]:
            return measure_search(self._of(shape), self.extent.effort, AIMED)

        self.search = self.budget.run(SEARCH, self.extent.estimates[SEARCH], work)

    def _real(self) -> None:
        if (reason := missing(self.midsize)) is not None:
            self.budget.skip(REAL_MODEL, reason)
            return

        def work() -> RealResult:
            effort, timeout = self.extent.effort, self.extent.estimates[REAL_MODEL] / 2
            return measure_real(self.midsize, self.device, self.extent.real_dtype, effort, timeout=timeout)

        self.real = self.budget.run(REAL_MODEL, self.extent.estimates[REAL_MODEL], work)

    def _of(self, shape: Shape) -> Subject:
        """The shape, built; the one before makes room first."""
        if self._subject is None or self._subject.shape is not shape:
            self._subject = None
            gc.collect()
            self._subject = Subject(shape, self.device, self.seed)
        return self._subject

    # --- What came of them ---

    def _tell(self, stage: Stage) -> None:
        reason = f": {stage.reason}" if stage.reason else ""
        self.console.print(f"{stage.name}: {stage.status}, {stage.seconds:.1f} s{reason}", highlight=False)

    def _result(self) -> dict[str, Any]:
        shape = self.extent.main.name
        aims = judge_aims(shape, self.cells, self.peers, self.search) if self.extent is REAL_RUN else []
        self._print(aims)
        return {
            "ceilings": self.ceilings.to_dict() if self.ceilings else None,
            "cells": self.cells,
            "peers": self.peers,
            "search": self.search,
            "midsize": self.real.to_dict if self.real else None,
            "aims": [aim.to_dict() for aim in aims],
            "stages": [stage.to_dict() for stage in self.budget.stages],
        }

    def _print(self, aims: Sequence[Any]) -> None:
        if self.cells:
            self.console.print(cells_table(self.cells))
        if self.peers:
            self.console.print(peers_table(self.peers))
        if self.search:
            self.console.print(search_table(self.search))
        if self.real:
            report_search(self.console, self.real.found)
            print_scores(self.console, self.real.scores)
        if aims:
            self.console.print(aims_table(self.extent.main.name, aims))
        self.console.print(stages_table(self.budget.stages))
