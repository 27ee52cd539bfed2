"""Draft costs: what draft weights (quantised layers, trimmed heads) save in a draft step, if they are faster here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from selfspec.models.draft_weights import quantisable
from selfspec.models.quantised_linear import device_unsupported_reason
from selfspec.plan.draft_spec import INT4, INT8, DraftSpec, Format, Quantised, SubVocabulary
from selfspec.plan.sublayers import QuantisedSet
from selfspec.runtime.runtime import Runtime
from selfspec.utils.statistics import median_seconds
from selfspec_search.profile.costs import Costs, Savings
from selfspec_search.profile.timing import TimedCalls

FORMATS = (INT8, INT4)
"""The formats that a search considers."""
LEAST_FORMAT_GAIN = 0.05
"""Share of a draft step: a fully quantised draft must be faster by this much, or the format is not measured further."""
CYCLES = 5
"""Cycles: how often the full and the quantised draft are timed, in turn."""
TIMED_HEAD_DIVISOR = 4
"""Divisor of the vocabulary: the timed trimmed head has a quarter of the tokens."""
UNPADDED, TRIMMED_HEAD = "nothing, unpadded", "a quarter of the head"
"""Names of the variants without a format."""


def faster_formats(
    full: Runtime, timed_calls: TimedCalls, formats: Sequence[Format], runtime_of: Callable[[DraftSpec], Runtime]
) -> tuple[list[Format], dict[str, str]]:
    """The formats in which the fully quantised draft is faster than full precision; for others, by code, the reason."""
    model, faster, slower = full.model, list[Format](), dict[str, str]()
    for format in formats:
        unsupported_reason = device_unsupported_reason(format, model.device)
        if unsupported_reason is None and not quantisable(model, format):
            unsupported_reason = "no linear layer of this model fits it"
        if unsupported_reason is not None:
            slower[format.code] = unsupported_reason
            continue
        quantised = runtime_of(DraftSpec(quantised=_everything(model, format)))
        quantised.adopt_cache(full)
        calls = {"full": timed_calls.draft(full), "quantised": timed_calls.draft(quantised)}
        seconds = median_seconds(calls, model.device, repeats=CYCLES)
        if seconds["quantised"] < seconds["full"] * (1 - LEAST_FORMAT_GAIN):
            faster.append(format)
        else:
            slower[format.code] = f"{seconds['quantised'] / seconds['full']:.2f} of the time of full precision"
            full.views.draft_weights.drop(format)
    return faster, slower


def _everything(model: PreTrainedModel, format: Format) -> Quantised:
    return Quantised(format=format, sublayers=quantisable(model, format), head=True)


def quantised_variants(model: PreTrainedModel, formats: Sequence[Format]) -> dict[str, DraftSpec]:
    """Draft specs by name whose steps determine the savings of each format; none without formats."""
    if not formats:
        return {}
    quarter = SubVocabulary.of(range(0, vocabulary_of(model), TIMED_HEAD_DIVISOR), vocabulary_of(model))
    found = {UNPADDED: DraftSpec(), TRIMMED_HEAD: DraftSpec(vocabulary=quarter)}
    for format in formats:
        every, everything = quantisable(model, format), _everything(model, format)
        parts = {
            "attention": Quantised(format=format, sublayers=QuantisedSet(attn=every.attn)),
            "MLPs": Quantised(format=format, sublayers=QuantisedSet(mlp=every.mlp)),
            "head": Quantised(format=format, head=True),
            "everything": everything,
        }
        found |= {f"{format.code} {part}": DraftSpec(quantised=quantised) for part, quantised in parts.items()}
        found[f"{format.code} everything, {TRIMMED_HEAD}"] = DraftSpec(quantised=everything, vocabulary=quarter)
    return found


def vocabulary_of(model: PreTrainedModel) -> int:
    """Tokens of the head: the size of its logits."""
    return int(model.get_output_embeddings().weight.shape[0])


def fit_draft_weights(
    model: PreTrainedModel, formats: Sequence[Format], steps: Mapping[str, float], costs: Costs
) -> dict[str, Any]:
    """Fields of `Costs`, from seconds of the steps of `quantised_variants` and of the full draft, `nothing`.

    The savings of a format sum to the measured saving of the fully quantised draft. No saving is negative, and none is
    larger than the cost of the part that the draft weights replace: the sub-layers' by `costs`, which were fitted to
    steps at full precision; the head's by the trimmed head, whose step differs in the head alone.
    """
    if not formats:
        return {}
    whole, to_whole_head = steps[UNPADDED], TIMED_HEAD_DIVISOR / (TIMED_HEAD_DIVISOR - 1)
    unpadded = max(1.0, whole / steps["nothing"])
    head = float(np.clip((whole - steps[TRIMMED_HEAD]) * to_whole_head, 0.0, unpadded * costs.fixed))
    found = {}
    for format in formats:
        every, name = quantisable(model, format), format.code
        attention, mlp = len(every.attn), len(every.mlp)
        limits = np.array([attention * unpadded * costs.attention, mlp * unpadded * costs.mlp, head])
        measured = np.array([whole - steps[f"{name} {part}"] for part in ("attention", "MLPs", "head")])
        everything = steps[f"{name} everything"]
        saved = _with_sum(np.clip(measured, 0.0, limits), limits, whole - everything)
        trimmed = (everything - steps[f"{name} everything, {TRIMMED_HEAD}"]) * to_whole_head
        found[name] = Savings(
            attention=saved[0] / max(1, attention),
            mlp=saved[1] / max(1, mlp),
            head=saved[2],
            vocabulary=np.clip(trimmed, 0.0, head - saved[2]),
        )
    return {"unpadded": unpadded, "vocabulary": vocabulary_of(model), "vocabulary_saved": head, "formats": found}


def _with_sum(saved: NDArray[np.float64], limits: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    """Savings from 0 to `limits` whose sum is `total`, or as near to `total` as the limits allow.

    Larger savings shrink in proportion. Smaller savings grow in proportion to what is left below their limits.
    """
    total, so_far = float(np.clip(total, 0.0, limits.sum())), float(saved.sum())
    changing = saved if total <= so_far else limits - saved
    changed: NDArray[np.float64] = saved + changing * ((total - so_far) / max(changing.sum(), 1e-12))
    return changed
