"""Probe: one short input that compares a target view with the user's model, and records what attention needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec.errors import UnsupportedModelError
from selfspec.models.attention_hook import AttentionArgs, AttentionNeeds, LayerShape, additive_mask, masked_attention
from selfspec.models.model_state import hook_reason
from selfspec.models.support import vocabulary_size
from selfspec.models.unsafe_tokens import unsafe_tokens
from selfspec.models.views import decoder_layers, run_view

LENGTHS = (11, 5, 1)
"""Tokens: the longest pass comes first. Each pass holds the first tokens of the longest."""


@dataclass
class ProbePass:
    """Attends causally within the pass, and records what each layer caches and requires."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    softcaps: set[float | None] = field(default_factory=set)
    masks: set[tuple[int | None, int]] = field(default_factory=set)
    """Pairs of window and query heads per key head, one pair for each mask that the layers use."""

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, args: AttentionArgs) -> Tensor:
        if torch.is_autocast_enabled(query.device.type):
            raise UnsupportedModelError(
                f"attention of layer {layer.layer_idx} runs under torch.autocast, which a forward above it turns on; "
                "turn autocast on around generate instead"
            )
        self.shapes[int(layer.layer_idx)] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])  # type: ignore[arg-type]
        self.softcaps.add(args.softcap)
        groups = query.shape[1] // key.shape[1]
        self.masks.add((args.window, groups))
        positions = torch.arange(query.shape[2], device=query.device)
        visible = positions <= positions[:, None]
        if args.window is not None:
            visible = visible & (positions > positions[:, None] - args.window)
        key, value = (kv.repeat_interleave(groups, dim=1) for kv in (key, value))
        return masked_attention(query, key, value, additive_mask(visible, query.dtype), args).transpose(1, 2)

    def needs(self, model: PreTrainedModel) -> AttentionNeeds:
        return AttentionNeeds(
            device=model.device,
            dtype=model.dtype,
            head_dims=frozenset(dim for shape in self.shapes.values() for dim in (shape.key_dim, shape.value_dim)),
            softcaps=frozenset(self.softcaps),
        )


@torch.inference_mode()
def probe(model: PreTrainedModel, view: PreTrainedModel) -> ProbePass:
    """Compare the logits of the target view and of the user's model on passes of several lengths over random tokens.

    The bound on a difference is wide for rounding errors and narrow for a wrong computation.

    Raises:
        UnsupportedModelError: logits differ by more than rounding explains, are not finite, or depend on the number of
            tokens in the pass.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    tokens = torch.randint(vocabulary_size(model.config), (1, LENGTHS[0]), generator=generator, device="cpu")
    tokens = tokens.to(model.device)
    if (unsafe := unsafe_tokens(model)) is not None:
        tokens = unsafe.replaced(tokens)
    recorded, positions = ProbePass(), torch.arange(LENGTHS[0], device=tokens.device)[None]
    ours = [run_view(view, tokens[:, :t], positions[:, :t], recorded).float() for t in LENGTHS]
    unseen = set(range(len(decoder_layers(view)))) - set(recorded.shapes)
    if unseen:
        raise UnsupportedModelError(
            f"attention of layer {min(unseen)} cannot be reached in a copy of this '{model.config.model_type}'; if its "
            "forward was replaced (layer.forward = torch.compile(...)), wrap the model before that"
        )
    theirs = _logits(model, tokens)
    masked = theirs[0] == -torch.inf  # as padding of the vocabulary may be
    if masked.all(dim=-1).any() or not theirs[0][~masked].isfinite().all():
        raise UnsupportedModelError(
            "the model's own logits hold NaN or infinity on a short input; check the weights, or use a wider dtype"
        )
    eps = torch.finfo(model.dtype).eps
    bound = (64 if eps < 1e-5 else 32) * eps * max(theirs[0][~masked].abs().max().item(), 1.0)
    hooked = hook_reason(model)
    for t, own in zip(LENGTHS, theirs, strict=True):
        if not (difference := _difference(own, theirs[0][:, :t])) <= bound:
            raise UnsupportedModelError(
                f"{hooked or 'the model'}: logits of the same tokens depend on the length of the pass (by "
                f"{difference:.3g} between {t} and {LENGTHS[0]} tokens, where rounding explains {bound:.3g}); "
                "quantisers of activations do so"
            )
    difference = max(_difference(own, copied) for own, copied in zip(theirs, ours, strict=True))
    if not difference <= bound:
        cause = "" if hooked is None else f"; {hooked}: wrap the model before you register hooks"
        raise UnsupportedModelError(
            f"this '{model.config.model_type}' cannot be reproduced: the largest logit difference on a short input is "
            f"{difference:.3g}, where rounding explains {bound:.3g}{cause}"
        )
    _check_windows(model, recorded)
    return recorded


def _logits(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """The model's own logits of the first tokens, `b t v` by length, in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return [model(input_ids=tokens[:, :t], use_cache=False).logits.float() for t in LENGTHS]
    finally:
        for module in training:  # not model.train(): the user may have put some modules in evaluation mode
            module.training = True


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of the logits; infinite if other logits are minus infinity."""
    masked = one == -torch.inf
    if not torch.equal(masked, other == -torch.inf):
        return float("inf")
    return float((one - other)[~masked].abs().max())


def _check_windows(model: PreTrainedModel, recorded: ProbePass) -> None:
    """Refuse a model whose config was changed to another window than the one its attention was built with.

    Hugging Face takes the window of the mask from the config at each call. The probe is shorter than most windows.
    """
    config = model.config.get_text_config()
    given, used = getattr(config, "sliding_window", None), {window for window, _ in recorded.masks} - {None}
    if used and used != {given}:
        raise UnsupportedModelError(
            f"config.sliding_window is {given}, but the attention layers were built with {sorted(used)}; "  # type: ignore[type-var]
            "load the model again with the config that it should have"
        )
