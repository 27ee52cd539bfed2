"""ModelViews: a model's target view and draft view, the draft weights, and the findings of the probe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from transformers import PreTrainedModel

from selfspec.models.draft_view import attention_modules, change_draft, draft_view
from selfspec.models.draft_weights import DraftWeights, check_memory, check_vocabulary
from selfspec.models.model_state import ModelState
from selfspec.models.probe import probe
from selfspec.models.rope import longrope_switch, pin_longrope
from selfspec.models.views import target_view
from selfspec.plan.draft_spec import DraftSpec
from selfspec.runtime.forward_pass import Backend
from selfspec.runtime.kv_cache import KVCache

ViewName = Literal["target", "draft"]


class ModelViews:
    """Both views of a model, for the model's state at construction.

    Args:
        model: a supported model.
        draft_spec: what the draft is made of.
        draft_weights: draft weights shared with other views of the model; by default the views make their own.
        draft_memory: Bytes: the limit of the draft weights; None for no limit.

    Attributes:
        layer_shapes: the shape of each attention layer's cache, by layer.
        masks: pairs of window and query heads per key head, one pair for each mask that the layers use.
        needs: what the model requires of an attention backend.
        state: the model's state that the views follow.

    Raises:
        InputError: the draft weights would exceed `draft_memory`.
        PlanError: the draft vocabulary holds tokens that the model does not have.
        UnsupportedModelError: the probe found that the target view differs from the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draft_spec: DraftSpec,
        draft_weights: DraftWeights | None = None,
        draft_memory: int | None = None,
    ) -> None:
        self.model, self._draft_memory = model, draft_memory
        self._check(draft_spec)
        self.draft_weights = draft_weights or DraftWeights(model)
        self._owns_weights = draft_weights is None
        self._by_name = {"target": target_view(model), "draft": draft_view(model, draft_spec, self.draft_weights)}
        recorded = probe(model, self["target"])
        self.layer_shapes, self.masks, self.needs = recorded.shapes, recorded.masks, recorded.needs(model)
        self._pinned_long: bool | None = None  # None until the first pin
        self.state = ModelState(model)

    def __getitem__(self, name: ViewName) -> PreTrainedModel:
        return self._by_name[name]

    def __iter__(self) -> Iterator[PreTrainedModel]:
        return iter(self._by_name.values())

    def change_draft(self, draft_spec: DraftSpec) -> None:
        """Change the draft to another draft spec. A refused draft spec changes nothing."""
        draft_spec.validate(self.model.config.num_hidden_layers)
        self._check(draft_spec)
        change_draft(self["draft"], draft_spec, self.draft_weights)
        if self._owns_weights:
            self.draft_weights.keep_only(draft_spec)

    def pin_longrope(self, longest: int) -> bool:
        """Choose the factors of longrope for prompts of up to `longest` tokens. Returns whether the views changed."""
        switch = longrope_switch(self.model)
        if switch is None or self._pinned_long == (longest > switch):
            return False
        self._pinned_long = longest > switch
        for view in self:
            pin_longrope(view, long=self._pinned_long)
        return True

    def new_cache(self, rows: int, slots: int, backend: Backend) -> KVCache:
        """A cache with at least `slots` slots for each of `rows` rows, attached to both views."""
        slots, model = KVCache.bucketed(slots), self.model
        cache = KVCache(
            self.layer_shapes, rows=rows, slots=slots, device=model.device, dtype=model.dtype, backend=backend
        )
        self.attach(cache)
        return cache

    def attach(self, cache: KVCache) -> None:
        """Give the cache to both views."""
        for view in self:
            cache.attach(attention_modules(view))

    def detach(self) -> None:
        """Remove the cache from both views."""
        for view in self:
            KVCache.detach(attention_modules(view))

    def _check(self, draft_spec: DraftSpec) -> None:
        check_memory(self.model, draft_spec, self._draft_memory)
        check_vocabulary(self.model, draft_spec)
