"""Windows: the last tokens of some texts, run through a draft or through single sub-layers in parallel.

SWIFT, CLaSp and KnapSpec score a draft on recent tokens, which see the target's keys and values of all earlier tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from selfspec_search.replay.texts import Text
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from selfspec.models.attention_hook import AttentionArgs, additive_mask, masked_attention
from selfspec.models.draft_view import change_draft, draft_view
from selfspec.models.probe import ProbePass
from selfspec.models.views import run_view, target_view
from selfspec.plan.sublayers import SkipSet

WIDTH = 32
"""Tokens in a window, as in SWIFT."""


@dataclass
class _Keeping(ProbePass):
    """Attends causally and records the keys and values of every layer."""

    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
        self.kept[int(layer.layer_idx)] = (key, value)  # type: ignore[arg-type]
        return super().attend(layer, query, key, value, how)


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """`t` tokens of each of `b` texts. Padding after short texts is not `counted`."""

    tokens: Tensor  # b t
    following: Tensor  # b t, the target's next token after each token
    positions: Tensor  # b t
    counted: Tensor  # b t
    recorded: dict[int, tuple[Tensor, Tensor]]  # by layer: the target's keys and values of the whole texts, b h n d

    @classmethod
    @torch.inference_mode()
    def of(cls, model: PreTrainedModel, texts: Sequence[Text], width: int = WIDTH) -> Windows:
        """The last `width` tokens of each text, from the prompt's last token on at the earliest."""
        device = model.device
        tokens = pad_sequence([text.tokens.to(device) for text in texts], batch_first=True)  # b n
        keeping = _Keeping()
        every = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        run_view(target_view(model), tokens, every, keeping, head=False)
        lengths = torch.tensor([len(text) for text in texts], device=device)[:, None]
        prompts = torch.tensor([text.prompt for text in texts], device=device)[:, None]
        first = torch.maximum(prompts - 1, lengths - 1 - width)
        positions = first + torch.arange(int((lengths - 1 - first).max()), device=device)
        counted = positions < lengths - 1
        positions = positions.minimum(lengths - 1)
        return cls(
            tokens=tokens.gather(1, positions),
            following=tokens.gather(1, (positions + 1).minimum(lengths - 1)),
            positions=positions,
            counted=counted,
            recorded=keeping.kept,
        )

    @torch.inference_mode()
    def agreement(self, view: PreTrainedModel, skip_set: SkipSet) -> float:
        """The share of the texts' tokens that a draft without `skip_set` predicts, in one parallel pass.

        Args:
            view: a draft view, whose skip set this call changes.
        """
        change_draft(view, skip_set)
        logits = run_view(view, self.tokens, self.positions, WindowPass(self, alone=False))  # b t v
        return float((logits.argmax(dim=-1) == self.following)[self.counted].float().mean())


class WindowPass:
    """One pass over all windows.

    A token sees the target's keys of tokens before its window, and this pass's keys of its window up to itself. If
    `alone`, a token sees its own key of this pass and the target's keys of all earlier tokens.
    """

    def __init__(self, windows: Windows, *, alone: bool) -> None:
        self.windows, self.alone = windows, alone
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
        recorded = self.windows.recorded[int(layer.layer_idx)]  # type: ignore[arg-type]
        groups = query.shape[1] // key.shape[1]
        keys, values = (
            torch.cat([old, new], dim=2).repeat_interleave(groups, dim=1)
            for old, new in zip(recorded, (key, value), strict=True)
        )
        return masked_attention(query, keys, values, self._mask(how.window, query.dtype), how).transpose(1, 2)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """The mask `b 1 t n+t`: the recorded keys, then the keys of the window."""
        if window not in self._masks:
            positions, n = self.windows.positions, self.windows.recorded[0][0].shape[2]
            t = torch.arange(positions.shape[1], device=positions.device)
            columns = torch.arange(n, device=positions.device).expand(*positions.shape, n)
            own = (t == t[:, None] if self.alone else t <= t[:, None]).expand(len(positions), -1, -1)
            visible = torch.cat([columns < (positions if self.alone else positions[:, :1])[..., None], own], dim=2)
            if window is not None:
                places = torch.cat([columns, positions[:, None].expand_as(own)], dim=2)
                visible = visible & (places > positions[..., None] - window)
            self._masks[window] = additive_mask(visible, dtype)[:, None]
        return self._masks[window]


class Stack:
    """Runs single sub-layers of a model on given hidden states (`b t d`) of some windows."""

    def __init__(self, model: PreTrainedModel, windows: Windows, *, alone: bool) -> None:
        self.windows, self.alone = windows, alone
        self.view = draft_view(model, SkipSet())
        self.layers = list(self.view.get_decoder().layers)

    def embedded(self) -> Tensor:
        """The hidden states before the first layer."""
        return self._run(0, SkipSet(range(1, len(self.layers)), range(1, len(self.layers))), None)[0]

    def run(self, layer: int, kinds: Sequence[str], states: Tensor) -> Tensor:
        """The hidden states after the attention (`attn`), the MLP (`mlp`) or both of a layer."""
        others = [index for index in range(len(self.layers)) if index != layer]
        skip_set = SkipSet(
            attn=others if "attn" in kinds else [*others, layer], mlp=others if "mlp" in kinds else [*others, layer]
        )
        return self._run(layer, skip_set, states)[1]

    @torch.inference_mode()
    def _run(self, layer: int, skip_set: SkipSet, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """The hidden states before and after a layer, by Hugging Face's own forward with hooks."""
        seen: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(args[0] if states is None else states)
            return (seen[0], *args[1:])

        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        change_draft(self.view, skip_set)
        module = self.layers[layer]
        hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            step = WindowPass(self.windows, alone=self.alone)
            run_view(self.view, self.windows.tokens, self.windows.positions, step, head=False)
        finally:
            for hook in hooks:
                hook.remove()
        return seen[0], seen[1]
