"""KVCache: one static cache shared by draft and target; Pass: what one forward pass knows about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn

from selfspec.runtime.attention import AttentionArgs, Backend, additive_mask, fold_mask

SLOT_BUCKET = 128
"""Capacities are rounded up to a multiple of this, so that nearby requests reuse one cache."""


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer caches per token: key and value heads, and their sizes."""

    heads: int
    key_dim: int
    value_dim: int


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


class KVCache:
    """Keys and values of every layer, `b s h d` each, and `lengths`, the tokens cached per row. Nothing else is state.

    Between rounds every layer holds exactly the committed tokens but the last one. Rewinding is assigning `lengths`;
    what lies beyond them stays finite and is never seen.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerShape],
        *,
        rows: int,
        slots: int,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend,
    ) -> None:
        self.rows, self.slots, self.backend = rows, slots, backend
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)  # b
        self._tensors = {
            index: (
                torch.zeros(rows, slots, shape.heads, shape.key_dim, device=device, dtype=dtype),
                torch.zeros(rows, slots, shape.heads, shape.value_dim, device=device, dtype=dtype),
            )
            for index, shape in layers.items()
        }

    @staticmethod
    def bucketed(slots: int) -> int:
        """`slots` rounded up to a whole bucket."""
        return -(-slots // SLOT_BUCKET) * SLOT_BUCKET

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self._tensors.values())

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, `b s h d`."""
        return self._tensors[index]

    def attach(self, attention_modules: Iterable[nn.Module]) -> None:
        """Give each attention module its own layer's keys and values, shared with every other view's.

        They are buffers, so that compiled code reads no layer index (which would compile once per layer).
        """
        for module in attention_modules:
            keys, values = self._tensors[module.layer_idx]  # type: ignore[index]
            module.register_buffer("selfspec_keys", keys, persistent=False)
            module.register_buffer("selfspec_values", values, persistent=False)

    @staticmethod
    def detach(attention: nn.Module) -> None:
        """Take the keys and values from an attention module that no longer runs."""
        for name in ("selfspec_keys", "selfspec_values"):
            attention._buffers.pop(name, None)
            attention._non_persistent_buffers_set.discard(name)

    @torch.inference_mode()  # its tensors are inference tensors: outside, they cannot be written
    def reset(self) -> None:
        """Forget every token."""
        self.lengths.zero_()

    @torch.inference_mode()
    def scrub(self) -> None:
        """Zero everything: after an error a slot may hold a NaN, which poisons attention even where it is masked."""
        self.reset()
        for keys, values in self._tensors.values():
            keys.zero_()
            values.zero_()

    def begin(self, t: int, *, static: bool = False) -> Pass:
        """A pass over `t` tokens of every row, appended behind `lengths`. The caller moves `lengths` on.

        A `static` one looks at every slot, in use or not, so that its shapes never change.
        """
        if static or self.lengths.device.type != "cpu":  # reading `lengths` would stall another device
            return Pass(self.lengths, t, self.slots, self.backend)
        reach = int(self.lengths.max()) + t
        return Pass(self.lengths, t, reach, self.backend, sees_all=t == self.rows == 1)
