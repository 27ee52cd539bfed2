"""Costs: seconds of draft steps and rounds at one context length, and their fit to timed steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.sublayers import SkipSet

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Record(BaseModel):
    """Numbers that a file holds exactly."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Savings(Record):
    """Seconds saved per draft step by quantising: one attention, one MLP, or the head. 0 or less if not faster.

    `vocabulary` is the saving from trimming the quantised head to almost no tokens.
    """

    attention: float
    mlp: float
    head: float
    vocabulary: float

    def of(self, kind: str) -> float:
        return self.attention if kind == "attn" else self.mlp


class Costs(Record):
    """Seconds for all rows together. A draft step drafts one token in every row; a round verifies, accepts and commits.

    `rounds[n]` is a round over n drafted tokens, whose target pass has n + 1 tokens. `rounds[0]` is a step of plain
    decoding. Passes are padded where padding is faster. A draft step with quantised layers is never padded, since their
    kernels are fastest with one token; `unpadded` is an unpadded full-precision step as a multiple of a padded step.
    `formats` holds, by code, the savings of each format that is faster here, relative to unpadded steps.
    `vocabulary_saved` is the saving from trimming a full-precision head to almost no tokens. `measured` holds the steps
    to which the costs were fitted.
    """

    num_layers: int
    fixed: Seconds  # of a step: embedding, head, kernel launches, and the Python loop
    layer: Seconds  # norms and additions of a layer with at least one sub-layer
    attention: Seconds
    mlp: Seconds
    rounds: tuple[Seconds, ...]
    prefill: Seconds  # of a prompt that is one token longer than the context
    lookup: Seconds = 0.0  # of prompt lookup, per round
    compiled: bool
    captured: bool = False  # whether passes are captured as CUDA graphs
    unpadded: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    vocabulary: Annotated[int, Field(ge=0)] = 0  # tokens of the whole head
    vocabulary_saved: float = 0.0
    formats: dict[str, Savings] = {}
    measured: dict[str, Seconds] = {}

    def draft_step(self, draft_spec: DraftSpec | SkipSet) -> float:
        """Seconds per drafted token; the draft spec's format must be one of `formats`."""
        draft_spec = DraftSpec.of(draft_spec)
        fitted = np.array([self.fixed, self.layer, self.attention, self.mlp])
        bare = float(counts_of(draft_spec.skip_set, self.num_layers) @ fitted)
        quantised, vocabulary = draft_spec.quantised, draft_spec.vocabulary
        trimmed = 1 - len(vocabulary) / self.vocabulary if vocabulary and self.vocabulary else 0.0
        if quantised is None:
            seconds = bare - trimmed * self.vocabulary_saved / self.unpadded
        else:
            savings, sublayers = self.formats[quantised.format.code], quantised.sublayers
            saved = len(sublayers.attn) * savings.attention + len(sublayers.mlp) * savings.mlp
            saved += savings.head + trimmed * savings.vocabulary if quantised.head else trimmed * self.vocabulary_saved
            seconds = bare * self.unpadded - saved
        return max(seconds, LEAST_STEP_SHARE * bare)

    def knows(self, draft_spec: DraftSpec) -> bool:
        """Whether the draft spec has a cost: its format is one of `formats`, or it quantises nothing."""
        return draft_spec.format is None or draft_spec.format.code in self.formats

    def saved(self, kind: str) -> float:
        """Seconds per step saved by skipping one more attention (`attn`) or MLP (`mlp`), with half a layer's norms."""
        return (self.attention if kind == "attn" else self.mlp) + self.layer / 2

    def round(self, drafted: NDArray[np.float64], gamma: int) -> NDArray[np.float64]:
        """Seconds of rounds over `drafted` tokens, which may be expectations; `gamma` is the most drafted tokens."""
        if self.compiled or self.captured:  # then every draft is padded to gamma tokens
            return np.full_like(drafted, self.rounds[gamma])
        return np.interp(drafted, np.arange(len(self.rounds)), self.rounds)

    def mixed(self, other: Costs, weight: float) -> Costs:
        """The weighted mean of two costs, with weight `weight` for `other`. `measured` is empty."""

        def mean(a: float, b: float) -> float:
            return a + (b - a) * weight

        names = ("fixed", "layer", "attention", "mlp", "prefill", "lookup")
        changed: dict[str, Any] = {name: mean(getattr(self, name), getattr(other, name)) for name in names}
        changed["rounds"] = tuple(mean(a, b) for a, b in zip(self.rounds, other.rounds, strict=True))
        return self.model_copy(update={**changed, "measured": {}})


LEAST_STEP_SHARE = 0.02
"""Share of a full-precision step: a draft step costs at least this much; larger savings are noise."""


def counts_of(skip_set: SkipSet, num_layers: int) -> NDArray[np.float64]:
    """How often a step pays each cost: fixed, layer, attention, MLP."""
    run = num_layers - len(skip_set.dropped_layers())
    return np.array([1, run, num_layers - len(skip_set.attn), num_layers - len(skip_set.mlp)], dtype=float)


def variants(num_layers: int) -> dict[str, SkipSet]:
    """Skip sets by name whose steps determine the cost of each kind of sub-layer."""
    layers = range(num_layers)
    return {
        "nothing": SkipSet(),
        "all but one layer in eight": SkipSet.early_exit(-(-num_layers // 8), num_layers),
        "one layer in two": SkipSet.early_exit(-(-num_layers // 2), num_layers),
        "all attention": SkipSet(attn=layers),
        "all MLPs": SkipSet(mlp=layers),
        "attention, one layer in two": SkipSet(attn=layers[::2]),
        "MLPs, one layer in two": SkipSet(mlp=layers[::2]),
    }


def fit_step(num_layers: int, steps: Mapping[str, float]) -> NDArray[np.float64]:
    """Costs (fixed, layer, attention, MLP) from the steps of `variants`, scaled to the full model's measured step."""
    counts = np.stack([counts_of(skip_set, num_layers) for skip_set in variants(num_layers).values()])
    costs = fit_costs(counts, np.array([steps[name] for name in variants(num_layers)]))
    return _scaled_to(costs, steps["nothing"], num_layers)


def at_another_context(fitted: NDArray[np.float64], step: float, num_layers: int) -> NDArray[np.float64]:
    """The costs at a context where the full model's step takes `step` seconds: only attention depends on the context.

    If `step` is shorter than all other costs together (noise, when attention is nearly free), all costs shrink.
    """
    costs = fitted.copy()
    rest = float(counts_of(SkipSet(), num_layers) @ (costs * np.array([1, 1, 0, 1])))
    costs[2] = max(0.0, step - rest) / num_layers
    return _scaled_to(costs, step, num_layers)


def _scaled_to(costs: NDArray[np.float64], step: float, num_layers: int) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = costs * (step / float(counts_of(SkipSet(), num_layers) @ costs))
    return scaled


def fit_costs(counts: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative costs with the least squared relative error, so that short drafts fit as well as long drafts."""
    weighted = counts / seconds[:, None]
    kept = np.ones(counts.shape[1], dtype=bool)
    costs = np.zeros(counts.shape[1])
    while kept.any():
        costs[:] = 0.0
        costs[kept] = np.linalg.lstsq(weighted[:, kept], np.ones(len(seconds)), rcond=None)[0]
        if (costs >= 0).all():
            break
        kept[costs.argmin()] = False
    return costs
