"""Build the space of a search: the choices that can make a draft faster on this device."""

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
from selfspec_search.profile.draft_costs import vocabulary_of
from selfspec_search.profile.profile import Profile
from selfspec_search.replay.texts import Text
from selfspec_search.settings import DraftName
from selfspec_search.space import OWN_HEAD, Head, Space

TRIMMED_HEAD_DIVISORS = (2, 4, 8)
"""Divisors of the vocabulary: trimmed heads have a half, a quarter or an eighth of the tokens."""
HEAD_SIZE_MULTIPLE = 128
"""Tokens: the size of a trimmed head is a multiple of this, which kernels need for speed."""
LEAST_HEAD_GAIN = 0.02
"""Share of a draft step: a head is offered only if it saves this much."""


def most_draft_weight_bytes(model: PreTrainedModel, formats: Sequence[Format]) -> int:
    """The most bytes of draft weights that a search with these formats takes."""
    layers = model.config.num_hidden_layers
    every = [DraftSpec(quantised=Quantised.everything(format, layers)) for format in formats]
    return sum(draft_weight_bytes(model, draft_spec) for draft_spec in every)


def build_space(model: PreTrainedModel, profile: Profile, texts: Sequence[Text], draft: DraftName) -> Space:
    """The space of formats, of kinds of sub-layers in each format, and of heads, as far as they are faster here.

    Args:
        profile: of this device.
        texts: the calibration texts, whose frequent tokens a trimmed head keeps.
        draft: what drafts may do.

    Raises:
        InputError: drafts may only quantise, and no format is faster here.
    """
    costs, layers = profile.at(profile.contexts[len(profile.contexts) // 2]), model.config.num_hidden_layers
    if draft == "skip":
        return Space(num_layers=layers)
    formats = {}
    for code, savings in costs.formats.items():
        every = quantisable(model, Format.parse(code))
        faster = QuantisedSet(**{kind: getattr(every, kind) for kind in ("attn", "mlp") if savings.of(kind) > 0})
        if faster or savings.head > 0:
            formats[code] = faster
    if draft == "quantised" and not formats:
        raise InputError(f"no quantised draft is faster here ({slower(profile)}); search with --draft skip")
    heads = _heads(model, costs, texts) if formats else {OWN_HEAD: Head()}
    return Space(num_layers=layers, skips=draft != "quantised", formats=formats, heads=heads)


def slower(profile: Profile) -> str:
    """Why formats are not offered, in words."""
    reasons = [f"{Format.parse(code)}: {reason}" for code, reason in profile.slower_formats.items()]
    return "; ".join(reasons) or "neither a sub-layer nor the head gains"


def _heads(model: PreTrainedModel, costs: Costs, texts: Sequence[Text]) -> dict[str, Head]:
    """The model's own head, and heads that save time: quantised, trimmed to frequent tokens, or both."""
    least, heads = LEAST_HEAD_GAIN * costs.draft_step(DraftSpec()), {OWN_HEAD: Head()}
    quantised = any(savings.head > least for savings in costs.formats.values())
    if quantised:
        heads["quantised"] = Head(quantised=True)
    saved = max(savings.vocabulary for savings in costs.formats.values()) if quantised else costs.vocabulary_saved
    if saved > least:
        total = vocabulary_of(model)
        ranking = frequent_tokens(texts, total)
        for divisor in TRIMMED_HEAD_DIVISORS:
            count = -(-total // divisor // HEAD_SIZE_MULTIPLE) * HEAD_SIZE_MULTIPLE
            if count < total:
                name = f"{'quantised, ' if quantised else ''}{count} tokens"
                heads[name] = Head(quantised=quantised, vocabulary=SubVocabulary.of(ranking[:count], total))
    return heads


def frequent_tokens(texts: Sequence[Text], vocabulary: int) -> list[int]:
    """All tokens, the most frequent in the texts first. Of equally frequent tokens, the lower id comes first:
    tokenizers give lower ids to more frequent tokens."""
    counts = Counter(chain.from_iterable(text.tokens.tolist() for text in texts))
    return sorted(range(vocabulary), key=lambda token: -counts[token])
