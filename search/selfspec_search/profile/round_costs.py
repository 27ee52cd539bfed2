"""Round costs: what the policy needs to know of lookup matches, and measured costs for other numbers of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.round_costs import MATCHES, PassLengths, RoundCosts, match_class
from selfspec.runtime.runtime import Runtime
from selfspec.utils.statistics import median_seconds
from selfspec_search.profile.timing import STEPS, TimedCalls
from selfspec_search.replay.lookup_table import LookupTable
from selfspec_search.replay.sampling_settings import Sampling
from selfspec_search.replay.texts import Text

CYCLES = 9
"""Cycles: the least number of times that every call is timed, in turn."""
BUDGET_SECONDS = 12.0
"""Seconds: more cycles may begin within this time, up to four times `CYCLES`."""
ROUND_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
"""Tokens: draft lengths whose rounds are measured, in addition to the longest. Other lengths are interpolated."""
PRIOR_SHARE = 0.5
"""Share: agreement of looked-up tokens before any is observed; the prior has the weight of one token."""


def match_shares(texts: Sequence[Text], table: LookupTable, depths: int) -> list[list[float]]:
    """Agreement of prompt lookup by length class of the match, for drafts of up to `depths` tokens.

    Each class has two shares: how often the first looked-up token is accepted, and how often a later token is accepted
    after an accepted prefix.
    """
    drafted, accepted = np.zeros((len(MATCHES), 2)), np.zeros((len(MATCHES), 2))
    for row, text in enumerate(texts):
        for start in range(text.written):
            if not (matched := int(table.matched[row, start])):
                continue
            at, run = match_class(matched), int(table.runs[row, start])
            failed = run < min(depths, text.written - start)
            drafted[at] += 1 if run or failed else 0, max(0, run - 1) + (failed and run > 0)
            accepted[at] += run > 0, max(0, run - 1)
    shares: list[list[float]] = ((accepted + PRIOR_SHARE) / (drafted + 1)).tolist()
    return shares


@dataclass(frozen=True, kw_only=True)
class BatchCostProbe:
    """Measures the round costs of a plan's draft for other numbers of rows, with `texts` in the cache."""

    model: PreTrainedModel
    draft_spec: DraftSpec
    texts: Sequence[Text]
    sampling: Sampling
    backend: str | None
    compile: bool | None
    pass_lengths: PassLengths | None

    @torch.inference_mode()
    def round_costs(self, known: RoundCosts, rows: int) -> RoundCosts:
        """The round costs `known`, with all seconds measured for `rows` rows."""
        longest = len(known.rounds) - 1
        runtime = Runtime(  # which pads passes only of the rows of `pass_lengths`, as in decoding
            self.model, self.draft_spec, backend=self.backend, compile=self.compile, pass_lengths=self.pass_lengths
        )
        prompts = self._prompts(rows)
        runtime.reserve(rows, prompts.shape[1] + 3 * (longest + STEPS) + 5)
        timed_calls = TimedCalls(prompts, self.sampling)
        lengths = sorted({n for n in ROUND_LENGTHS if n < longest} | {longest})
        calls = {f"round {n}": timed_calls.round(runtime, n) for n in lengths}
        calls["step"] = timed_calls.draft(runtime)
        if known.matches:
            calls["lookup"] = timed_calls.lookup(runtime, longest)
        timed = median_seconds(calls, self.model.device, repeats=CYCLES, budget=BUDGET_SECONDS)
        rounds = np.interp(range(longest + 1), lengths, [timed[f"round {n}"] / STEPS for n in lengths])
        changes = {
            "rows": rows,
            "draft_step": timed["step"] / STEPS,
            "rounds": np.maximum.accumulate(rounds).tolist(),
            "lookup": timed["lookup"] / STEPS if known.matches else 0.0,
        }
        return known.model_copy(update=changes)

    def _prompts(self, rows: int) -> Tensor:
        """Tokens `b t` of the texts; t - 1 is the average context while the texts are written."""
        length = int(np.mean([text.prompt + text.written / 2 for text in self.texts])) + 1
        joined = torch.cat([text.tokens.cpu() for text in self.texts])
        return joined.repeat(-(-rows * length // len(joined)))[: rows * length].view(rows, length)


def strip_trailing_zeros(agreement: Sequence[float]) -> list[float]:
    """Agreement up to the last depth that a text reached, at least one depth."""
    reached = [depth for depth, share in enumerate(agreement) if share > 0]
    return list(agreement[: max(reached, default=0) + 1]) or [0.0]
