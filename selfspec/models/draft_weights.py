"""DraftWeights: the draft's own layers: quantised linear layers, and a quantised or trimmed head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec.errors import PlanError
from selfspec.models.quantised_linear import (
    device_unsupported_reason,
    linear_unsupported_reason,
    quantise,
    quantised_bytes,
)
from selfspec.plan.draft_spec import DraftSpec, Format, Quantised, SubVocabulary
from selfspec.plan.sublayers import QuantisedSet
from selfspec.utils.settings import SettingError
from selfspec.utils.sizes import in_words

HEAD = "head"
Key = tuple[Any, ...]


class DraftWeights:
    """Layers that replace the model's layers in the draft. Each layer is made when a draft spec first needs the layer.

    A layer is made of the model's weights at that time. A model that is trained further drafts with the old weights
    until its views are rebuilt.

    Args:
        model: the user's model.
        many_tokens: make layers that are fast in passes over thousands of tokens, as in a replay.
    """

    def __init__(self, model: PreTrainedModel, *, many_tokens: bool = False) -> None:
        self.model, self.many_tokens = model, many_tokens
        self._made: dict[Key, nn.Module] = {}

    @property
    def nbytes(self) -> int:
        """Bytes: memory of the layers, in addition to the model."""
        return sum(buffer.nbytes for module in self._made.values() for buffer in module.buffers())

    def linear(self, kind: str, layer: int, name: str, format: Format) -> nn.Module | None:
        """The quantised copy of the linear layer `name` of a sub-layer; None if the layer cannot be quantised."""
        own = branch(self.model, kind, layer).get_submodule(name)
        if unsupported_reason(own, format, self.model.device) is not None:
            return None
        return self._quantised((kind, layer, name, format), own, format)

    def head(self, format: Format | None, vocabulary: SubVocabulary | None) -> nn.Module:
        """A head for `vocabulary`, in `format` where possible; the model's own head if nothing differs."""
        own: nn.Module = self.model.lm_head  # type: ignore[assignment]
        if vocabulary is None:
            if format is None or unsupported_reason(own, format, self.model.device) is not None:
                return own
            return self._quantised((HEAD, format), own, format)
        key = (HEAD, format, vocabulary)
        if key not in self._made:
            self._made[key] = self._trimmed(own, format, vocabulary)
        return self._made[key]

    def keep_only(self, draft_spec: DraftSpec) -> None:
        """Free all layers that `draft_spec` does not use."""
        head = (HEAD, draft_spec.head_format, *([draft_spec.vocabulary] if draft_spec.vocabulary is not None else []))
        used: set[Key] = {*_linear_keys(self.model, draft_spec), head}
        self._made = {key: module for key, module in self._made.items() if key in used}

    def drop(self, format: Format) -> None:
        """Free all layers in a format."""
        self._made = {key: module for key, module in self._made.items() if format not in key}

    def _quantised(self, key: Key, own: nn.Module, format: Format) -> nn.Module:
        if key not in self._made:
            self._made[key] = quantise(*_weight_and_bias(own), format, many_tokens=self.many_tokens)
        return self._made[key]

    def _trimmed(self, own: nn.Module, format: Format | None, vocabulary: SubVocabulary) -> nn.Module:
        weight, bias = _weight_and_bias(own)
        tokens = torch.tensor(vocabulary.tokens, device=weight.device)
        kept = nn.Linear(weight.shape[1], len(tokens), bias=False, device="meta")
        kept.weight = nn.Parameter(weight.detach()[tokens], requires_grad=False)
        head: nn.Module = _BareLinear(kept.weight.detach())
        if format is not None and unsupported_reason(kept, format, weight.device) is None:
            head = quantise(kept.weight, None, format, many_tokens=self.many_tokens)
        return TrimmedHead(head, tokens, None if bias is None else bias.detach()[tokens], weight.shape[0])


class TrimmedHead(nn.Module):
    """A head that computes the logits of some tokens. All other logits are minus infinity: the draft never proposes
    the other tokens, unless the family caps its logits, which turns minus infinity into the lowest logit.

    Decoding stays lossless: the draft gives the other tokens zero probability, which rejection sampling allows.

    Args:
        head: computes the logits of `tokens`, without a bias.
        tokens: the kept tokens, in ascending order.
        bias: the bias of `tokens`; None if the model's head has no bias.
        vocabulary: the size of the full vocabulary.
    """

    tokens: Tensor
    bias: Tensor | None

    def __init__(self, head: nn.Module, tokens: Tensor, bias: Tensor | None, vocabulary: int) -> None:
        super().__init__()
        self.head, self.vocabulary = head, vocabulary
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        kept = self.head(hidden)
        if self.bias is not None:
            kept = kept + self.bias
        logits = kept.new_full((*kept.shape[:-1], self.vocabulary), -torch.inf)
        return logits.index_copy_(-1, self.tokens, kept)  # type: ignore[no-any-return]


class _BareLinear(nn.Module):
    """A linear layer without a bias. The weight is a buffer, so that `DraftWeights.nbytes` counts the weight."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight)


def branch(model: PreTrainedModel, kind: str, layer: int) -> nn.Module:
    """The module of a sub-layer: `kind` is "attn" or "mlp"."""
    decoder_layer = model.get_decoder().layers[layer]
    return decoder_layer.get_submodule("self_attn" if kind == "attn" else "mlp")  # type: ignore[no-any-return]


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a sub-layer, with their names.

    Linear layers inside an adapter are left out: an adapter (peft holds adapters in a `ModuleDict`) reads its linear
    layer's weight directly.
    """
    for name, part in module.named_children():
        if type(part) is nn.Linear:
            yield name, part
        elif not any(isinstance(child, nn.ModuleDict) for child in part.children()):
            yield from ((f"{name}.{inner}", linear) for inner, linear in linears(part))


def unsupported_reason(linear: nn.Module, format: Format, device: torch.device) -> str | None:
    """Why a module cannot be quantised to this format on this device, or None if it can."""
    return linear_unsupported_reason(linear, format) or device_unsupported_reason(format, device)


def quantisable(model: PreTrainedModel, format: Format) -> QuantisedSet:
    """The sub-layers with at least one linear layer that can be quantised to this format."""
    layers = range(model.config.num_hidden_layers)
    everything = DraftSpec(quantised=Quantised(format=format, sublayers=QuantisedSet(attn=layers, mlp=layers)))
    found = {(kind, layer) for kind, layer, _, _ in _linear_keys(model, everything)}
    return QuantisedSet(**{name: [layer for kind, layer in found if kind == name] for name in ("attn", "mlp")})


def unsupported_reasons(model: PreTrainedModel, draft_spec: DraftSpec) -> list[str]:
    """The parts of a draft spec that stay in full precision: one line for each reason."""
    if draft_spec.quantised is None:
        return []
    format, by_reason = draft_spec.quantised.format, dict[str, list[str]]()
    parts: list[tuple[str, nn.Module]] = []
    for kind, layer in draft_spec.quantised.sublayers:
        inner = list(linears(branch(model, kind, layer)))
        parts += [(f"{kind} {layer}'s {name}", linear) for name, linear in inner]
        if not inner:
            by_reason.setdefault("it has no linear layers", []).append(f"{kind} {layer}")
    if draft_spec.quantised.head:
        parts.append(("the head", _head_to_quantise(model, draft_spec)))
    for name, linear in parts:
        if (reason := unsupported_reason(linear, format, model.device)) is not None:
            by_reason.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} not in {format.name}: {reason}"
        for reason, names in by_reason.items()
    ]


def draft_weight_bytes(model: PreTrainedModel, draft_spec: DraftSpec) -> int:
    """Bytes: memory that the draft weights of a draft spec will take in addition to the model."""
    total = 0
    for kind, layer, name, format in _linear_keys(model, draft_spec):
        outputs, inputs = _weight_and_bias(branch(model, kind, layer).get_submodule(name))[0].shape
        total += quantised_bytes(outputs, inputs, format)
    if not draft_spec.has_own_head:
        return total
    weight, bias = _weight_and_bias(model.lm_head)  # type: ignore[arg-type]
    trimmed, head_format = draft_spec.vocabulary is not None, draft_spec.head_format
    outputs = len(draft_spec.vocabulary) if draft_spec.vocabulary is not None else weight.shape[0]
    if trimmed:
        total += outputs * (torch.long.itemsize + (0 if bias is None else bias.itemsize))
    head = _head_to_quantise(model, draft_spec)
    if head_format is not None and unsupported_reason(head, head_format, model.device) is None:
        return total + quantised_bytes(outputs, weight.shape[1], head_format)
    return total + (outputs * weight.shape[1] * weight.itemsize if trimmed else 0)


def _head_to_quantise(model: PreTrainedModel, draft_spec: DraftSpec) -> nn.Module:
    """The model's head; for a trimmed head, a linear layer of the trimmed size without weights."""
    head: nn.Module = model.lm_head  # type: ignore[assignment]
    if draft_spec.vocabulary is None or type(head) is not nn.Linear:
        return head
    return nn.Linear(head.in_features, len(draft_spec.vocabulary), device="meta", dtype=head.weight.dtype)


def check_memory(model: PreTrainedModel, draft_spec: DraftSpec, limit: int | None) -> None:
    """Raise `SettingError` if the draft weights would take more than `limit` bytes. Allocates nothing."""
    if limit is not None and (needed := draft_weight_bytes(model, draft_spec)) > limit:
        raise SettingError(
            "draft_memory",
            f"allows {in_words(limit)}, but the draft's own layers take {in_words(needed)} in addition to the model; "
            "allow more, or search for a smaller draft with that limit",
        )


def check_vocabulary(model: PreTrainedModel, draft_spec: DraftSpec) -> None:
    """Raise `PlanError` if the draft vocabulary holds a token that the model does not have."""
    if draft_spec.vocabulary is None:
        return
    size, tokens = _weight_and_bias(model.lm_head)[0].shape[0], draft_spec.vocabulary.tokens  # type: ignore[arg-type]
    if not tokens or tokens[-1] >= size:
        given = f"token {tokens[-1]}" if tokens else "no token"
        raise PlanError(
            f"draft_vocabulary has {given}, but this model has 0..{size - 1}; run 'selfspec search' on this model"
        )


def _linear_keys(model: PreTrainedModel, draft_spec: DraftSpec) -> Iterator[tuple[str, int, str, Format]]:
    """Sub-layer, name and format of every linear layer that the draft runs quantised."""
    if draft_spec.quantised is None:
        return
    for kind, layer in draft_spec.quantised.sublayers:
        for name, part in linears(branch(model, kind, layer)):
            if unsupported_reason(part, draft_spec.quantised.format, model.device) is None:
                yield kind, layer, name, draft_spec.quantised.format


def _weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    return linear.weight, getattr(linear, "bias", None)  # type: ignore[return-value]
