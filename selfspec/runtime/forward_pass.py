"""Pass: what one forward pass knows about the KV cache; Backend: what computes its attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from selfspec.models.attention_hook import AttentionArgs, AttentionNeeds, additive_mask, fold_mask


class Backend(Protocol):
    """Appends key and value `b hkv t d` to a layer's cache `b s hkv d`; attends with query `b h t d` to `b t h d`."""

    name: str
    masks: bool
    """Whether it asks the pass for masks."""

    @staticmethod
    def unsupported_reason(needs: AttentionNeeds) -> str | None:
        """Why this backend cannot serve, or None if it can."""

    @staticmethod
    def prepare(step: Pass) -> tuple[Tensor, ...]:
        """What it needs of the pass in every layer, beside masks."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, step: Pass, how: AttentionArgs
    ) -> Tensor: ...


@dataclass
class Pass:
    """One forward pass over `t` new tokens of every row: where they go, and what they see.

    `lengths` (int32, `b`) are the tokens cached before the pass. A token's slot is its position. `s` is how many slots
    the pass looks at. Lives for one pass; all that does not depend on the layer is made once.
    """

    lengths: Tensor  # b
    t: int
    s: int
    backend: Backend
    sees_all: bool = False  # the only token of the only row, which goes to the last of the `s` slots
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = torch.arange(self.t, device=self.lengths.device)
        self.positions = self.lengths.long()[:, None] + steps  # b t
        self.rows = torch.arange(self.lengths.shape[0], device=self.lengths.device)[:, None]  # b 1
        self.prepared = self.backend.prepare(self)

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
        return self.backend.attend(
            query,
            key,
            value,
            layer.selfspec_keys,  # type: ignore[arg-type]  # buffers that `KVCache.attach` registered
            layer.selfspec_values,  # type: ignore[arg-type]
            self,
            how,
        )

    def append(self, cached: Tensor, new: Tensor) -> None:
        """Write `new` (`b h t d`) to this pass's slots of one layer's cache (`b s h d`)."""
        cached.index_put_((self.rows, self.positions), new.transpose(1, 2))

    def mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor | None:
        """The additive mask `b 1 (g t) s` of causality, row lengths and the window; None if every slot is seen."""
        if self.sees_all and (window is None or self.s <= window):
            return None
        key = (window, groups)
        if key not in self._masks:
            self._masks[key] = fold_mask(additive_mask(self.visible(window), dtype), groups)
        return self._masks[key]

    def visible(self, window: int | None) -> Tensor:
        """Which slots each token sees, `b t s`."""
        positions = rearrange(self.positions, "b t -> b t 1")
        slots = torch.arange(self.s, device=positions.device)
        visible = slots <= positions
        return visible if window is None else visible & (slots > positions - window)

    def make_masks(self, windows_and_groups: Iterable[tuple[int | None, int]], dtype: torch.dtype) -> None:
        """Make the masks that the layers will ask for, if the backend has a use for masks."""
        if self.backend.masks:
            for window, groups in windows_and_groups:
                self.mask(window, groups, dtype)

    def starts(self, length: int) -> Tensor:
        """Cumulative starts of `b` stretches of `length`, as variable-length kernels want them: int32, `b + 1`."""
        return torch.arange(self.lengths.shape[0] + 1, device=self.lengths.device, dtype=torch.int32) * length
