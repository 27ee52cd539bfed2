"""Costs: what a step of the draft and a round cost at one context length, and how they follow from timed steps."""

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
    """Numbers that are written to a file and read back as they were."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Savings(Record):
    """Seconds that quantised copies save a step of the draft: of an attention, of an MLP, of the head, and of all of a
    quantised head's tokens but a vanishing few. Below zero where a copy is the slower one."""

    attention: float
    mlp: float
    head: float
    vocabulary: float

    def of(self, kind: str) -> float:
        return self.attention if kind == "attn" else self.mlp


class Costs(Record):
    """Seconds, of all rows together. A step of the draft is one token drafted in every row; a round is what comes on
    top: verify, accept, commit.

    `rounds[n]` is a round over n drafted tokens, a pass over n + 1; `rounds[0]` is all that plain decoding does for a
    token. Passes are padded where that is faster; a step that runs quantised copies is not, since their kernels are at
    their best with one token, and `unpadded` is what it costs without any, in padded ones. `formats` holds savings on
    such steps, by the format's code, for each format that is faster here; `vocabulary_saved` what leaving out the
    head's tokens saves where it is not quantised. `measured` holds steps that all this was fitted to, for the record.
    """

    num_layers: int
    fixed: Seconds  # embedding, head, launch, and the loop's own work
    layer: Seconds  # norms and additions of a layer that is run at all
    attention: Seconds
    mlp: Seconds
    rounds: tuple[Seconds, ...]
    prefill: Seconds  # of a prompt that is one token longer than the context
    lookup: Seconds = 0.0  # per round, of prompt lookup where that comes before the draft
    compiled: bool
    captured: bool = False  # as CUDA graphs
    unpadded: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    vocabulary: Annotated[int, Field(ge=0)] = 0  # tokens of the whole head
    vocabulary_saved: float = 0.0
    formats: dict[str, Savings] = {}
    measured: dict[str, Seconds] = {}

    def draft_step(self, draft_spec: DraftSpec | SkipSet) -> float:
        """Seconds per drafted token of a draft by this draft spec; its format must be one of `formats`."""
        draft_spec = DraftSpec.of(draft_spec)
        bare = float(counts_of(draft_spec.skip_set, self.num_layers) @ self._fitted)
        return max(bare * self._lengthened(draft_spec) - self._saved_by_draft_weights(draft_spec), LEAST * bare)

    def _lengthened(self, draft_spec: DraftSpec) -> float:
        return self.unpadded if draft_spec.quantised is not None else 1.0

    def _saved_by_draft_weights(self, draft_spec: DraftSpec) -> float:
        left_out = (
            1 - len(draft_spec.vocabulary) / self.vocabulary if draft_spec.vocabulary and self.vocabulary else 0.0
        )
        if draft_spec.quantised is None:
            return left_out * self.vocabulary_saved / self.unpadded
        savings, sublayers = self.formats[draft_spec.quantised.format.code], draft_spec.quantised.sublayers
        saved = len(sublayers.attn) * savings.attention + len(sublayers.mlp) * savings.mlp
        if draft_spec.quantised.head:
            return saved + savings.head + left_out * savings.vocabulary
        return saved + left_out * self.vocabulary_saved

    def knows(self, draft_spec: DraftSpec) -> bool:
        """Whether the draft spec's format was measured, and is faster than none."""
        return draft_spec.format is None or draft_spec.format.code in self.formats

    def saved(self, kind: str) -> float:
        """Seconds that skipping one more attention (`attn`) or MLP (`mlp`) saves a step; half a layer with it."""
        return (self.attention if kind == "attn" else self.mlp) + self.layer / 2

    def round(self, drafted: NDArray[np.float64], gamma: int) -> NDArray[np.float64]:
        """Seconds of rounds over so many drafted tokens, of `gamma` at most; they may be expectations."""
        if self.compiled or self.captured:  # which pads every draft to one length
            return np.full_like(drafted, self.rounds[gamma])
        return np.interp(drafted, np.arange(len(self.rounds)), self.rounds)

    def gains(self, code: str, kind: str) -> float:
        """Seconds that a quantised copy of one more sub-layer saves a step."""
        return self.formats[code].of(kind)

    def mixed(self, other: Costs, weight: float) -> Costs:
        """A weighted mean of two, `weight` being that of the other. It was not measured, and does not say so."""
        changed: dict[str, Any] = {name: _mean(getattr(self, name), getattr(other, name), weight) for name in _SINGLE}
        changed["rounds"] = tuple(_mean(a, b, weight) for a, b in zip(self.rounds, other.rounds, strict=True))
        return self.model_copy(update={**changed, "measured": {}})

    @property
    def _fitted(self) -> NDArray[np.float64]:
        return np.array([self.fixed, self.layer, self.attention, self.mlp])


LEAST = 0.02
"""Of a step in full precision, the least that savings leave of it: beyond, they are noise."""
_SINGLE = ("fixed", "layer", "attention", "mlp", "prefill", "lookup")


def _mean(one: float, other: float, weight: float) -> float:
    return one + (other - one) * weight


def counts_of(skip_set: SkipSet, num_layers: int) -> NDArray[np.float64]:
    """How often each cost falls due in a step: fixed, layers, attentions, MLPs."""
    run = num_layers - len(skip_set.dropped_layers())
    return np.array([1, run, num_layers - len(skip_set.attn), num_layers - len(skip_set.mlp)], dtype=float)


def variants(num_layers: int) -> dict[str, SkipSet]:
    """Drafts that differ in what they skip, so that their costs tell the sub-layers' apart."""
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
    """Fixed, layer, attention and MLP from the steps of `variants`, scaled so that the full model's sum equals its
    measured step."""
    counts = np.stack([counts_of(skip_set, num_layers) for skip_set in variants(num_layers).values()])
    costs = fit_costs(counts, np.array([steps[name] for name in variants(num_layers)]))
    return _scaled_to(costs, steps["nothing"], num_layers)


def at_another_context(fitted: NDArray[np.float64], step: float, num_layers: int) -> NDArray[np.float64]:
    """The same costs where the full model's step took `step` instead: only attention depends on the context.

    Where the step is shorter than all the rest (noise, where attention is nearly free), everything shrinks with it.
    """
    costs = fitted.copy()
    rest = float(counts_of(SkipSet(), num_layers) @ (costs * np.array([1, 1, 0, 1])))
    costs[2] = max(0.0, step - rest) / num_layers
    return _scaled_to(costs, step, num_layers)


def _scaled_to(costs: NDArray[np.float64], step: float, num_layers: int) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = costs * (step / float(counts_of(SkipSet(), num_layers) @ costs))
    return scaled


def fit_costs(counts: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Costs that are not negative, of the least squared relative error: a short draft's step must be right, too."""
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
