"""SublayerSet: attention and MLP sub-layers of a model. SkipSet: the sub-layers that the draft skips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from selfspec.errors import PlanError, excerpt

MOST_LAYERS = 1024
"""Layers: far more than any known model has. Bounds what a plan file can make its readers do."""


@dataclass(frozen=True)
class SublayerSet:
    """Attention and MLP sub-layers, by layer index."""

    attn: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()
    name = "sub-layer set"
    """The name of the set in error messages."""

    def __init__(self, attn: Iterable[int] = (), mlp: Iterable[int] = ()) -> None:
        object.__setattr__(self, "attn", self._layer_indices("attn", attn))
        object.__setattr__(self, "mlp", self._layer_indices("mlp", mlp))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        if not isinstance(data, Mapping) or not set(data) <= {"attn", "mlp"}:
            raise PlanError(
                f"a {cls.name} takes the keys 'attn' and 'mlp', each a list of layers, but {excerpt(data)} was given"
            )
        return cls(attn=data.get("attn", ()), mlp=data.get("mlp", ()))

    def to_dict(self) -> dict[str, list[int]]:
        return {"attn": sorted(self.attn), "mlp": sorted(self.mlp)}

    def validate(self, num_layers: int) -> None:
        """Raise `PlanError` if the set names a layer that a model of `num_layers` layers does not have."""
        for kind, layers in (("attn", self.attn), ("mlp", self.mlp)):
            outside = [layer for layer in sorted(layers) if layer >= num_layers]
            if outside:
                raise PlanError(
                    f"{self.name} names {kind} layer {outside[0]}, "
                    f"but this model has {num_layers} (0..{num_layers - 1})"
                )

    def __len__(self) -> int:
        """The number of sub-layers."""
        return len(self.attn) + len(self.mlp)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        yield from (("attn", layer) for layer in sorted(self.attn))
        yield from (("mlp", layer) for layer in sorted(self.mlp))

    def __str__(self) -> str:
        parts = [f"{kind} {_ranges(layers)}" for kind, layers in (("attn", self.attn), ("mlp", self.mlp)) if layers]
        return " | ".join(parts)

    @classmethod
    def _layer_indices(cls, kind: str, layers: Iterable[int]) -> frozenset[int]:
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise PlanError(f"{cls.name}: {kind} must be layer indices, but {excerpt(layers)} was given")
        indices = list(layers)
        for index in indices:
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < MOST_LAYERS:
                raise PlanError(
                    f"{cls.name}: {kind} holds {excerpt(index)}, but layers are integers from 0 to {MOST_LAYERS - 1}"
                )
        return frozenset(indices)


class SkipSet(SublayerSet):
    """Attention and MLP sub-layers to skip, by layer index.

    >>> str(SkipSet(attn={3, 4, 5, 9}, mlp={4}))
    'attn 3-5,9 | mlp 4'
    """

    name = "skip set"

    @classmethod
    def early_exit(cls, exit_layer: int, num_layers: int) -> SkipSet:
        """All sub-layers from layer `exit_layer` on: the draft runs only the first `exit_layer` layers."""
        if not 0 <= exit_layer <= num_layers:
            raise PlanError(f"exit layer is {exit_layer}, but this model has {num_layers} layers; give 0..{num_layers}")
        return cls(attn=range(exit_layer, num_layers), mlp=range(exit_layer, num_layers))

    def dropped_layers(self) -> frozenset[int]:
        """Layers with both sub-layers skipped: the draft drops these layers."""
        return self.attn & self.mlp

    def __str__(self) -> str:
        return super().__str__() or "nothing"


class QuantisedSet(SublayerSet):
    """Attention and MLP sub-layers whose linear layers the draft runs with quantised weights."""

    name = "quantised set"


def _ranges(layers: frozenset[int]) -> str:
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
