"""The draft view: the model with sub-layers skipped or quantised, and perhaps another head, as a draft spec says.

A skipped `self_attn` or `mlp` becomes a module that returns zeros. Every supported family adds each branch to the
residual stream, so zeros skip the branch. A layer that loses both branches is dropped. In a quantised sub-layer, a
quantised copy replaces each linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec.models.draft_weights import DraftWeights, branch, linears
from selfspec.models.views import decoder_layers, target_view
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.sublayers import SkipSet


class Skipped(nn.Module):
    """Replaces a skipped sub-layer: returns zeros, for attention in a pair with None."""

    def __init__(self, *, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.attention else zeros


def draft_view(
    model: PreTrainedModel, draft_spec: DraftSpec | SkipSet | None = None, draft_weights: DraftWeights | None = None
) -> PreTrainedModel:
    """The draft of `model`: shares every tensor with `model` except those of `draft_weights`."""
    view = target_view(model)
    change_draft(view, draft_spec, draft_weights)
    return view


@dataclass(frozen=True)
class _LinearSlot:
    """Where a sub-layer holds a linear layer, and the model's own linear layer."""

    name: str
    parent: nn.Module
    attribute: str
    own: nn.Module


@dataclass(frozen=True)
class _FullModel:
    """A draft view's modules and config lists before any change, so that another draft spec needs no new view."""

    layers: tuple[nn.Module, ...]
    branches: dict[tuple[str, int], nn.Module]
    linear_slots: dict[tuple[str, int], tuple[_LinearSlot, ...]]
    head: nn.Module
    per_layer_config: dict[str, Any]

    @classmethod
    def of(cls, view: PreTrainedModel) -> _FullModel:
        layers = tuple(decoder_layers(view))
        branches = {
            (kind, index): branch(view, kind, index) for index in range(len(layers)) for kind in ("attn", "mlp")
        }
        slots = {
            key: tuple(
                _LinearSlot(name, module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], linear)
                for name, linear in linears(module)
            )
            for key, module in branches.items()
        }
        config = vars(view.config.get_text_config())
        lists = {k: v for k, v in config.items() if isinstance(v, (list, tuple)) and len(v) == len(layers)}
        return cls(layers, branches, slots, view.lm_head, lists)  # type: ignore[arg-type]


def change_draft(
    view: PreTrainedModel, draft_spec: DraftSpec | SkipSet | None, draft_weights: DraftWeights | None = None
) -> None:
    """Change a draft view to another draft spec. `draft_weights` holds the quantised layers and the trimmed head.

    The change takes microseconds if the draft weights exist: a search changes the draft in every trial. A dropped layer
    also loses its entry in every per-layer list of the config: gemma3 and olmo3 choose RoPE and mask by position in a
    per-layer list, and would draft with the wrong layer's entry.

    Raises:
        PlanError: the draft spec names a layer that the model does not have.
    """
    draft_spec = DraftSpec.of(draft_spec)
    full: _FullModel | None = getattr(view, "selfspec_full_model", None)
    if full is None:
        full = _FullModel.of(view)
        object.__setattr__(view, "selfspec_full_model", full)
    draft_spec.validate(len(full.layers))
    skip_set = draft_spec.skip_set
    for index, layer in enumerate(full.layers):
        layer.self_attn = Skipped(attention=True) if index in skip_set.attn else full.branches["attn", index]
        layer.mlp = Skipped(attention=False) if index in skip_set.mlp else full.branches["mlp", index]
    _place_draft_weights(view, full, draft_spec, draft_weights)
    kept = [index for index in range(len(full.layers)) if index not in skip_set.dropped_layers()]
    view.get_decoder().layers = nn.ModuleList(full.layers[index] for index in kept)
    # Through vars(): a config that validates itself would refuse the states between these assignments.
    config = vars(view.config.get_text_config())
    config["num_hidden_layers"] = len(kept)
    config.update({name: type(value)(value[index] for index in kept) for name, value in full.per_layer_config.items()})


def _place_draft_weights(
    view: PreTrainedModel, full: _FullModel, draft_spec: DraftSpec, draft_weights: DraftWeights | None
) -> None:
    for (kind, layer), slots in full.linear_slots.items():
        for slot in slots:
            copy = None
            if draft_spec.format is not None and draft_spec.choice(kind, layer) == "quantise":
                assert draft_weights is not None, "a draft spec that quantises needs draft weights"
                copy = draft_weights.linear(kind, layer, slot.name, draft_spec.format)
            setattr(slot.parent, slot.attribute, copy or slot.own)
    view.lm_head = full.head
    if draft_spec.has_own_head:
        assert draft_weights is not None, "a draft spec with its own head needs draft weights"
        head = draft_weights.head(draft_spec.head_format, draft_spec.vocabulary)
        view.lm_head = full.head if head is draft_weights.model.lm_head else head


def attention_modules(view: PreTrainedModel) -> list[nn.Module]:
    """The attention modules that the view runs. A module's `layer_idx` is its layer in the full model."""
    modules = [layer.get_submodule("self_attn") for layer in decoder_layers(view)]
    return [module for module in modules if not isinstance(module, Skipped)]
