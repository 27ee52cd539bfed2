"""Training: LayerSkip's recipe (layer dropout, early-exit loss) until the time is up.

Schedules of the recipe run by the clock: a training that has used half of its minutes is in the middle of the recipe's
steps, however fast the device is, so that the rate ends at zero in time.
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
"""Before the clock starts: everything is compiled in them."""
OWN_LOGIT = 6.4
"""How strongly a fresh model expects the token that it just saw, whatever its width: as strongly as the demo's."""
LINES = 40
"""Lines of the log, about."""


def new_model(size: Size, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A fresh model of this size; every sub-layer starts as the identity, as the demo's do."""
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
    """One training of a model on a stream."""

    def __init__(self, model: LlamaForCausalLM, stream: Stream, size: Size) -> None:
        self.model, self.stream, self.size = model, stream, size
        self.optimizers = make_optimizers(model, size.recipe)
        self.training_pass = TrainingPass(model, compiled=size.compiled)
        self.steps = 0

    def run(self, seconds: float) -> None:
        """Train for so long, compilation not counted; a line of JSON every now and then."""
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
        """One step, at this tick of the recipe; the losses it saw."""
        recipe, size, device = self.size.recipe, self.size, self.stream.tokens.device
        tokens = self.stream.batch(self.steps, rows=size.rows, length=size.length)
        # The pass asks for autocast on the CPU and makes small tensors there; this makes it run anywhere.
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
    """Loss on held-out files, and how often the full model's argmax is that of an exit after each of a few layers."""
    text = held_out_windows(tokenizer, corpus.held_out, windows).to(model.device)
    losses = [float(model(row, labels=row).loss) for row in text[:, None]]
    agree = torch.cat([exits_agree(model, row[:, :-1])[:, 0] for row in text[:, None]], dim=1).float().mean(1)
    return {
        "held_out_loss": sum(losses) / len(losses),
        "early_exits_agree": {str(layers): float(share) for layers, share in zip(EXITS, agree, strict=True)},
    }
