"""Runtime: runs passes of a model's target and draft over one KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.models.draft_weights import DraftWeights
from selfspec.models.model_state import unfixed_reason
from selfspec.models.support import check_supported
from selfspec.models.unsafe_tokens import unsafe_tokens
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.round_costs import PassLengths
from selfspec.plan.sublayers import SkipSet
from selfspec.runtime.attention.choose import BackendChoice, choose_backend
from selfspec.runtime.cache_memory import CacheMemory
from selfspec.runtime.cuda_graphs import Graphs, Recorder, graphs_for
from selfspec.runtime.kv_cache import KVCache
from selfspec.runtime.model_views import ModelViews, ViewName
from selfspec.runtime.passes import Passes
from selfspec.runtime.row_buffers import RowBuffers
from selfspec.utils.devices import device_name, dtype_name, without_autocast


class Runtime:
    """Runs passes of the target and of the draft over one shared cache.

    In addition to the model, a runtime holds the cache and the draft weights. Both views share all other weights with
    `model`.

    Args:
        model: a supported causal language model, whole on one device.
        draft_spec: what the draft is made of, or a skip set alone; `draft_with` changes the draft later.
        backend: the name of an attention backend; by default the first that serves this model.
        compile: fuse passes with `torch.compile`; by default on CUDA. `passes.uncompiled_reason` says why passes run
            eagerly.
        graphs: capture rounds as CUDA graphs; by default where the device has CUDA graphs. `uncaptured_reason` says why
            rounds are not captured. A `Recorder` captures rounds on any device instead.
        captured_with: a runtime whose graphs also capture this runtime's passes.
        draft_weights: draft weights shared with other runtimes of the model; by default the runtime makes its own.
        draft_memory: Bytes: the limit of the draft weights; None for no limit.
        pass_lengths: pads passes, for the rows and the conditions of the measurement.
        measured_in: device, dtype and `compiled` of the measurement of `pass_lengths`; None if they hold everywhere.

    Raises:
        InputError: the backend cannot be used, or the draft weights exceed `draft_memory`.
        PlanError: the draft spec does not fit the model.
        UnsupportedModelError: the views cannot reproduce the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draft_spec: DraftSpec | SkipSet | None = None,
        *,
        backend: str | None = None,
        compile: bool | None = None,
        graphs: bool | Recorder | None = None,
        captured_with: Runtime | None = None,
        draft_weights: DraftWeights | None = None,
        draft_memory: int | None = None,
        pass_lengths: PassLengths | None = None,
        measured_in: dict[str, Any] | None = None,
    ) -> None:
        check_supported(model)
        self.model, self.draft_spec = model, DraftSpec.of(draft_spec)
        self._backend_name, self._compile_option = backend, compile
        self._graphs_option, self._captured_with = graphs, captured_with
        self._shared_weights, self._draft_memory = draft_weights, draft_memory
        self._pass_lengths, self._measured_in = pass_lengths, measured_in
        self._graphs: Graphs | None = None
        self._build()

    def _build(self) -> None:
        self._views: ModelViews | None = None  # set last: after a refused build, `refresh` builds again
        self._memory = CacheMemory(lambda: self.views, self._forget)  # frees the old cache
        self._drop_graphs()
        self._graphs = None
        self._unfixed_reason = unfixed_reason(self.model)
        self.passes = Passes(self.model.device, self._compile_option, self._unfixed_reason)
        with without_autocast(self.model.device):
            views = ModelViews(self.model, self.draft_spec, self._shared_weights, self._draft_memory)
        self.backend: BackendChoice = choose_backend(views.needs, self._backend_name)
        self.unsafe_tokens = unsafe_tokens(self.model)
        if self._captured_with is None and self._unfixed_reason is None:
            self._graphs = graphs_for(self.model.device, self._graphs_option)
        self._views = views

    def refresh(self) -> bool:
        """Rebuild the views if the user changed what the model computes. Returns whether the views are new."""
        if self._views is not None and self._views.state.is_current():
            return False
        check_supported(self.model)
        self._shared_weights = None  # made of the model's old weights
        self._build()
        return True

    def follow(self) -> str | None:
        """Rebuild the views if necessary. Returns why `model.generate` must decode; None if the views compute the same.

        Raises:
            UnsupportedModelError: the changed model is not supported.
        """
        if self._views is not None and (reason := self._views.state.bypass_reason()) is not None:
            return reason
        return self.views.state.bypass_reason() if self.refresh() else None

    # --- Parts and conditions ---

    @property
    def views(self) -> ModelViews:
        assert self._views is not None, "the latest build was refused"
        return self._views

    @property
    def cache(self) -> KVCache:
        assert self._memory.cache is not None, "reserve a cache first"
        return self._memory.cache

    @property
    def row_buffers(self) -> RowBuffers:
        """The buffers of captured rounds."""
        return self._memory.row_buffers

    @property
    def cache_bytes(self) -> int:
        """Bytes: memory of the cache; 0 before the first `reserve`."""
        return 0 if self._memory.cache is None else self._memory.cache.nbytes

    @property
    def graphs(self) -> Graphs | None:
        """The captured parts of rounds; None if rounds are not captured."""
        return self._graphs if self._captured_with is None else self._captured_with.graphs

    @property
    def uncaptured_reason(self) -> str | None:
        """Why rounds are not captured although the options request capture; else None."""
        if self.graphs is not None:
            return self.graphs.uncaptured_reason
        if self._unfixed_reason is not None and graphs_for(self.model.device, self._graphs_option) is not None:
            return self._unfixed_reason
        needs_gpu = f"CUDA graphs need a GPU, but the model is on {self.model.device.type}"
        return needs_gpu if self._graphs_option is True else None

    @property
    def static(self) -> bool:
        """Whether every pass looks at all slots, used or unused, so that shapes never change."""
        return self.passes.compile or self.graphs is not None

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions that the cost of a pass depends on, as arguments of `Plan.stale_because`."""
        device, dtype = device_name(self.model.device), dtype_name(self.model.dtype)
        return {"device": device, "dtype": dtype, "compiled": self.passes.compile}

    @property
    def pass_lengths(self) -> PassLengths | None:
        """The padding of passes; None if the pass lengths were measured under other conditions."""
        return self._pass_lengths if self._measured_in in (None, self.conditions) else None

    # --- The cache ---

    @torch.inference_mode()
    def reserve(self, rows: int, slots: int) -> None:
        """Empty the cache, and make room for `slots` tokens in each of `rows` rows.

        A cache that is large enough, and not several times too large, is kept. A new cache drops passes and graphs.
        """
        lengths = self.pass_lengths
        self._pad_passes(lengths if lengths is not None and lengths.rows == rows else None)
        self._memory.reserve(rows, slots + self.passes.padding, self.backend.backend)

    @torch.inference_mode()
    def grow(self, slots: int) -> None:
        """Make room for `slots` tokens in each row. A larger cache keeps the tokens, and drops passes and graphs."""
        if slots > self.capacity:
            self._memory.grow(slots + self.passes.padding)

    @property
    def capacity(self) -> int:
        """Tokens: the most that a row may hold."""
        return self.cache.slots - self.passes.padding

    def adopt_cache(self, other: Runtime) -> None:
        """Share the cache of another runtime of the same model. Only one of the runtimes may decode at a time."""
        self._pad_passes(self.pass_lengths)
        self._memory.adopt(other._memory)

    def zero_cache(self) -> None:
        """Zero the cache after an error."""
        self._memory.zero()

    def _forget(self) -> None:
        self.passes.forget()
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.drop()

    # --- What passes compute ---

    def draft_with(self, draft_spec: DraftSpec | SkipSet) -> None:
        """Change the draft. A refused draft spec changes nothing.

        Raises:
            InputError: the draft weights exceed the memory limit.
            PlanError: the draft spec does not fit the model.
        """
        draft_spec = DraftSpec.of(draft_spec)
        with self._memory.detached():
            self.views.change_draft(draft_spec)
        self.draft_spec = draft_spec
        self.passes.forget("draft")
        self._drop_graphs()

    @contextmanager
    def padded(self, lengths: PassLengths | None) -> Iterator[None]:
        """Pad passes to other lengths inside this context, to measure them. Do not call `reserve` inside."""
        before = self.passes.lengths
        self._pad_passes(lengths)
        try:
            yield
        finally:
            self._pad_passes(before)

    def _pad_passes(self, lengths: PassLengths | None) -> None:
        if lengths != self.passes.lengths:
            self._drop_graphs()  # graphs hold passes of the old lengths
            self.passes.lengths = lengths

    def pin_longrope(self, longest: int) -> None:
        """Choose the factors of longrope for prompts of up to `longest` tokens. Does nothing for other RoPE types."""
        if self.views.pin_longrope(longest):
            self.passes.forget()  # the frequencies are new tensors
            self._drop_graphs()

    @torch.inference_mode()
    def run(self, view: ViewName, tokens: Tensor) -> Tensor:
        """One pass: append `tokens` (`b t`) to the cache and return logits `b t v`. Does not change `cache.lengths`."""
        return self.passes.run(self.views, self.cache, view, tokens, static=self.static)
