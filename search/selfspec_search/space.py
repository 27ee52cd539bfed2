"""Space: the choices for every sub-layer and the head, the draft specs to start from, and changes of a draft spec."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from math import prod
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution

from selfspec.plan.draft_spec import DraftSpec, Format, Quantised, SubVocabulary
from selfspec.plan.sublayers import QuantisedSet, SkipSet

Sublayer = tuple[str, int]
Change = tuple[str, str, str]
"""A parameter, its value before, and its value after."""
KEEP, QUANTISE, SKIP = "keep", "quantise", "skip"
FORMAT, HEAD = "format", "head"
"""Names of the parameters that do not belong to a sub-layer."""
OWN_HEAD = "the model's own"
_OLD_CHOICES = {True: SKIP, False: KEEP}
"""Choices in old studies, which could only skip."""
MOST_EARLY_EXITS = 16
"""Early exits: the most that a search starts from, evenly spread over the layers."""


@dataclass(frozen=True)
class Head:
    """A head that the draft may have."""

    quantised: bool = False
    vocabulary: SubVocabulary | None = None


@dataclass(frozen=True, kw_only=True)
class Space:
    """All draft specs of a search."""

    num_layers: int
    skips: bool = True  # whether sub-layers may be skipped
    formats: Mapping[str, QuantisedSet] = field(default_factory=dict)  # by code, the sub-layers that are faster
    heads: Mapping[str, Head] = field(default_factory=lambda: {OWN_HEAD: Head()})  # that the draft may have, by name

    @property
    def choices(self) -> dict[str, list[str]]:
        """The choices by parameter. Format and head are parameters only if there is more than one choice."""
        chosen = [KEEP, *([QUANTISE] if any(self.formats.values()) else []), *([SKIP] if self.skips else [])]
        every = {sublayer_name(sublayer): chosen for sublayer in sublayers(self.num_layers)}
        every |= {FORMAT: list(self.formats)} if len(self.formats) > 1 else {}
        return every | ({HEAD: list(self.heads)} if len(self.heads) > 1 else {})

    @property
    def distributions(self) -> dict[str, CategoricalDistribution]:
        """The distributions of an Optuna trial's parameters."""
        return {name: CategoricalDistribution(choices) for name, choices in self.choices.items()}

    @property
    def size(self) -> int:
        """The number of combinations of choices."""
        return prod(len(choices) for choices in self.choices.values())

    def to_params(self, draft_spec: DraftSpec | SkipSet) -> dict[str, str]:
        """A draft spec as parameters of an Optuna trial; choices that the space does not offer become `keep`."""
        draft_spec = DraftSpec.of(draft_spec)
        code = draft_spec.format.code if draft_spec.format is not None else None
        code = code if code in self.formats else next(iter(self.formats), None)
        offered = self.choices
        params = {sublayer_name(sublayer): draft_spec.choice(*sublayer) for sublayer in sublayers(self.num_layers)}
        found = {name: choice if choice in offered[name] else KEEP for name, choice in params.items()}
        if FORMAT in offered:
            found[FORMAT] = str(code)
        if HEAD in offered:
            mine = Head(draft_spec.quantised is not None and draft_spec.quantised.head, draft_spec.vocabulary)
            found[HEAD] = next((name for name, head in self.heads.items() if head == mine), OWN_HEAD)
        return found

    def from_params(self, params: Mapping[str, Any]) -> DraftSpec:
        """The inverse of `to_params`. Sub-layers that are not faster in the format are kept instead of quantised."""
        code = params.get(FORMAT, next(iter(self.formats), None))
        head = self.heads[params.get(HEAD, OWN_HEAD)]
        by_choice: dict[str, dict[str, list[int]]] = {c: {"attn": [], "mlp": []} for c in (KEEP, QUANTISE, SKIP)}
        for kind, layer in sublayers(self.num_layers):
            choice = params[sublayer_name((kind, layer))]
            by_choice[_OLD_CHOICES.get(choice, choice)][kind].append(layer)
        skip_set = SkipSet(**by_choice[SKIP])
        if code is None:
            return DraftSpec(skip_set=skip_set, vocabulary=head.vocabulary)
        gain, asked = self.formats[code], by_choice[QUANTISE]
        faster = QuantisedSet(attn=gain.attn & {*asked["attn"]}, mlp=gain.mlp & {*asked["mlp"]})
        quantised = None
        if faster or head.quantised:
            quantised = Quantised(format=Format.parse(code), sublayers=faster, head=head.quantised)
        return DraftSpec(skip_set=skip_set, quantised=quantised, vocabulary=head.vocabulary)

    def nearest(self, draft_spec: DraftSpec | SkipSet) -> DraftSpec:
        """The draft spec with choices that the space does not offer replaced by `keep`."""
        return self.from_params(self.to_params(draft_spec))

    def suggest(self, trial: optuna.Trial) -> DraftSpec:
        """Let an Optuna trial choose a draft spec."""
        return self.from_params({name: trial.suggest_categorical(name, c) for name, c in self.choices.items()})

    def every(self) -> Iterator[DraftSpec]:
        """All draft specs of a small space, those with the fewest changes first."""
        names = list(self.choices)
        combined = list(product(*self.choices.values()))
        combined.sort(key=lambda values: sum(value != KEEP for value in values))
        return (self.from_params(dict(zip(names, values, strict=True))) for values in combined)

    # --- Where to start ---

    def quantised(self, code: str, skip_set: SkipSet | None = None, head: Head | None = None) -> DraftSpec:
        """A draft spec that quantises every sub-layer that is faster in the format and not skipped, with a head."""
        gain, skipped = self.formats[code], skip_set or SkipSet()
        head = head or next((head for head in self.heads.values() if head.quantised), Head())
        kept = QuantisedSet(attn=gain.attn - skipped.attn, mlp=gain.mlp - skipped.mlp)
        quantised = Quantised(format=Format.parse(code), sublayers=kept, head=head.quantised)
        return self.nearest(DraftSpec(skip_set=skipped, quantised=quantised, vocabulary=head.vocabulary))

    def seeds(self) -> Iterator[DraftSpec]:
        """Draft specs that are good for some models: everything quantised, with each head; then skip sets."""
        for code in self.formats:
            yield self.quantised(code)
        for head in self.heads.values():
            yield from (self.quantised(code, None, head) for code in self.formats)
        if self.skips:
            yield from (DraftSpec(skip_set=skip_set) for skip_set in seeds(self.num_layers))

    # --- Changes of a draft spec ---

    def changes(self, draft_spec: DraftSpec) -> list[Change]:
        """All changes of one parameter."""
        now = self.to_params(draft_spec)
        return [(name, now[name], other) for name, some in self.choices.items() for other in some if other != now[name]]

    def changed(self, draft_spec: DraftSpec, *changes: Change) -> DraftSpec:
        """The draft spec with these parameters changed."""
        return self.from_params(self.to_params(draft_spec) | {name: after for name, _, after in changes})

    # --- On file ---

    def to_bytes(self) -> bytes:
        """JSON for a study's storage, so that all workers and later readers use the same space."""
        heads = {
            name: {"quantised": head.quantised, "vocabulary": head.vocabulary and head.vocabulary.code}
            for name, head in self.heads.items()
        }
        formats = {code: sublayers.to_dict() for code, sublayers in self.formats.items()}
        data = {"num_layers": self.num_layers, "skips": self.skips, "formats": formats, "heads": heads}
        return json.dumps(data).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Space:
        """The inverse of `to_bytes`."""
        read = json.loads(data)
        heads = {
            name: Head(head["quantised"], SubVocabulary(head["vocabulary"]) if head["vocabulary"] else None)
            for name, head in read["heads"].items()
        }
        formats = {code: QuantisedSet.from_dict(sublayers) for code, sublayers in read["formats"].items()}
        return cls(num_layers=read["num_layers"], skips=read["skips"], formats=formats, heads=heads)


def sublayers(num_layers: int) -> list[Sublayer]:
    """All 2L sub-layers in the order of the forward pass."""
    return [(kind, layer) for layer in range(num_layers) for kind in ("attn", "mlp")]


def skip_set_of(skipped: Sequence[Sublayer] | set[Sublayer]) -> SkipSet:
    return SkipSet(**{kind: [layer for k, layer in skipped if k == kind] for kind in ("attn", "mlp")})


def seeds(num_layers: int) -> Iterator[SkipSet]:
    """Skip sets that are good for some models: strided, middle blocks, attention only, early exits."""
    layers = range(num_layers)
    yield SkipSet(attn=layers[1::2], mlp=layers[1::2])
    yield SkipSet(attn=layers[1:-1:3], mlp=layers[1:-1:3])
    for share in (4, 3):  # the middle half, the middle third
        middle = layers[num_layers // share : num_layers - num_layers // share]
        yield SkipSet(attn=middle, mlp=middle)
    yield SkipSet(attn=layers[1:-1])
    yield SkipSet(attn=layers[1::2])
    count = min(num_layers - 1, MOST_EARLY_EXITS)
    for step in range(1, count + 1):
        yield SkipSet.early_exit(max(1, step * num_layers // (count + 1)), num_layers)


def nested(order: Sequence[Sublayer], eighths: Sequence[int] = (4, 5, 3, 6, 2, 7)) -> Iterator[SkipSet]:
    """Skip sets of the first sub-layers in `order`; `eighths` says how many eighths of all sub-layers."""
    for count in eighths:
        yield skip_set_of(list(islice(order, len(order) * count // 8)))


def sublayer_name(sublayer: Sublayer) -> str:
    return f"{sublayer[0]}_{sublayer[1]}"
