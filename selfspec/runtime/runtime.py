"""Runtime: a model's target and draft views on one KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.models.draft_view import attention_modules, change_draft, draft_view
from selfspec.models.draft_weights import DraftWeights, check_memory, check_vocabulary
from selfspec.models.rope import longrope_switch, pin_longrope
from selfspec.models.support import check_supported, probe
from selfspec.models.views import decoder_layers, run_view, state_of, target_view
from selfspec.plan import PassLengths
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.sublayers import SkipSet
from selfspec.runtime.attention.choose import choose_backend
from selfspec.runtime.compiling import (
    FusedLayers,
    compile_pass,
    fuses_layers,
    or_eager,
    uncompiled_reason,
    will_compile,
)
from selfspec.runtime.cuda_graphs import graphs_for
from selfspec.runtime.kv_cache import KVCache
from selfspec.runtime.row_buffers import RowBuffers

ViewName = Literal["target", "draft"]
PassFunction = Callable[[Tensor], Tensor]
"""Of tokens `b t`: logits `b t v`."""
PREFILL_CHUNK = 512
PREFILL_TOKENS = 8192
"""Of all rows together: enough to keep a GPU busy, few enough that what an MLP makes of them stays below a gigabyte."""


class Runtime:
    """Runs passes of the target and of the draft over one shared cache.

    Adds the cache to the model's memory, and what the draft spec quantises or trims: both views share every weight with
    `model`.

    Args:
        model: a supported causal language model, whole on one device.
        draft spec: what the draft is made of, a skip set alone or more; `draft_with` changes it later.
        backend: an attention backend by name; by default the first that serves this model.
        compile: fuse passes with `torch.compile`, by default on CUDA; where that is not possible, passes run eagerly,
            and `uncompiled_reason` says why.
        graphs: capture rounds as CUDA graphs, by default where the device has them; `uncaptured_reason` says why not.
        copies: shared with other runtimes of the model; by default this one has its own, and none that it does not use.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draft_spec: DraftSpec | SkipSet | None = None,
        *,
        backend: str | None = None,
        compile: bool | None = None,
        graphs: bool | None = None,
        draft_weights: DraftWeights | None = None,
    ) -> None:
        check_supported(model)
        self.model = model
        wanted = will_compile(compile, model.device)
        self.uncompiled_reason = uncompiled_reason(model.device) if wanted else None
        self.compile = wanted and self.uncompiled_reason is None
        self._graphs_wanted = graphs
        self.draft_spec = DraftSpec.of(draft_spec)
        self._pass_lengths: PassLengths | None = None
        self.draft_memory: int | None = None
        """The most bytes that copies of its own may take; None for no limit."""
        self._shared_draft_weights = draft_weights
        self._backend_name = backend
        self._build()

    def _build(self) -> None:
        check_memory(self.model, self.draft_spec, self.draft_memory)
        check_vocabulary(self.model, self.draft_spec)
        self._state: tuple[object, ...] = ()  # until all is built: what is refused midway must be built anew
        self._cache: KVCache | None = None  # what is replaced must go before what replaces it comes
        self.views: dict[ViewName, PreTrainedModel] = {}
        self._passes: dict[tuple[ViewName, int], PassFunction] = {}
        self.draft_weights = self._shared_draft_weights or DraftWeights(self.model)
        self.views = {
            "target": target_view(self.model),
            "draft": draft_view(self.model, self.draft_spec, self.draft_weights),
        }
        recorded = probe(self.model, self.views["target"])
        self.layer_shapes, self._masks = recorded.shapes, recorded.masks
        self.backend = choose_backend(recorded.needs(self.model), self._backend_name)
        self.graphs = None if self._graphs_wanted is False else graphs_for(self.model.device)
        self._fused = FusedLayers()
        self._pinned_long: bool | None = None  # the side of the longrope switch that is served
        self._state = state_of(self.model)

    def refresh(self) -> None:
        """Build the views anew if the user moved, cast or re-adapted the model since."""
        if state_of(self.model) != self._state:
            check_supported(self.model)
            self._shared_draft_weights = None  # they are of what the model was
            self._build()

    @property
    def pass_lengths(self) -> PassLengths | None:
        """How passes are padded, where so many rows are decoded as it is for; None for not at all."""
        return self._pass_lengths

    @pass_lengths.setter
    def pass_lengths(self, pass_lengths: PassLengths | None) -> None:
        if pass_lengths != self._pass_lengths and self.graphs is not None:
            self.graphs.drop()  # they hold passes of the old lengths
        self._pass_lengths = pass_lengths

    @property
    def cache(self) -> KVCache:
        assert self._cache is not None, "reserve a cache first"
        return self._cache

    @property
    def uncaptured_reason(self) -> str | None:
        """Why rounds are not captured though they were asked for; None where they are, or were not asked for."""
        if self.graphs is not None:
            return self.graphs.unsupported_reason
        return f"CUDA graphs need a GPU, the model is on {self.model.device.type}" if self._graphs_wanted else None

    @property
    def static(self) -> bool:
        """Whether every pass looks at all slots, in use or not, so that shapes never change."""
        return self.compile or self.graphs is not None

    @torch.inference_mode()
    def reserve(self, rows: int, slots: int) -> None:
        """Make sure that the cache has room for `slots` tokens in each of `rows` rows, and forget what it held.

        A cache that fits is kept; growing replaces it, and drops what was compiled for the old one.
        """
        slots += self.pass_lengths.most if self.pass_lengths is not None else 0
        if self._cache is not None and self._cache.rows == rows and self._cache.slots >= slots:
            self._cache.reset()
            return
        self._let_go_of_cache()
        self._cache = KVCache(
            self.layer_shapes,
            rows=rows,
            slots=KVCache.bucketed(slots),
            device=self.model.device,
            dtype=self.model.dtype,
            backend=self.backend.backend,
        )
        self.row_buffers = RowBuffers(rows, self._cache.slots, self.model.device)
        self._attach_cache()

    def scrub(self) -> None:
        """After an error: zero the cache, if there is one."""
        if self._cache is not None:
            self._cache.scrub()

    @property
    def cache_bytes(self) -> int:
        """What the cache takes by now."""
        return 0 if self._cache is None else self._cache.nbytes

    def adopt_cache(self, other: Runtime) -> None:
        """Use another runtime's cache, of the same model: one at a time."""
        self._let_go_of_cache()
        self._cache, self.row_buffers = other.cache, other.row_buffers
        self._attach_cache()

    def _let_go_of_cache(self) -> None:
        """Free the cache before another one is taken: everything that holds it must let go."""
        self._cache = None
        self._passes.clear()
        if self.graphs is not None:
            self.graphs.drop()
        self._detach_cache()

    def _attach_cache(self) -> None:
        """Let both views write to the cache."""
        for view in self.views.values():
            self.cache.attach(attention_modules(view))

    def _detach_cache(self) -> None:
        """Take the cache from both views."""
        for view in self.views.values():
            for attention in attention_modules(view):
                KVCache.detach(attention)

    def draft_with(self, draft_spec: DraftSpec | SkipSet) -> None:
        """Draft by this draft spec from now on."""
        draft_spec = DraftSpec.of(draft_spec)
        draft_spec.validate(self.model.config.num_hidden_layers)  # all that may be refused, before anything is changed
        check_memory(self.model, draft_spec, self.draft_memory)
        check_vocabulary(self.model, draft_spec)
        self.draft_spec = draft_spec
        self._detach_cache()  # what no longer runs must not keep a replaced cache alive
        try:
            change_draft(self.views["draft"], self.draft_spec, self.draft_weights)
        finally:
            if self._cache is not None:
                self._attach_cache()
        if self._shared_draft_weights is None:
            self.draft_weights.keep_only(self.draft_spec)
        self._passes = {key: run for key, run in self._passes.items() if key[0] == "target"}
        if self.graphs is not None:
            self.graphs.drop()

    def pin_longrope(self, longest: int) -> None:
        """Serve the side of the longrope switch on which prompts of up to `longest` tokens are, if there is one."""
        switch = longrope_switch(self.model)
        if switch is None or self._pinned_long == (longest > switch):
            return
        self._pinned_long = longest > switch
        for view in self.views.values():
            pin_longrope(view, long=self._pinned_long)
        self._passes.clear()  # the frequencies are new tensors
        if self.graphs is not None:
            self.graphs.drop()

    @property
    def prefill_chunk(self) -> int:
        """How many tokens of every row a pass of prefill takes."""
        if self.model.device.type == "cpu":
            return PREFILL_CHUNK
        return max(PREFILL_CHUNK // 4, PREFILL_TOKENS // self.cache.rows)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, lengths: Tensor) -> None:
        """Cache each row's first `lengths` (`b`) of `tokens` (`b t`), without the head, in chunks."""
        self.cache.reset()
        self.extend(tokens)
        self.cache.lengths.copy_(lengths)

    def prefill_prompts(self, prompts: Tensor, pads: Tensor) -> None:
        """Cache all of each prompt (`b P`, padded on the left by `pads`, `b`) but its last token."""
        b, width = prompts.shape
        lengths = width - pads  # b
        longest = int(lengths.max())
        self.pin_longrope(longest)
        columns = torch.arange(longest - 1, device=prompts.device)
        # Row r's tokens start behind its padding; what lies beyond its last one is never seen.
        compact = prompts.gather(1, (columns + pads[:, None]).clamp(max=width - 1).expand(b, -1))
        self.prefill(compact, lengths - 1)

    @torch.inference_mode()
    def extend(self, tokens: Tensor, *, static: bool = False) -> None:
        """Cache `tokens` (`b t`) behind `lengths`, which move on, without the head, in chunks."""
        cache = self.cache
        for chunk in tokens.split(self.prefill_chunk, dim=1) if tokens.shape[1] else ():  # prompts of one token: none
            step = cache.begin(chunk.shape[1], static=static)
            run_view(self.views["target"], chunk, step.positions, step, head=False)
            cache.lengths += chunk.shape[1]

    @torch.inference_mode()
    def run(self, view: ViewName, tokens: Tensor) -> Tensor:
        """Logits `b t v` of one pass over `tokens` (`b t`), cached behind `lengths`, which stay as they are."""
        t = tokens.shape[1]
        padded = self._padded(view, t)
        key = view, padded
        if key not in self._passes:
            self._passes[key] = self._make_pass(view, padded)
        if padded == t:
            return self._passes[key](tokens.contiguous())  # a compiled one knows one layout
        # What stands behind the tokens, they do not see; nor does what comes later, which writes over it.
        pass_lengths = tokens[:, -1:].expand(-1, padded - t)
        return self._passes[key](torch.cat([tokens, pass_lengths], dim=1))[:, :t]

    def _padded(self, view: ViewName, t: int) -> int:
        """How many tokens a pass over `t` is made of: more, where longer passes are faster."""
        if self.pass_lengths is None or self.pass_lengths.rows != self.cache.rows:
            return t
        if view == "target":
            return self.pass_lengths.of_target(t)
        return self.pass_lengths.draft if t == 1 else t

    def _make_pass(self, view: ViewName, t: int) -> PassFunction:
        module, cache, static = self.views[view], self.cache, self.static

        def forward(tokens: Tensor) -> Tensor:
            step = cache.begin(t, static=static)
            return run_view(module, tokens, step.positions, step)

        def forward_in_fused_layers(tokens: Tensor) -> Tensor:
            step = cache.begin(t, static=True)
            step.make_masks(self._masks, self.model.dtype)  # before the layers, whose code must not tell the first one
            with self._fused.of_length(decoder_layers(module), t):
                return run_view(module, tokens, step.positions, step)

        if not self.compile:
            return forward
        if fuses_layers(self.model.device):
            return or_eager(forward_in_fused_layers, forward, self._stop_compiling)
        return or_eager(compile_pass(forward), forward, self._stop_compiling)

    def _stop_compiling(self, reason: str) -> None:
        self.compile, self.uncompiled_reason = False, reason


def device_name(device: torch.device) -> str:
    """What plans and profiles call a device: an accelerator's model, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
