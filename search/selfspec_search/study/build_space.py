"""Offering: the space of a search, as far as this device gains from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from transformers import PreTrainedModel

from selfspec.errors import InputError
from selfspec.models.draft_weights import draft_weight_bytes, quantisable
from selfspec.plan.draft_spec import DraftSpec, Format, Quantised, SubVocabulary
from selfspec.plan.sublayers import QuantisedSet
from selfspec_search.profile.costs import Costs
from selfspec_search.profile.draft_costs import FORMATS, vocabulary_of
from selfspec_search.profile.profile import Profile
from selfspec_search.replay.texts import Text
from selfspec_search.settings import DraftName
from selfspec_search.space import OWN_HEAD, Head, Space

SHARES = (2, 4, 8)
"""Trimmed heads have one token in so many."""
ROUNDED = 128
"""To a multiple of so many tokens: kernels want round sizes."""
LEAST_GAIN = 0.02
"""Of a step, that a head must save to be offered."""


def formats_for(draft: DraftName) -> list[Format]:
    """The formats to measure."""
    return [] if draft == "skip" else list(FORMATS)


def most_copied(model: PreTrainedModel, formats: Sequence[Format]) -> int:
    """Bytes that a search with these formats takes for copies, at most."""
    layers = model.config.num_hidden_layers
    return sum(
        draft_weight_bytes(model, DraftSpec(quantised=Quantised.everything(format, layers))) for format in formats
    )


def space_of(model: PreTrainedModel, profile: Profile, texts: Sequence[Text], draft: DraftName) -> Space:
    """What there is to choose from: formats, kinds of sub-layers in each, and heads that save time here.

    Args:
        profile: of this device.
        texts: those of the calibration, whose frequent tokens a trimmed head keeps.
        draft: what drafts may do.

    Raises:
        InputError: the draft may only be quantised, and no format is faster here.
    """
    costs, layers = profile.at(profile.contexts[len(profile.contexts) // 2]), model.config.num_hidden_layers
    if draft == "skip":
        return Space(num_layers=layers)
    formats = {
        code: QuantisedSet(
            **{
                kind: getattr(quantisable(model, Format.parse(code)), kind)
                for kind in ("attn", "mlp")
                if costs.gains(code, kind) > 0
            }
        )
        for code in costs.formats
    }
    formats = {code: some for code, some in formats.items() if some or costs.formats[code].head > 0}
    if draft == "quantised" and not formats:
        raise InputError(f"no quantised draft is faster here ({slower(profile)}); search with --draft skip")
    heads = _heads(model, costs, texts) if formats else {OWN_HEAD: Head()}
    return Space(num_layers=layers, skips=draft != "quantised", formats=formats, heads=heads)


def slower(profile: Profile) -> str:
    """Why formats were left out, in words."""
    reasons = [f"{Format.parse(code)}: {reason}" for code, reason in profile.slower_formats.items()]
    return "; ".join(reasons) or "neither a sub-layer nor the head gains"


def _heads(model: PreTrainedModel, costs: Costs, texts: Sequence[Text]) -> dict[str, Head]:
    """The model's own, and those that save time: quantised, trimmed to frequent tokens, or both."""
    step, heads = costs.draft_step(DraftSpec()), {OWN_HEAD: Head()}
    quantised = any(savings.head > LEAST_GAIN * step for savings in costs.formats.values())
    if quantised:
        heads["quantised"] = Head(quantised=True)
    saved = max(savings.vocabulary for savings in costs.formats.values()) if quantised else costs.vocabulary_saved
    if saved > LEAST_GAIN * step:
        ranking, total = frequent_tokens(texts, vocabulary_of(model)), vocabulary_of(model)
        for share in SHARES:
            count = -(-total // share // ROUNDED) * ROUNDED
            if count < total:
                some = SubVocabulary.of(ranking[:count], total)
                name = f"{'quantised, ' if quantised else ''}{count} tokens"
                heads[name] = Head(quantised=quantised, vocabulary=some)
    return heads


def frequent_tokens(texts: Sequence[Text], vocabulary: int) -> list[int]:
    """All tokens, those first that are the most frequent in these texts; of equals the lower ones, which tokenizers
    give to the more frequent ones."""
    counts = Counter(chain.from_iterable(text.tokens.tolist() for text in texts))
    return sorted(range(vocabulary), key=lambda token: -counts[token])
