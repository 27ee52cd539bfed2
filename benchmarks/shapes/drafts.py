"""Drafts: the draft specs whose passes are timed, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from selfspec import DraftSpec, Format, Quantised, SkipSet, SubVocabulary

FULL = "bf16"
"""The draft with the target's own weights, which is always right and saves nothing."""


def drafts_for(
    formats: Sequence[Format], num_layers: int, vocabulary: int, trimmed: int, skip_set: SkipSet
) -> dict[str, DraftSpec]:
    """Drafts in full precision and in each format: without head, with head, with a trimmed head, and with skips."""
    skipped = share_skipped(skip_set, num_layers)
    drafts = {FULL: DraftSpec(), f"{FULL}, {skipped}": DraftSpec(skip_set=skip_set)}
    for format in formats:
        drafts |= dict(_in_format(format, num_layers, vocabulary, trimmed))
        drafts[f"{with_head(format)}, {skipped}"] = with_skips(format, num_layers, skip_set)
    return drafts


def _in_format(format: Format, num_layers: int, vocabulary: int, trimmed: int) -> Iterator[tuple[str, DraftSpec]]:
    everything = Quantised.everything(format, num_layers)
    few = SubVocabulary.of(range(trimmed), vocabulary)  # which tokens they are does not change the time
    yield format.name, DraftSpec(quantised=Quantised(format=format, sublayers=everything.sublayers))
    yield with_head(format), DraftSpec(quantised=everything)
    yield f"{format.name}, head of {trimmed:,} tokens", DraftSpec(quantised=everything, vocabulary=few)


def with_skips(format: Format, num_layers: int, skip_set: SkipSet) -> DraftSpec:
    """All sub-layers and the head in one format, but for the skipped sub-layers."""
    return DraftSpec(skip_set=skip_set, quantised=Quantised.everything(format, num_layers, skip_set=skip_set))


def with_head(format: Format) -> str:
    """The name of the draft whose sub-layers and head are quantised."""
    return f"{format.name} and head"


def share_skipped(skip_set: SkipSet, num_layers: int) -> str:
    """The skipped share in words, such as `45% skipped`."""
    return f"{len(skip_set) / (2 * num_layers):.0%} skipped"
