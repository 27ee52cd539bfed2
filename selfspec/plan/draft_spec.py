"""DraftSpec: what the draft is made of: kept, quantised and skipped sub-layers, and the head."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self, get_args

from selfspec.errors import PlanError, excerpt
from selfspec.plan.sublayers import QuantisedSet, SkipSet

FormatName = Literal["int8", "int4"]
GROUP_SIZES = (32, 64, 128, 256)
MOST_DRAFTED = 64
"""Tokens: the largest draft length of a plan."""
MOST_VOCABULARY = 2**20
"""Tokens: four times the largest known vocabulary. A compressed draft vocabulary is not read further."""


@dataclass(frozen=True)
class Format:
    """How quantised weights are stored.

    `int8` has one scale per output. `int4` has a scale and a zero for every `group_size` inputs of each output.

    >>> str(Format("int4", 64)), str(Format("int8"))
    ('int4 in groups of 64', 'int8')
    """

    name: FormatName
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(FormatName):
            raise PlanError(f"format is {excerpt(self.name)}, but it must be one of {', '.join(get_args(FormatName))}")
        if self.name == "int4" and (type(self.group_size) is not int or self.group_size not in GROUP_SIZES):
            raise PlanError(
                f"int4 needs a group_size of {', '.join(map(str, GROUP_SIZES))}, not {excerpt(self.group_size)}"
            )
        if self.name != "int4" and self.group_size is not None:
            given = excerpt(self.group_size)
            raise PlanError(f"{self.name} takes no group_size, but {given} was given; leave out group_size")

    @classmethod
    def parse(cls, code: str) -> Self:
        """The inverse of `code`."""
        name, _, group_size = code.partition("/")
        return cls(name, int(group_size) if group_size else None)  # type: ignore[arg-type]

    @property
    def code(self) -> str:
        """The format as one word, for studies and profiles: `int8`, `int4/32`."""
        return self.name if self.group_size is None else f"{self.name}/{self.group_size}"

    def __str__(self) -> str:
        return self.name if self.group_size is None else f"{self.name} in groups of {self.group_size}"


INT8, INT4 = Format("int8"), Format("int4", 32)


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """The sub-layers whose linear layers the draft runs with quantised weights, and whether the head is quantised."""

    format: Format
    sublayers: QuantisedSet = field(default_factory=QuantisedSet)
    head: bool = False

    @classmethod
    def everything(cls, format: Format, num_layers: int, *, skip_set: SkipSet | None = None) -> Quantised:
        """All sub-layers except those of a skip set, and the head."""
        skip_set, layers = skip_set or SkipSet(), set(range(num_layers))
        kept = QuantisedSet(attn=layers - skip_set.attn, mlp=layers - skip_set.mlp)
        return cls(format=format, sublayers=kept, head=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        known = {"format", "group_size", "attn", "mlp", "head"}
        if not isinstance(data, Mapping) or "format" not in data or not set(data) <= known:
            raise PlanError(
                f"quantised takes the keys {', '.join(sorted(known))} and needs format, but {excerpt(data)} was given"
            )
        if not isinstance(head := data.get("head", False), bool):
            raise PlanError(f"quantised: head must be true or false, but {excerpt(head)} was given")
        sublayers = QuantisedSet.from_dict({kind: data[kind] for kind in ("attn", "mlp") if kind in data})
        return cls(format=Format(data["format"], data.get("group_size")), sublayers=sublayers, head=head)

    def to_dict(self) -> dict[str, Any]:
        group = {} if self.format.group_size is None else {"group_size": self.format.group_size}
        return {"format": self.format.name, **group, **self.sublayers.to_dict(), "head": self.head}

    def __str__(self) -> str:
        parts = [str(self.sublayers)] if self.sublayers else []
        return f"{self.format}: {' | '.join([*parts, *(['head'] if self.head else [])]) or 'nothing'}"


@dataclass(frozen=True)
class SubVocabulary:
    """The tokens of a vocabulary that a trimmed head proposes.

    `code` is the form in plan files: one bit per token of the vocabulary, compressed with zlib, in base64.

    >>> SubVocabulary.of([5, 3, 8], 11).tokens
    (3, 5, 8)
    """

    code: str

    @classmethod
    def of(cls, tokens: Iterable[int], vocabulary: int) -> SubVocabulary:
        """The sub-vocabulary of `tokens`; raises `PlanError` if a token is not in `0..vocabulary - 1`."""
        bits = bytearray(-(-vocabulary // 8))
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise PlanError(
                    f"draft_vocabulary: token {token} was given, but the vocabulary has 0..{vocabulary - 1}"
                )
            bits[token // 8] |= 1 << token % 8
        return cls(base64.b64encode(zlib.compress(bytes(bits), 9)).decode())

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """The tokens in ascending order; raises `PlanError` if `code` cannot be decoded."""
        inflating = zlib.decompressobj()
        try:
            bits = inflating.decompress(base64.b64decode(self.code, validate=True), MOST_VOCABULARY // 8 + 1)
        except (binascii.Error, zlib.error, ValueError):
            raise PlanError("draft_vocabulary cannot be decoded: the text was cut or changed; search again") from None
        if len(bits) > MOST_VOCABULARY // 8:
            raise PlanError(f"draft_vocabulary has more than {MOST_VOCABULARY} tokens; search again")
        if not inflating.eof or inflating.unused_data:
            raise PlanError("draft_vocabulary cannot be decoded: the text was cut or changed; search again")
        return tuple(index * 8 + bit for index, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class DraftSpec:
    """What the draft is made of. A draft that only skips sub-layers needs no memory in addition to the model.

    >>> quantised = Quantised(format=INT8, sublayers=QuantisedSet(mlp={0, 1}))
    >>> str(DraftSpec(skip_set=SkipSet(attn={1}), quantised=quantised))
    'skip attn 1; int8: mlp 0-1'
    """

    skip_set: SkipSet = field(default_factory=SkipSet)
    quantised: Quantised | None = None
    vocabulary: SubVocabulary | None = None

    def __post_init__(self) -> None:
        if self.quantised is None:
            return
        for kind in ("attn", "mlp"):
            both = getattr(self.skip_set, kind) & getattr(self.quantised.sublayers, kind)
            if both:
                raise PlanError(f"{kind} layer {min(both)} is both skipped and quantised; choose one")

    @classmethod
    def of(cls, draft_spec: DraftSpec | SkipSet | None) -> DraftSpec:
        """The draft spec itself, or the draft spec of a skip set; None skips nothing."""
        return draft_spec if isinstance(draft_spec, DraftSpec) else cls(skip_set=draft_spec or SkipSet())

    def validate(self, num_layers: int) -> None:
        """Raise `PlanError` if the draft spec names a layer that a model of `num_layers` layers does not have."""
        self.skip_set.validate(num_layers)
        if self.quantised is not None:
            self.quantised.sublayers.validate(num_layers)

    @property
    def format(self) -> Format | None:
        """The format of the quantised layers; None if nothing is quantised."""
        return self.quantised.format if self.quantised else None

    @property
    def head_format(self) -> Format | None:
        """The format of the head; None if the head is not quantised."""
        return self.quantised.format if self.quantised and self.quantised.head else None

    @property
    def has_own_head(self) -> bool:
        """Whether the draft's head differs from the model's: quantised, trimmed, or both."""
        return self.vocabulary is not None or self.head_format is not None

    def choice(self, kind: str, layer: int) -> Literal["keep", "quantise", "skip"]:
        """What the draft does with a sub-layer."""
        if layer in getattr(self.skip_set, kind):
            return "skip"
        if self.quantised is not None and layer in getattr(self.quantised.sublayers, kind):
            return "quantise"
        return "keep"

    def strip(self, num_layers: int) -> str:
        """Two rows of blocks for the terminal, one column per layer: █ kept, ▒ quantised, ░ skipped.

        >>> print(DraftSpec(skip_set=SkipSet(attn={0, 2}, mlp={3})).strip(5))
        attn ░█░██
        mlp  ███░█
        """
        blocks = {"keep": "█", "quantise": "▒", "skip": "░"}
        rows = {kind: (blocks[self.choice(kind, layer)] for layer in range(num_layers)) for kind in ("attn", "mlp")}
        return "\n".join(f"{kind:4} {''.join(row)}" for kind, row in rows.items())

    def __str__(self) -> str:
        parts = [f"skip {self.skip_set}"]
        if self.quantised is not None:
            parts.append(str(self.quantised))
        if self.vocabulary is not None:
            parts.append(f"{len(self.vocabulary)} tokens")
        return "; ".join(parts)
