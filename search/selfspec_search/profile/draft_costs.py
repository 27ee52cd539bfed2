"""What quantised copies and trimmed heads save a step of the draft, as far as they are faster here at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from selfspec.models.draft_weights import quantisable
from selfspec.models.quantised_linear import device_unsupported_reason
from selfspec.plan.draft_spec import INT4, INT8, DraftSpec, Format, Quantised, SubVocabulary
from selfspec.plan.sublayers import QuantisedSet
from selfspec.runtime.runtime import Runtime
from selfspec.utils.statistics import median_seconds
from selfspec_search.profile.costs import Savings
from selfspec_search.profile.timing import Bench

Timed = Mapping[str, float]
LEAST_GAIN = 0.05
"""A draft that is quantised as a whole must be faster by so much, relatively, for its format to be looked into."""
CYCLES = 5
TRIMMED = 4
"""Heads are timed with one token in so many."""
UNPADDED, TRIMMED_HEAD = "nothing, unpadded", "a quarter of the head"
"""Variants that have nothing to do with a format."""


FORMATS = (INT8, INT4)
"""The formats that a search considers."""


def draft_weights_that_gain(
    full: Runtime, bench: Bench, formats: Sequence[Format], runtime_of: Callable[[DraftSpec], Runtime]
) -> tuple[list[Format], dict[str, str]]:
    """The formats in which the whole draft is faster than in full precision; and why the others are not looked at."""
    gaining, slower = list[Format](), dict[str, str]()
    for format in formats:
        if (unsupported_reason := _unsupported_reason(full.model, format)) is not None:
            slower[format.code] = unsupported_reason
            continue
        quantised = runtime_of(DraftSpec(quantised=_everything(full.model, format)))
        quantised.adopt_cache(full)
        calls = {"full": bench.draft(full), "quantised": bench.draft(quantised)}
        seconds = median_seconds(calls, full.model.device, repeats=CYCLES)
        if seconds["quantised"] < seconds["full"] * (1 - LEAST_GAIN):
            gaining.append(format)
        else:
            slower[format.code] = f"{seconds['quantised'] / seconds['full']:.2f} of the time of full precision"
            full.views.draft_weights.drop(format)
    return gaining, slower


def _unsupported_reason(model: PreTrainedModel, format: Format) -> str | None:
    if (unsupported_reason := device_unsupported_reason(format, model.device)) is not None:
        return unsupported_reason
    return None if quantisable(model, format) else "no linear layer of this model fits it"


def _everything(model: PreTrainedModel, format: Format) -> Quantised:
    return Quantised(format=format, sublayers=quantisable(model, format), head=True)


def copied_variants(model: PreTrainedModel, formats: Sequence[Format]) -> dict[str, DraftSpec]:
    """Drafts by whose steps the savings of each format are told apart; none where no format gains."""
    if not formats:
        return {}
    some = SubVocabulary.of(range(0, vocabulary_of(model), TRIMMED), vocabulary_of(model))
    found = {UNPADDED: DraftSpec(), TRIMMED_HEAD: DraftSpec(vocabulary=some)}
    for format in formats:
        every = quantisable(model, format)
        attention, mlp = QuantisedSet(attn=every.attn), QuantisedSet(mlp=every.mlp)
        found |= {
            f"{format.code} attention": DraftSpec(quantised=Quantised(format=format, sublayers=attention)),
            f"{format.code} MLPs": DraftSpec(quantised=Quantised(format=format, sublayers=mlp)),
            f"{format.code} head": DraftSpec(quantised=Quantised(format=format, head=True)),
            f"{format.code} everything": DraftSpec(quantised=_everything(model, format)),
            f"{format.code} everything, a quarter of the head": DraftSpec(
                quantised=_everything(model, format), vocabulary=some
            ),
        }
    return found


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many tokens the head gives logits for."""
    return int(model.get_output_embeddings().weight.shape[0])


def fit_draft_weights(model: PreTrainedModel, formats: Sequence[Format], steps: Timed) -> dict[str, Any]:
    """Fields of `Costs`, from the steps of `copied_variants` and that of the full draft, `nothing`.

    Savings of a format are scaled to add up to what its draft as a whole saves, as it was timed.
    """
    if not formats:
        return {}
    whole, all_but_few = steps[UNPADDED], TRIMMED / (TRIMMED - 1)
    found = {}
    for format in formats:
        every, name = quantisable(model, format), format.code
        everything = steps[f"{name} everything"]
        attention, mlp, head = (whole - steps[f"{name} {part}"] for part in ("attention", "MLPs", "head"))
        scale = (whole - everything) / (attention + mlp + head) if attention + mlp + head > 0 else 1.0
        found[name] = Savings(
            attention=scale * attention / max(1, len(every.attn)),
            mlp=scale * mlp / max(1, len(every.mlp)),
            head=scale * head,
            vocabulary=(everything - steps[f"{name} everything, a quarter of the head"]) * all_but_few,
        )
    return {
        "unpadded": max(1.0, whole / steps["nothing"]),
        "vocabulary": vocabulary_of(model),
        "vocabulary_saved": (whole - steps[TRIMMED_HEAD]) * all_but_few,
        "formats": found,
    }
