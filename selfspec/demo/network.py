"""The network: a deep, thin Llama, and a training pass that can drop sub-layers and look at an early layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from selfspec.demo.corpus import CONTEXT, VOCABULARY

LAYERS = 16


def new_model(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> LlamaForCausalLM:
    """A fresh model: 16 layers of width 128; every sub-layer starts as the identity."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def attention(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # b t w
    """The residual stream after a layer's attention."""
    branch, _ = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=(cos, sin), attention_mask=None)
    return hidden.add(branch)


def mlp(layer: Any, hidden: Tensor) -> Tensor:  # b t w
    """The residual stream after a layer's MLP."""
    return hidden.add(layer.mlp(layer.post_attention_layernorm(hidden)))


def final_loss(model: LlamaForCausalLM, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the last layer, and its logits."""
    logits = model.lm_head(model.model.norm(hidden)).float().flatten(0, 1)  # b*t v
    return F.cross_entropy(logits, labels.flatten()), logits


def exit_loss(model: LlamaForCausalLM, hidden: Tensor, final: Tensor, labels: Tensor, soft: Tensor) -> Tensor:
    """Cross-entropy of an early layer, through the shared norm and head.

    The target moves from the labels (`soft` 0) to the last layer's own distribution (`soft` 1), held fixed.
    """
    log_q = F.log_softmax(model.lm_head(model.model.norm(hidden)).float().flatten(0, 1), dim=-1)  # b*t v
    from_labels = F.nll_loss(log_q, labels.flatten())
    from_final = -(final.detach().softmax(-1) * log_q).sum(-1).mean()
    return soft * from_final + (1 - soft) * from_labels


class TrainingPass:
    """Forward and loss of one batch, compiled by sub-layer, in bfloat16 autocast."""

    def __init__(self, model: LlamaForCausalLM, *, compiled: bool = True) -> None:
        self.model = model
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self.attention, self.mlp = wrap(attention), wrap(mlp)
        self.final_loss, self.exit_loss = wrap(final_loss), wrap(exit_loss)

    def __call__(
        self, tokens: Tensor, dropped: frozenset[tuple[str, int]], exit_layer: int | None, soft: float
    ) -> tuple[Tensor, Tensor | None]:
        """The final loss and, if an early exit is asked for, its loss."""
        body, labels = self.model.model, tokens[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body.embed_tokens(tokens[:, :-1])
            cos, sin = body.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            early = hidden
            for i, layer in enumerate(body.layers):
                if ("attn", i) not in dropped:
                    hidden = self.attention(layer, hidden, cos, sin)
                if ("mlp", i) not in dropped:
                    hidden = self.mlp(layer, hidden)
                if i + 1 == exit_layer:
                    early = hidden
            loss, logits = self.final_loss(self.model, hidden, labels)
            if exit_layer is None:
                return loss, None
            return loss, self.exit_loss(self.model, early, logits, labels, torch.tensor(soft))
