"""The run of `benchmarks/gpu.py`: its stages, in the order of their importance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from common.budget import Budget, LeftOutError
from common.tables import stages_table
from rich.console import Console

from selfspec import InputError
from shapes.ceilings import Ceilings, measure_ceilings
from shapes.effort import GPU, TOY, Effort
from shapes.peers import measure_peers
from shapes.searching import measure_search
from shapes.shape import LLAMA_8B, QWEN3_32B, TOY_LLAMA, TOY_QWEN3, Shape, in_float32
from shapes.skip_cells import Cell, CellBench
from shapes.subject import Subjects
from shapes.tables import ceilings_table, peers_table, search_table, skip_cells_table

FIRST_AGREEMENT = 0.9
"""The agreement of the first cell of each size."""
PEERS, SEARCH = "Hugging Face's decoders", "search"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The cells of a run, and the estimated seconds of its stages."""

    main: Shape  # of most cells, and of the search
    other: Shape  # measured at the first size only
    sizes: Sequence[tuple[int, int]]  # rows and context, the most important first
    agreements: Sequence[float]
    effort: Effort
    estimates: dict[str, float]  # seconds by kind of stage


REAL_RUN = Extent(
    main=LLAMA_8B,
    other=QWEN3_32B,
    sizes=[(1, 512), (1, 4096), (16, 512), (64, 512), (4, 512), (1, 32768), (16, 4096), (4, 4096)],
    agreements=(0.9, 0.8, 0.7, 0.95),
    effort=GPU,
    estimates={"first cell": 90, "cell": 40, PEERS: 60, SEARCH: 150},
)
TOY_RUN = Extent(
    main=in_float32(TOY_LLAMA),
    other=in_float32(TOY_QWEN3),
    sizes=[(1, 17), (3, 13)],
    agreements=(0.9, 0.7),
    effort=TOY,
    estimates={"first cell": 2, "cell": 1, PEERS: 1, SEARCH: 4},
)


@dataclass(kw_only=True)
class Run:
    """One run of the benchmark, and its figures so far."""

    extent: Extent
    device: torch.device
    seed: int
    seconds: float
    console: Console
    cells: list[dict[str, Any]] = field(default_factory=list)
    peers: dict[str, Any] | None = None
    search: dict[str, Any] | None = None

    def measure(self) -> dict[str, Any]:
        """Run all stages that fit into the budget, and print their tables."""
        self.budget = Budget(seconds=self.seconds, console=self.console)
        self.subjects = Subjects(self.device, self.seed)
        self.ceilings = self._ceilings()
        main, other, (first, *rest) = self.extent.main, self.extent.other, self.extent.sizes
        others = [agreement for agreement in self.extent.agreements if agreement != FIRST_AGREEMENT]
        self._cell(main, first, FIRST_AGREEMENT, kind="first cell")
        self._peers(main, first)
        self._search(main)
        for agreement in others:
            self._cell(main, first, agreement)
        for size in rest:
            self._cell(main, size, FIRST_AGREEMENT)
        for agreement in self.extent.agreements:
            self._cell(other, first, agreement, kind=f"cell of {other.name}")
        for size in rest:
            for agreement in others:
                self._cell(main, size, agreement)
        return self._result()

    def _ceilings(self) -> Ceilings:
        ceilings = self.budget.run("ceilings", 0, lambda: measure_ceilings(self.device, self.extent.effort))
        if ceilings is None:  # their estimate is 0, so they are never skipped
            raise InputError(f"{self.device} has no ceilings: {self.budget.stages[-1].reason}")
        self.console.print(ceilings_table(ceilings))
        return ceilings

    def _cell(self, shape: Shape, size: tuple[int, int], agreement: float, kind: str = "cell") -> None:
        cell = Cell(shape=shape.name, rows=size[0], context=size[1], agreement=agreement)
        estimate = self.extent.estimates.get(kind, self.extent.estimates["first cell"])

        def work() -> dict[str, Any]:
            return CellBench(self.subjects.of(shape), cell, self.extent.effort).measure(self.ceilings)

        if (measured := self.budget.run(str(cell), estimate, work, kind=kind)) is not None:
            self.cells.append(measured)

    def _peers(self, shape: Shape, size: tuple[int, int]) -> None:
        def work() -> dict[str, Any]:
            if not self.cells:
                raise LeftOutError("the cell to compare them with was not measured")
            ours = self.cells[0]["ours_tokens_per_second"]
            cell = Cell(shape=shape.name, rows=size[0], context=size[1], agreement=FIRST_AGREEMENT)
            return measure_peers(self.subjects.of(shape), cell, self.extent.effort, ours)

        self.peers = self.budget.run(PEERS, self.extent.estimates[PEERS], work)

    def _search(self, shape: Shape) -> None:
        def work() -> dict[str, Any]:
            return measure_search(self.subjects.of(shape), self.extent.effort, FIRST_AGREEMENT)

        self.search = self.budget.run(SEARCH, self.extent.estimates[SEARCH], work)

    def _result(self) -> dict[str, Any]:
        if self.cells:
            self.console.print(skip_cells_table(self.cells))
        if self.peers:
            self.console.print(peers_table(self.peers))
        if self.search:
            self.console.print(search_table(self.search))
        self.console.print(stages_table(self.budget.stages))
        return {
            "ceilings": asdict(self.ceilings),
            "cells": self.cells,
            "peers": self.peers,
            "search": self.search,
            "stages": self.budget.to_list(),
        }
