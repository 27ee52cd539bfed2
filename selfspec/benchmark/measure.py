"""Measure contenders on the same prompts: greedy decoding, interleaved in one run.

Each repeat decodes every prompt with every contender in rotating order. Changes of clocks or heat thus affect all
contenders. A contender's speed uses the median repeat of each prompt. A ratio's 95 % interval comes from a paired
bootstrap over the prompts and over the repeats of each prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfspec.benchmark.contenders import GENERATE, PADDED, PLAIN, Contender, timed
from selfspec.benchmark.lossless import Verdict, compare
from selfspec.decoding.stats import Stats
from selfspec.errors import InputError
from selfspec.runtime.runtime import Runtime
from selfspec.utils.statistics import Array, Ratio, interleaved, speed, speed_ratio

Progress = Callable[[int, int], None]
"""Called with (decodings done, number of decodings)."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The figures of one contender."""

    name: str
    settings: dict[str, Any]
    tokens_per_second: float
    ratios: dict[str, Ratio]
    """By name of the other contender: the baseline, and `model.generate`."""
    differing: Verdict
    """Against plain decoding, unpadded."""
    stats: Stats | None = None

    def to_dict(self) -> dict[str, Any]:
        stats = self.stats if self.stats is not None and self.stats.rounds else None
        return {
            "name": self.name,
            "settings": self.settings,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "ratios": {name: ratio.to_dict() for name, ratio in self.ratios.items()},
            "differing_tokens": self.differing.differing_tokens,
            "near_ties": self.differing.near_ties,
            "errors": self.differing.errors,
            "acceptance_rate": round(stats.acceptance_rate, 4) if stats else None,
            "tokens_per_round": round(stats.tokens_per_round, 4) if stats else None,
            "policy": stats.policy if stats else None,
            "choices": stats.choices if stats else None,
            "accepted_at": stats.accepted_at if stats else None,
            "reached_at": stats.reached_at if stats else None,
        }


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Seconds and tokens of every decoding, by contender, repeat and prompt."""

    contenders: list[Contender]
    prompts: list[Tensor]
    seconds: Array  # contenders repeats prompts
    outputs: list[list[Tensor]]  # by contender and prompt, of the first repeat
    unsteady: list[str]
    """Contenders whose tokens differed between repeats, which greedy decoding rules out."""

    @property
    def tokens(self) -> Array:
        """The number of new tokens, `contenders prompts`."""
        return np.array([[len(output) for output in outputs] for outputs in self.outputs], dtype=float)

    def index(self, name: str) -> int:
        return [contender.name for contender in self.contenders].index(name)

    def tokens_per_second(self, name: str) -> float:
        """The speed of the median repeat of each prompt, over all prompts together."""
        at = self.index(name)
        return float(speed(self.seconds[at], self.tokens[at]))

    def ratio(self, name: str, base: str, *, seed: int = 0) -> Ratio:
        """The speed of `name` over the speed of `base`, with a 95 % interval (see the module's docstring)."""
        both = [self.index(name), self.index(base)]
        return speed_ratio(self.seconds[both], self.tokens[both], seed=seed)

    @property
    def baseline(self) -> str:
        """The name of the faster plain decoding, unpadded or padded: every speedup over plain decoding is over it."""
        plain = [contender.name for contender in self.contenders if contender.name in (PLAIN, PADDED)]
        return max(plain, key=self.tokens_per_second)

    def scores(self, runtime: Runtime, *, gamma: int) -> list[Score]:
        """The score of each contender, with the ratios to the baseline and to `model.generate`."""
        bases = [self.baseline, *(one.name for one in self.contenders if one.name == GENERATE)]
        reference = self.outputs[self.index(PLAIN)]
        return [
            Score(
                name=contender.name,
                settings=contender.settings,
                tokens_per_second=self.tokens_per_second(contender.name),
                ratios={base: self.ratio(contender.name, base) for base in bases},
                differing=compare(runtime, zip(self.prompts, reference, outputs, strict=True), gamma=gamma),
                stats=contender.stats,
            )
            for contender, outputs in zip(self.contenders, self.outputs, strict=True)
        ]


def measure(
    contenders: Sequence[Contender],
    prompts: Sequence[Tensor],
    *,
    new_tokens: int,
    repeats: int,
    on_progress: Progress | None = None,
) -> Measurement:
    """Decode every prompt with every contender `repeats` times, interleaved, after one untimed decoding per contender.

    Raises:
        InputError: there is no prompt, no new token or no repeat.
    """
    if not prompts or new_tokens < 1 or repeats < 1:
        raise InputError("a benchmark needs at least one prompt, one new token and one repeat")
    for contender in contenders:
        # The longest prompt gives caches their final size and compiles passes before any timing.
        contender.decode(max(prompts, key=len), new_tokens)
        if contender.stats is not None:
            contender.stats = Stats()
    outputs: dict[tuple[int, int], Tensor] = {}
    unsteady: set[str] = set()
    done = count(1)

    def decode(index: int, column: int) -> float:
        new, seconds = timed(contenders[index], prompts[column], new_tokens)
        if not torch.equal(outputs.setdefault((index, column), new), new):
            unsteady.add(contenders[index].name)
        if on_progress is not None:
            on_progress(next(done), len(contenders) * repeats * len(prompts))
        return seconds

    places = [(index, column) for column in range(len(prompts)) for index in range(len(contenders))]
    tasks = {place: partial(decode, *place) for place in places}
    times = interleaved(tasks, repeats=repeats, warmup=0, group=len(contenders))
    rows = [[(index, column) for column in range(len(prompts))] for index in range(len(contenders))]
    return Measurement(
        contenders=list(contenders),
        prompts=list(prompts),
        seconds=np.array([[times[place] for place in row] for row in rows]).swapaxes(1, 2),
        outputs=[[outputs[place] for place in row] for row in rows],
        unsteady=sorted(unsteady),
    )
