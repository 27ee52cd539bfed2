"""Pass: one forward pass's positions and masks in the KV cache. Backend: computes a pass's attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from selfspec.models.attention_hook import AttentionArgs, AttentionNeeds, additive_mask, fold_mask


class Backend(ABC):
    """An attention backend: appends a pass's keys and values to one layer's cache, and attends to the cache."""

    name: ClassVar[str]
    uses_masks: ClassVar[bool] = False

    @staticmethod
    def unsupported_reason(needs: AttentionNeeds) -> str | None:
        """Why this backend cannot serve a model, or None if it can."""
        return None

    @staticmethod
    def prepare(step: Pass) -> tuple[Tensor, ...]:
        """Tensors other than masks that every layer of a pass uses."""
        return ()

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, step: Pass, args: AttentionArgs
    ) -> Tensor:
        """Append `key` and `value` (`b hkv t d`) to `keys` and `values` (`b s hkv d`), and attend with `query`
        (`b h t d`). Returns `b t h d`."""


@dataclass
class Pass:
    """One forward pass over `t` new tokens of every row: the slots of the tokens, and the slots that each token sees.

    A token's slot is its position. A `Pass` lives for one forward pass and builds once what all layers share.

    Attributes:
        lengths: int32 `b`, tokens cached before the pass.
        t: new tokens of every row.
        s: slots that the pass looks at.
        sees_all: whether the pass is one token of one row, in the last of the `s` slots.
    """

    lengths: Tensor  # b
    t: int
    s: int
    backend: Backend
    sees_all: bool = False
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = torch.arange(self.t, device=self.lengths.device)
        self.positions = self.lengths.long()[:, None] + steps  # b t
        self.rows = torch.arange(self.lengths.shape[0], device=self.lengths.device)[:, None]  # b 1
        self.prepared = self.backend.prepare(self)

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, args: AttentionArgs) -> Tensor:
        keys, values = layer.selfspec_keys, layer.selfspec_values  # buffers that `KVCache.attach` registered
        return self.backend.attend(query, key, value, keys, values, self, args)  # type: ignore[arg-type]

    def append(self, cached: Tensor, new: Tensor) -> None:
        """Write `new` (`b h t d`) to this pass's slots of one layer's cache (`b s h d`)."""
        cached.index_put_((self.rows, self.positions), new.transpose(1, 2))

    def mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor | None:
        """The additive mask `b 1 (g t) s` of causality, row lengths and window; None if every token sees all slots."""
        if self.sees_all and (window is None or self.s <= window):
            return None
        key = (window, groups)
        if key not in self._masks:
            self._masks[key] = fold_mask(additive_mask(self.visible(window), dtype), groups)
        return self._masks[key]

    def visible(self, window: int | None) -> Tensor:
        """The slots that each token sees, `b t s`."""
        positions = rearrange(self.positions, "b t -> b t 1")
        slots = torch.arange(self.s, device=positions.device)
        visible = slots <= positions
        return visible if window is None else visible & (slots > positions - window)

    def make_masks(self, windows_and_groups: Iterable[tuple[int | None, int]], dtype: torch.dtype) -> None:
        """Build the masks that the layers will use, if the backend uses masks."""
        if self.backend.uses_masks:
            for window, groups in windows_and_groups:
                self.mask(window, groups, dtype)

    def starts(self, length: int) -> Tensor:
        """Start offsets of `b` sequences of `length` tokens, for variable-length kernels: int32, `b + 1`."""
        return torch.arange(self.lengths.shape[0] + 1, device=self.lengths.device, dtype=torch.int32) * length
