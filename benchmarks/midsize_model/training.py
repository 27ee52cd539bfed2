"""Training: LayerSkip's recipe (layer dropout, early-exit loss) for a given time.

The recipe's schedules follow the clock: after half of the time, a training is in the middle of the recipe's steps. So
the learning rate ends at zero on any device.
"""

from __future__ import annotations

import json
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from midsize_model.size import Size
from midsize_model.sources import Stream
from selfspec.demo.corpus import CONTEXT, Corpus
from selfspec.demo.evaluation import EXITS, exits_agree, held_out_windows
from selfspec.demo.network import TrainingPass
from selfspec.demo.train import make_optimizers

WARM_UP_STEPS = 3
"""Steps before the clock starts, which compile everything."""
OWN_LOGIT = 6.4
"""The logit of the last seen token in a fresh model, at any width; as in the demo model."""
LINES = 40
"""Lines of the log, roughly."""


def new_model(size: Size, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A fresh model whose sub-layers start as the identity, as in the demo model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.5 * size.width**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=OWN_LOGIT / size.width)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


class Training:
    """The training of a model on a stream."""

    def __init__(self, model: LlamaForCausalLM, stream: Stream, size: Size) -> None:
        self.model, self.stream, self.size = model, stream, size
        self.optimizers = make_optimizers(model, size.recipe)
        self.training_pass = TrainingPass(model, compiled=size.compiled)
        self.steps = 0

    def run(self, seconds: float) -> None:
        """Train for `seconds`, without compilation, and print losses as lines of JSON."""
        start, logged = monotonic(), 0.0
        while (used := monotonic() - start) < seconds:
            losses = self.step(int(used / seconds * self.size.recipe.steps))
            self.steps += 1
            if self.steps == WARM_UP_STEPS:
                start, logged = monotonic(), 0.0
            if used - logged > seconds / LINES:
                logged = used
                read = {name: round(float(loss), 4) for name, loss in losses.items()}
                print(json.dumps({"step": self.steps, "seconds": round(used, 1), **read}), flush=True)

    def step(self, tick: int) -> dict[str, Tensor]:
        """Train one step at a tick of the recipe; returns the losses."""
        recipe, size, device = self.size.recipe, self.size, self.stream.tokens.device
        tokens = self.stream.batch(self.steps, rows=size.rows, length=size.length)
        # The training pass is written for the CPU; these contexts run it on any device.
        with torch.device(device), torch.autocast(device.type, torch.bfloat16):
            dropped = recipe.dropped(tick, size.layers)
            loss, early = self.training_pass(tokens, dropped, recipe.exit_layer(tick), recipe.progress(tick))
        total = loss if early is None else loss + recipe.early_weight(tick) * early
        total.backward()
        for optimizer, rate in zip(self.optimizers, (recipe.muon_rate, recipe.adam_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * recipe.rate(tick)
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss.detach()} | ({} if early is None else {"early": early.detach()})

    @property
    def tokens_seen(self) -> int:
        return self.steps * self.size.rows * self.size.length


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, windows: int
) -> dict[str, Any]:
    """The loss on held-out files, and the agreement of early exits with the full model."""
    text = held_out_windows(tokenizer, corpus.held_out, windows).to(model.device)
    losses = [float(model(row, labels=row).loss) for row in text[:, None]]
    agree = torch.cat([exits_agree(model, row[:, :-1])[:, 0] for row in text[:, None]], dim=1).float().mean(1)
    return {
        "held_out_loss": sum(losses) / len(losses),
        "early_exits_agree": {str(layers): float(share) for layers, share in zip(EXITS, agree, strict=True)},
    }
