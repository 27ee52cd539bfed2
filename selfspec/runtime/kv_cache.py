"""KVCache: one static cache, shared by draft and target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from selfspec.models.attention_hook import LayerShape
from selfspec.runtime.forward_pass import Backend, Pass

SLOT_BUCKET = 128
"""Capacities are rounded up to a multiple of this, so that nearby requests reuse one cache."""


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
    def zero(self) -> None:
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
