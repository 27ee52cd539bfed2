"""Bits: the agreement of rounded, skipping and trimmed drafts of the embedded model, in float32."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common.prompts import embedded, texts_of
from rich.console import Console
from selfspec_search.profile.draft_costs import vocabulary_of
from selfspec_search.replay.replay import Replay
from selfspec_search.space import Sublayer
from selfspec_search.study.build_space import TRIMMED_HEAD_DIVISORS as TRIMMED
from selfspec_search.study.build_space import frequent_tokens

from selfspec import DraftSpec, Quantised, SkipSet, SubVocabulary
from selfspec.huggingface.loading import Loaded, load
from selfspec.models.draft_weights import DraftWeights
from selfspec.plan.draft_spec import INT4, INT8
from selfspec.runtime.runtime import Runtime
from shapes.quantised_run import at_least
from shapes.replayed import GAMMA, Rightness, by_sensitivity, least_important, rightness
from shapes.rounding import BITS, OVERHEAD, RoundedCopies, read_share
from shapes.tables import rightness_table

SKIP_SHARES = (0, 1 / 8, 1 / 4, 3 / 8, 1 / 2)
INT4_BITS, INT8_BITS = 4 + OVERHEAD, 8.0
"""Bits of a weight, with its share of scales and zeros for int4."""
CALIBRATION_PER_PROMPT = 2
"""Calibration texts for each held-out text."""
SENSITIVITY_TEXTS = 8
"""Texts: the calibration texts that order sub-layers by their importance."""
PROMPTS, TOY_PROMPTS = 32, 3
NEW_TOKENS, TOY_TOKENS = 128, 23


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one draft."""

    name: str
    bits: float | None  # of a weight that is not skipped; None if nothing is quantised
    skipped: float  # share of the sub-layers
    read: float  # bytes that a draft pass reads, as a share of the model's bytes in 16 bits
    right: Rightness

    def to_dict(self) -> dict[str, Any]:
        return {
            "draft": self.name,
            "bits": self.bits,
            "skipped": self.skipped,
            "read": round(self.read, 4),
            **self.right.to_dict(),
        }


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure on held-out texts; calibration texts choose the skipped sub-layers and the head's tokens."""
    at_least("prompts", options.prompts, 1)
    at_least("new_tokens", options.new_tokens, GAMMA + 1)
    count = options.prompts or (TOY_PROMPTS if options.toy else PROMPTS)
    new_tokens = options.new_tokens or (TOY_TOKENS if options.toy else NEW_TOKENS)
    subject = Embedded(load("demo", device="cpu", dtype="float32"), count, new_tokens)
    found = {part: [row.to_dict() for row in getattr(subject, f"by_{part}")()] for part in TITLES}
    for part, rows in found.items():
        console.print(rightness_table(TITLES[part], rows))
    return {"gamma": GAMMA, "texts": count, **found}


TITLES = {
    "bits": "everything rounded, nothing skipped",
    "skips": "nothing rounded, the least important sub-layers skipped",
    "both": "the same sub-layers skipped, all others and the head in int4",
    "trimmed": "nothing rounded or skipped, a head of the most frequent tokens (their share of the texts)",
}


class Embedded:
    """The embedded model and its texts."""

    def __init__(self, loaded: Loaded, count: int, new_tokens: int) -> None:
        self.model = loaded.model
        self.num_layers: int = self.model.config.num_hidden_layers
        calibration, held_out = embedded(loaded, new_tokens)
        runtime = Runtime(self.model)
        self.calibration = texts_of(runtime, calibration[: CALIBRATION_PER_PROMPT * count], new_tokens)
        self.replay = Replay(self.model, texts_of(runtime, held_out[:count], new_tokens), GAMMA)
        few = self.calibration[:: -(-len(self.calibration) // SENSITIVITY_TEXTS)]
        self.order: Sequence[Sublayer] = by_sensitivity(Replay(self.model, few, GAMMA))

    def by_bits(self) -> Iterator[Row]:
        """All sub-layers and the head, rounded to the nearest in groups, and in the formats that have kernels."""
        everything = DraftSpec(quantised=Quantised.everything(INT4, self.num_layers))
        for bits in BITS:
            draft_weights = RoundedCopies(self.model, bits)
            yield self._row(
                f"{bits} bits, to the nearest", everything, bits=bits + OVERHEAD, draft_weights=draft_weights
            )
        yield self._row("int4, steps fitted (ours)", everything, bits=INT4_BITS)
        every_byte = DraftSpec(quantised=Quantised.everything(INT8, self.num_layers))
        yield self._row("int8, by output (ours)", every_byte, bits=INT8_BITS)

    def by_skips(self) -> Iterator[Row]:
        for share, skip_set in self._skip_sets():
            yield self._row(f"{share:.1%} skipped", DraftSpec(skip_set=skip_set))

    def by_both(self) -> Iterator[Row]:
        for share, skip_set in self._skip_sets():
            quantised = Quantised.everything(INT4, self.num_layers, skip_set=skip_set)
            draft_spec = DraftSpec(skip_set=skip_set, quantised=quantised)
            yield self._row(f"int4, {share:.1%} skipped", draft_spec, bits=INT4_BITS)

    def by_trimmed(self) -> Iterator[Row]:
        """A head of the most frequent tokens of the calibration texts."""
        vocabulary = vocabulary_of(self.model)
        ranking = frequent_tokens(self.calibration, vocabulary)
        for share in (1, *TRIMMED):
            few = SubVocabulary.of(ranking[: vocabulary // share], vocabulary) if share > 1 else None
            covered = self._covered(ranking[: vocabulary // share])
            yield self._row(f"{vocabulary // share:,} tokens ({covered:.1%})", DraftSpec(vocabulary=few))

    def _skip_sets(self) -> Iterator[tuple[float, SkipSet]]:
        for share in SKIP_SHARES:
            yield share, least_important(self.order, share)

    def _covered(self, tokens: Sequence[int]) -> float:
        """The share of the held-out texts' written tokens that are among `tokens`."""
        written = torch.cat([text.tokens[text.prompt :] for text in self.replay.texts])
        return float(torch.isin(written, torch.tensor(tokens)).float().mean())

    def _row(
        self, name: str, draft_spec: DraftSpec, *, bits: float | None = None, draft_weights: DraftWeights | None = None
    ) -> Row:
        return Row(
            name=name,
            bits=bits,
            skipped=len(draft_spec.skip_set) / (2 * self.num_layers),
            read=read_share(self.model, draft_spec, bits),
            right=rightness(self.replay, draft_spec, draft_weights),
        )
