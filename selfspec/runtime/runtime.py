"""Runtime: runs passes of a model's target and draft over one KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.models.draft_weights import DraftWeights
from selfspec.models.support import check_supported
from selfspec.models.views import run_view
from selfspec.plan import PassLengths
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.sublayers import SkipSet
from selfspec.runtime.attention.choose import BackendChoice, choose_backend
from selfspec.runtime.cuda_graphs import Graphs, Recorder, graphs_for
from selfspec.runtime.kv_cache import KVCache
from selfspec.runtime.model_views import ModelViews, ViewName
from selfspec.runtime.passes import Passes
from selfspec.runtime.row_buffers import RowBuffers

PREFILL_CHUNK = 512
"""Tokens of each row in a pass of prefill on a CPU."""
PREFILL_TOKENS = 8192
"""Tokens of all rows in a pass of prefill: enough to keep a GPU busy, and an MLP's activations below a gigabyte."""


class Runtime:
    """Runs passes of the target and of the draft over one shared cache.

    Adds the cache and the draft weights to the model's memory: both views share every other weight with `model`.

    Args:
        model: a supported causal language model, whole on one device.
        draft_spec: what the draft is made of, a skip set alone or more; `draft_with` changes it later.
        backend: an attention backend by name; by default the first that serves this model.
        compile: fuse passes with `torch.compile`, by default on CUDA. `uncompiled_reason` says why passes run eagerly.
        graphs: capture rounds as CUDA graphs, by default where the device has them. `uncaptured_reason` says why rounds
            are not captured.
        recorder: captures rounds in the place of CUDA graphs, on any device.
        captured_with: a runtime whose graphs capture this one's passes as well.
        draft_weights: shared with other runtimes of the model; by default this one makes and frees its own.
        draft_memory: the most bytes that draft weights may take; None for no limit.
        pass_lengths: how passes are padded, for the rows and the conditions that the lengths were measured for.
        measured_in: device, dtype and `compiled` for which `pass_lengths` hold; None for all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draft_spec: DraftSpec | SkipSet | None = None,
        *,
        backend: str | None = None,
        compile: bool | None = None,
        graphs: bool | None = None,
        recorder: Recorder | None = None,
        captured_with: Runtime | None = None,
        draft_weights: DraftWeights | None = None,
        draft_memory: int | None = None,
        pass_lengths: PassLengths | None = None,
        measured_in: dict[str, Any] | None = None,
    ) -> None:
        check_supported(model)
        self.model, self.draft_spec = model, DraftSpec.of(draft_spec)
        self._backend_name, self._compile_option = backend, compile
        self._graphs_option, self._recorder, self._captured_with = graphs, recorder, captured_with
        self._shared_weights, self._draft_memory = draft_weights, draft_memory
        self._pass_lengths, self._measured_in = pass_lengths, measured_in
        self._build()

    def _build(self) -> None:
        self._views: ModelViews | None = None  # until all is built: a build that is refused must be made up for
        self._cache: KVCache | None = None  # freed before its successor is made
        self._drop_graphs()
        self.passes = Passes(self.model.device, self._compile_option)
        views = ModelViews(self.model, self.draft_spec, self._shared_weights, self._draft_memory)
        self.backend: BackendChoice = choose_backend(views.needs, self._backend_name)
        self._graphs = self._make_graphs()
        self._views = views

    def _make_graphs(self) -> Graphs | None:
        if self._graphs_option is False or self._captured_with is not None:
            return None
        return graphs_for(self.model.device) if self._recorder is None else Graphs(self._recorder)

    def refresh(self) -> None:
        """Build the views again if the user moved, cast or re-adapted the model since."""
        if self._views is None or not self._views.are_current():
            check_supported(self.model)
            self._shared_weights = None  # they are of what the model was
            self._build()

    # --- What it holds ---

    @property
    def views(self) -> ModelViews:
        assert self._views is not None, "the latest build was refused"
        return self._views

    @property
    def cache(self) -> KVCache:
        assert self._cache is not None, "reserve a cache first"
        return self._cache

    @property
    def cache_bytes(self) -> int:
        """Bytes that the cache takes by now."""
        return 0 if self._cache is None else self._cache.nbytes

    @property
    def graphs(self) -> Graphs | None:
        """The captured stretches of rounds; None where nothing is captured."""
        return self._graphs if self._captured_with is None else self._captured_with.graphs

    @property
    def uncaptured_reason(self) -> str | None:
        """Why rounds are not captured though that was asked for; None where they are, or were not asked for."""
        if self.graphs is not None:
            return self.graphs.uncaptured_reason
        return f"CUDA graphs need a GPU, the model is on {self.model.device.type}" if self._graphs_option else None

    @property
    def static(self) -> bool:
        """Whether every pass looks at all slots, in use or not, so that shapes never change."""
        return self.passes.compile or self.graphs is not None

    @property
    def conditions(self) -> dict[str, Any]:
        """What the cost of a pass depends on, as `Plan.stale_because` takes it."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"device": device_name(self.model.device), "dtype": dtype, "compiled": self.passes.compile}

    @property
    def pass_lengths(self) -> PassLengths | None:
        """How passes are padded; None where the lengths were measured in other conditions."""
        return self._pass_lengths if self._measured_in in (None, self.conditions) else None

    # --- The cache ---

    @torch.inference_mode()
    def reserve(self, rows: int, slots: int) -> None:
        """Make sure that the cache has room for `slots` tokens in each of `rows` rows, and forget what it held.

        A cache that fits is kept; growing replaces it, and drops what was compiled for the old one.
        """
        lengths = self.pass_lengths
        self._pad_passes(lengths if lengths is not None and lengths.rows == rows else None)
        slots += self.passes.lengths.most if self.passes.lengths is not None else 0
        if self._cache is not None and self._cache.rows == rows and self._cache.slots >= slots:
            self._cache.reset()
            return
        self._free_cache()
        self._cache = KVCache(
            self.views.layer_shapes,
            rows=rows,
            slots=KVCache.bucketed(slots),
            device=self.model.device,
            dtype=self.model.dtype,
            backend=self.backend.backend,
        )
        self.row_buffers = RowBuffers(rows, self._cache.slots, self.model.device)
        self.views.attach(self._cache)

    def adopt_cache(self, other: Runtime) -> None:
        """Use another runtime's cache, of the same model: one at a time."""
        self._free_cache()
        self._pad_passes(self.pass_lengths)
        self._cache, self.row_buffers = other.cache, other.row_buffers
        self.views.attach(self.cache)

    def zero_cache(self) -> None:
        """After an error: zero the cache, if there is one."""
        if self._cache is not None:
            self._cache.zero()

    def _free_cache(self) -> None:
        """Free the cache: everything that holds it must let go."""
        self._cache = None
        self.passes.forget()
        self._drop_graphs()
        self.views.detach()

    def _drop_graphs(self) -> None:
        graphs = self._captured_with.graphs if self._captured_with is not None else getattr(self, "_graphs", None)
        if graphs is not None:
            graphs.drop()

    # --- What passes compute ---

    def draft_with(self, draft_spec: DraftSpec | SkipSet) -> None:
        """Draft by this draft spec from now on."""
        draft_spec = DraftSpec.of(draft_spec)
        self.views.detach()  # a layer that no longer runs must not keep a replaced cache alive
        try:
            self.views.change_draft(draft_spec)
        finally:
            if self._cache is not None:
                self.views.attach(self._cache)
        self.draft_spec = draft_spec
        self.passes.forget("draft")
        self._drop_graphs()

    @contextmanager
    def padded(self, lengths: PassLengths | None) -> Iterator[None]:
        """In this context passes have these lengths, until the cache is reserved again. For measuring."""
        before = self.passes.lengths
        self._pad_passes(lengths)
        try:
            yield
        finally:
            self._pad_passes(before)

    def _pad_passes(self, lengths: PassLengths | None) -> None:
        if lengths != self.passes.lengths:
            self._drop_graphs()  # they hold passes of the old lengths
            self.passes.lengths = lengths

    def pin_longrope(self, longest: int) -> None:
        """Serve the side of the longrope switch on which prompts of up to `longest` tokens are, if there is one."""
        if self.views.pin_longrope(longest):
            self.passes.forget()  # the frequencies are new tensors
            self._drop_graphs()

    # --- Passes ---

    @torch.inference_mode()
    def run(self, view: ViewName, tokens: Tensor) -> Tensor:
        """Logits `b t v` of one pass over `tokens` (`b t`), cached behind `lengths`, which stay as they are."""
        return self.passes.run(self.views, self.cache, view, tokens, static=self.static)

    @property
    def prefill_chunk(self) -> int:
        """How many tokens of every row a pass of prefill takes."""
        if self.model.device.type == "cpu":
            return PREFILL_CHUNK
        return max(PREFILL_CHUNK // 4, PREFILL_TOKENS // self.cache.rows)

    def prefill_prompts(self, prompts: Tensor, pads: Tensor) -> None:
        """Cache all of each prompt (`b P`, padded on the left by `pads`, `b`) but its last token."""
        b, width = prompts.shape
        lengths = width - pads  # b
        longest = int(lengths.max())
        self.pin_longrope(longest)
        columns = torch.arange(longest - 1, device=prompts.device)
        # Row r's tokens start behind its padding; what lies beyond its last token is never seen.
        compact = prompts.gather(1, (columns + pads[:, None]).clamp(max=width - 1).expand(b, -1))
        self.prefill(compact, lengths - 1)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, lengths: Tensor) -> None:
        """Cache each row's first `lengths` (`b`) of `tokens` (`b t`), without the head, in chunks."""
        self.cache.reset()
        self.extend(tokens)
        self.cache.lengths.copy_(lengths)

    @torch.inference_mode()
    def extend(self, tokens: Tensor, *, static: bool = False) -> None:
        """Cache `tokens` (`b t`) behind `lengths`, which move on, without the head, in chunks."""
        cache = self.cache
        for chunk in tokens.split(self.prefill_chunk, dim=1) if tokens.shape[1] else ():  # prompts of one token: none
            step = cache.begin(chunk.shape[1], static=static)
            run_view(self.views["target"], chunk, step.positions, step, head=False)
            cache.lengths += chunk.shape[1]


def device_name(device: torch.device) -> str:
    """What plans and profiles call a device: an accelerator's model, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
