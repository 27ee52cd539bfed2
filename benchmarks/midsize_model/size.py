"""Size: of the model, its corpus and its training."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

from selfspec.demo.recipe import LAYERSKIP, Recipe


@dataclass(frozen=True, kw_only=True)
class Size:
    """The settings in which a real and a toy training differ."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    vocabulary: int
    megabytes: float  # of source text, at most
    tokenizer_megabytes: float  # of source text that trains the tokenizer
    rows: int  # of a step
    length: int  # tokens of a row
    packages: bool  # whether to read installed packages too
    compiled: bool  # whether sub-layers are compiled
    windows: int  # held-out windows of 1024 tokens that evaluate the model
    recipe: Recipe

    @property
    def roots(self) -> list[Path]:
        """The folders of this machine's Python sources."""
        names = ["stdlib", "purelib"] if self.packages else ["stdlib"]
        return [Path(sysconfig.get_paths()[name]) for name in names]


REAL = Size(
    layers=28,
    width=576,
    mlp_width=1536,
    heads=9,
    kv_heads=3,
    vocabulary=16384,
    megabytes=200.0,
    tokenizer_megabytes=30.0,
    rows=32,
    length=1024,
    packages=True,
    compiled=True,
    windows=64,
    recipe=replace(
        LAYERSKIP,
        name="midsize",
        steps=10_000,
        adam_rate=0.002,  # its embedding starts smaller than the demo's
        exit_layers=(3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9, 10, 12, 14, 17, 20, 24),
    ),
)
"""About 108 million parameters. The recipe's steps are ticks of a clock: see `training.py`."""

TOY = replace(
    REAL,
    layers=13,  # the demo's evaluation looks at exits after up to 12
    width=48,
    mlp_width=96,
    heads=3,
    kv_heads=1,
    vocabulary=512,
    megabytes=0.5,
    tokenizer_megabytes=0.2,
    rows=4,
    length=64,
    packages=False,
    compiled=False,
    windows=2,
    recipe=replace(LAYERSKIP, name="toy", steps=10_000, exit_layers=(2, 3, 5)),
)
