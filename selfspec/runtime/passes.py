"""Passes: forward passes of both views: one function for each view and pass length, compiled where possible."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from selfspec.models.views import decoder_layers, run_view
from selfspec.plan.round_costs import PassLengths
from selfspec.runtime.compiling import (
    FusedLayers,
    compile_pass,
    fuses_layers,
    or_eager,
    uncompiled_reason,
    will_compile,
)
from selfspec.runtime.kv_cache import KVCache
from selfspec.runtime.model_views import ModelViews, ViewName

PassFunction = Callable[[Tensor], Tensor]
"""Maps tokens `b t` to logits `b t v`."""


class Passes:
    """Builds and keeps the functions that run passes. Call `forget` when the views or the cache change.

    Args:
        device: the model's device.
        compile: fuse passes with `torch.compile`; None for the device's default.
        unfixed_reason: why a compiled pass would not follow the model; else None.

    Attributes:
        compile: whether passes are compiled. Becomes False if the model cannot be compiled.
        uncompiled_reason: why passes run eagerly although `compile` requests compiled passes; else None.
        lengths: the padding of passes; None for no padding.
    """

    def __init__(self, device: torch.device, compile: bool | None, unfixed_reason: str | None = None) -> None:
        wanted = will_compile(compile, device)
        self.uncompiled_reason = (unfixed_reason or uncompiled_reason(device)) if wanted else None
        self.compile = wanted and self.uncompiled_reason is None
        self.lengths: PassLengths | None = None
        self._fused = FusedLayers()
        self._functions: dict[tuple[ViewName, int], PassFunction] = {}

    @property
    def padding(self) -> int:
        """Tokens: the most padding that a pass writes after a row."""
        return 0 if self.lengths is None else self.lengths.most

    def forget(self, view: ViewName | None = None) -> None:
        """Drop the functions of one view, or all of them."""
        self._functions = {key: run for key, run in self._functions.items() if view not in (None, key[0])}

    def run(self, views: ModelViews, cache: KVCache, view: ViewName, tokens: Tensor, *, static: bool) -> Tensor:
        """Logits `b t v` of one pass over `tokens` (`b t`)."""
        t = tokens.shape[1]
        padded = self._padded(view, t, cache.rows)
        if (key := (view, padded)) not in self._functions:
            self._functions[key] = self._function(views, cache, view, padded, static)
        if padded == t:
            return self._functions[key](tokens.contiguous())  # a compiled function accepts one memory layout
        # No token sees the padding after the last token, and later passes overwrite the padding.
        padding = tokens[:, -1:].expand(-1, padded - t)
        return self._functions[key](torch.cat([tokens, padding], dim=1))[:, :t]

    def _padded(self, view: ViewName, t: int, rows: int) -> int:
        """Tokens: the length of a pass over `t` tokens after padding."""
        if self.lengths is None or self.lengths.rows != rows:
            return t
        if view == "target":
            return self.lengths.of_target(t)
        return self.lengths.draft if t == 1 else t

    def _function(self, views: ModelViews, cache: KVCache, view: ViewName, t: int, static: bool) -> PassFunction:
        module = views[view]

        def forward(tokens: Tensor) -> Tensor:
            step = cache.begin(t, static=static)
            return run_view(module, tokens, step.positions, step)

        def forward_in_fused_layers(tokens: Tensor) -> Tensor:
            step = cache.begin(t, static=True)
            # Before the layers run: layers share compiled code, which must not build a mask in the first layer only.
            step.make_masks(views.masks, views.model.dtype)
            with self._fused.of_sizes(decoder_layers(module), t, cache.rows, cache.slots):
                return run_view(module, tokens, step.positions, step)

        if not self.compile:
            return forward
        fused = forward_in_fused_layers if fuses_layers(views.model.device) else compile_pass(forward)
        return or_eager(fused, forward, self._stop_compiling)

    def _stop_compiling(self, reason: str) -> None:
        self.compile, self.uncompiled_reason = False, reason
