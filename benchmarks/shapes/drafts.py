"""Drafts: the draft specs whose passes are timed, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from selfspec import DraftSpec, Format, Quantised, SkipSet, SubVocabulary

FULL = "bf16"
"""The target's own weights: a draft that is never wrong, and saves nothing."""


def drafts_for(
    formats: Sequence[Format], num_layers: int, vocabulary: int, trimmed: int, skip_set: SkipSet
) -> dict[str, DraftSpec]:
    """In full precision and in each format: without and with the head, with a trimmed one, and with skips on top."""
    skipped = share_skipped(skip_set, num_layers)
    drafts = {FULL: DraftSpec(), f"{FULL}, {skipped}": DraftSpec(skip_set=skip_set)}
    for format in formats:
        drafts |= dict(_in_format(format, num_layers, vocabulary, trimmed))
        drafts[f"{with_head(format)}, {skipped}"] = with_skips(format, num_layers, skip_set)
    return drafts


def _in_format(format: Format, num_layers: int, vocabulary: int, trimmed: int) -> Iterator[tuple[str, DraftSpec]]:
    everything = Quantised.everything(format, num_layers)
    few = SubVocabulary.of(range(trimmed), vocabulary)  # a pass takes as long with any tokens
    yield format.name, DraftSpec(quantised=Quantised(format=format, sublayers=everything.sublayers))
    yield with_head(format), DraftSpec(quantised=everything)
    yield f"{format.name}, head of {trimmed:,} tokens", DraftSpec(quantised=everything, vocabulary=few)


def with_skips(format: Format, num_layers: int, skip_set: SkipSet) -> DraftSpec:
    """All in one format but what is skipped."""
    return DraftSpec(skip_set=skip_set, quantised=Quantised.everything(format, num_layers, skip_set=skip_set))


def with_head(format: Format) -> str:
    """The name of the draft that is quantised as a whole."""
    return f"{format.name} and head"


def share_skipped(skip_set: SkipSet, num_layers: int) -> str:
    """In words."""
    return f"{len(skip_set) / (2 * num_layers):.0%} skipped"
