"""Round costs: what a policy is told of drafts of every kind, at this search's prices and at those of other batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.plan import MATCHES, PassLengths, RoundCosts, match_class
from selfspec.plan.draft_spec import DraftSpec
from selfspec.runtime.runtime import Runtime
from selfspec.utils.statistics import median_seconds
from selfspec_search.profile.timing import STEPS, Bench
from selfspec_search.replay.lookup_table import LookupTable
from selfspec_search.replay.sampling_settings import Sampling
from selfspec_search.replay.texts import Text

CYCLES = 9
"""How often everything is measured, in turn, at least."""
SECONDS = 12.0
"""... and for how long, where four times as many cycles take no longer."""
LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
"""Drafted tokens of the rounds that are measured, and the longest of all; in between, costs lie in between."""
NOTHING_SEEN = 0.5
"""A share that calibration texts say nothing of, and the weight of that: one token's."""


def match_shares(texts: Sequence[Text], table: LookupTable, depths: int) -> list[list[float]]:
    """By the length class of the match: how often the first looked-up token is right, and how often a later one where
    all before it were, for drafts of up to `depths` tokens."""
    seen = np.zeros((len(MATCHES), 2))
    right = np.zeros((len(MATCHES), 2))
    for row, text in enumerate(texts):
        for start in range(text.written):
            if not (matched := int(table.matched[row, start])):
                continue
            at, run = match_class(matched), int(table.runs[row, start])
            failed = run < min(depths, text.written - start)
            seen[at] += 1 if run or failed else 0, max(0, run - 1) + (failed and run > 0)
            right[at] += run > 0, max(0, run - 1)
    shares: list[list[float]] = ((right + NOTHING_SEEN) / (seen + 1)).tolist()
    return shares


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What round costs for other numbers of rows are measured with: the plan's draft, on texts like these."""

    model: PreTrainedModel
    draft_spec: DraftSpec
    texts: Sequence[Text]
    sampling: Sampling
    backend: str | None
    compile: bool | None
    pass_lengths: PassLengths | None

    @torch.inference_mode()
    def round_costs(self, known: RoundCosts, rows: int) -> RoundCosts:
        """The same round costs at the prices of so many rows, measured here and now."""
        longest = len(known.rounds) - 1
        padded = None
        if self.pass_lengths is not None:  # what is faster padded may not be so with other numbers of rows
            padded = self.pass_lengths.model_copy(update={"rows": rows, "target": []})
        runtime = Runtime(self.model, self.draft_spec, backend=self.backend, compile=self.compile, pass_lengths=padded)
        prompts = self._prompts(rows)
        runtime.reserve(rows, prompts.shape[1] + 3 * (longest + STEPS) + 5)
        bench = Bench(prompts, self.sampling)
        lengths = sorted({n for n in LENGTHS if n < longest} | {longest})
        calls = {f"round {n}": bench.round(runtime, n) for n in lengths}
        calls["step"] = bench.draft(runtime)
        if known.matches:
            calls["lookup"] = bench.lookup(runtime, longest)
        timed = median_seconds(calls, self.model.device, repeats=CYCLES, budget=SECONDS)
        rounds = np.interp(range(longest + 1), lengths, [timed[f"round {n}"] / STEPS for n in lengths])
        changes = {
            "rows": rows,
            "draft_step": timed["step"] / STEPS,
            "rounds": np.maximum.accumulate(rounds).tolist(),
            "lookup": timed["lookup"] / STEPS if known.matches else 0.0,
        }
        return known.model_copy(update=changes)

    def _prompts(self, rows: int) -> Tensor:
        """Tokens `b t` that stand in the cache: as many as texts have on average while they are written."""
        context = int(np.mean([text.prompt + text.written / 2 for text in self.texts]))
        joined = torch.cat([text.tokens.cpu() for text in self.texts])
        draft_weights = -(-rows * (context + 1) // len(joined))
        return joined.repeat(draft_weights)[: rows * (context + 1)].view(rows, -1)


def seen(agreement: Sequence[float]) -> list[float]:
    """Without the zeros at the end, of depths that no text reached: nothing is known of them."""
    reached: NDArray[np.int64] = np.flatnonzero(np.asarray(agreement) > 0)
    return list(agreement[: (int(reached[-1]) if len(reached) else 0) + 1]) or [0.0]
