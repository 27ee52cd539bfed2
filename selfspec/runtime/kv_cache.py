"""KVCache: one static cache that draft and target share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from selfspec.models.attention_hook import LayerShape
from selfspec.runtime.forward_pass import Backend, Pass

SLOT_BUCKET = 128
"""Slots: capacities are multiples, so that requests of similar lengths reuse one cache."""


class KVCache:
    """Keys and values of every layer, `b s h d` each, and `lengths`: the number of cached tokens of each row.

    The cache has no other state. Between rounds every layer holds exactly the committed tokens except the last one. To
    rewind, assign `lengths`. Slots beyond `lengths` stay finite, and no pass sees them.
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
            index: [
                torch.zeros(rows, slots, shape.heads, shape.key_dim, device=device, dtype=dtype),
                torch.zeros(rows, slots, shape.heads, shape.value_dim, device=device, dtype=dtype),
            ]
            for index, shape in layers.items()
        }

    @staticmethod
    def bucketed(slots: int) -> int:
        """`slots` rounded up to a multiple of `SLOT_BUCKET`."""
        return -(-slots // SLOT_BUCKET) * SLOT_BUCKET

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self._tensors.values())

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, `b s h d`."""
        keys, values = self._tensors[index]
        return keys, values

    def attach(self, attention_modules: Iterable[nn.Module]) -> None:
        """Give each attention module the keys and values of its layer. All views share the keys and values.

        Keys and values are buffers, so that compiled code reads no layer index: torch would compile every layer.
        """
        for module in attention_modules:
            keys, values = self._tensors[module.layer_idx]  # type: ignore[index]
            module.register_buffer("selfspec_keys", keys, persistent=False)
            module.register_buffer("selfspec_values", values, persistent=False)

    @staticmethod
    def detach(attention_modules: Iterable[nn.Module]) -> None:
        """Remove the keys and values from attention modules."""
        for module in attention_modules:
            for name in ("selfspec_keys", "selfspec_values"):
                module._buffers.pop(name, None)
                module._non_persistent_buffers_set.discard(name)

    @torch.inference_mode()
    def grow(self, slots: int) -> None:
        """Extend every row to `slots` slots, and keep what the cache holds. Detach the cache first.

        Layer by layer: only one layer's keys or values are held twice.
        """
        for index in self._tensors:
            for place, tensor in enumerate(self._tensors[index]):
                grown = nn.functional.pad(tensor, (0, 0, 0, 0, 0, slots - self.slots))
                self._tensors[index][place] = grown
        self.slots = slots

    @torch.inference_mode()  # inference tensors cannot be written outside inference mode
    def reset(self) -> None:
        """Empty the cache."""
        self.lengths.zero_()

    @torch.inference_mode()
    def zero(self) -> None:
        """Empty the cache and zero all slots: a NaN that an error left behind would spread even through a mask."""
        self.reset()
        for keys, values in self._tensors.values():
            keys.zero_()
            values.zero_()

    def begin(self, t: int, *, static: bool = False) -> Pass:
        """Begin a pass over `t` new tokens of every row, after `lengths` cached tokens. The caller updates `lengths`.

        A `static` pass looks at every slot, used or unused, so that its shapes never change.
        """
        if static or self.lengths.device.type != "cpu":  # reading `lengths` would stall another device
            return Pass(self.lengths, t, self.slots, self.backend)
        reach = int(self.lengths.max()) + t
        return Pass(self.lengths, t, reach, self.backend, sees_all=t == self.rows == 1)
