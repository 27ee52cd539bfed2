"""Words: figures, settings and ways of drafting as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.lookup import PromptLookup

MISSING = "—"


def times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}"


def plain_number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def interval(ends: Sequence[float]) -> str:
    """The interval of a speedup, as text."""
    return f"{times(min(ends))}\u00a0to\u00a0{times(max(ends))}" if ends else MISSING


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def in_words(value: Any) -> str:
    """Any JSON value on one line: nested mappings and lists as 'key value, key value'."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_words(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(in_words(item) for item in value) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else "none" if value is None else str(value)


def lookup_in_words(lookup: PromptLookup) -> str:
    return f"{lookup.min_ngram} to {lookup.max_ngram} tokens, {lookup.gamma} drafted"


def drafting(
    draft_spec: DraftSpec, num_layers: int, *, gamma: int | None, threshold: float | None = None, lookup: str | None
) -> str:
    """How a plan or a trial drafts. Skipped sub-layers are counted, not listed."""
    parts = [f"lookup of {lookup}"] if lookup else []
    if gamma != 0:
        skipped = skipped_of(draft_spec, num_layers) if draft_spec.skip_set else "nothing"
        length = "" if gamma is None else f"; gamma {gamma}"
        exits = "" if gamma is None or threshold is None else f", exit below {threshold:.3f}"
        parts.append(f"skip {skipped}{draft_weights_of(draft_spec)}{length}{exits}")
    return "; on a miss ".join(parts)


def skipped_of(draft_spec: DraftSpec, num_layers: int) -> str:
    attn, mlp = len(draft_spec.skip_set.attn), len(draft_spec.skip_set.mlp)
    return f"{attn} of {num_layers} attention and {mlp} of {num_layers} MLP sub-layers"


def draft_weights_of(draft_spec: DraftSpec) -> str:
    """The draft weights, as the end of a sentence; empty for a draft that only skips."""
    text, quantised = "", draft_spec.quantised
    if quantised is not None:
        named = [f"{len(quantised.sublayers)} sub-layers"] * bool(quantised.sublayers) + ["the head"] * quantised.head
        text += f"; {' and '.join(named)} {'run' if quantised.sublayers else 'runs'} in {quantised.format}"
    return text + (f"; it proposes {len(draft_spec.vocabulary)} tokens" if draft_spec.vocabulary is not None else "")


def listed(draft_spec: DraftSpec) -> str:
    """All sub-layers of the draft spec, with spaces where a line may break."""
    return str(draft_spec).removeprefix("skip ").replace(",", ", ")
