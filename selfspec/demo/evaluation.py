"""What is measured at the end of a training, in float32, on files that were never trained on."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from selfspec.demo.copying import ONCE_MORE
from selfspec.demo.corpus import CONTEXT, Source, definitions

EXITS = (2, 4, 6, 8, 12)
WINDOWS = 64  # of 1024 tokens
NEW_TOKENS = 128
COPIED = range(100, 400)  # tokens of a definition that is copied
GENERATED_AT_ONCE = 16


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    held_out: tuple[Source, ...],
    prompts: Path,
    *,
    windows: int = WINDOWS,
    new_tokens: int = NEW_TOKENS,
) -> dict[str, Any]:
    """Held-out losses, early-exit agreement on held-out text and on own greedy text, share of distinct 4-grams."""
    text = held_out_windows(tokenizer, held_out, windows)
    texts = [json.loads(line)["prompt"] for line in prompts.read_text(encoding="utf-8").splitlines()]
    greedy = [continuation for start in range(0, len(texts), GENERATED_AT_ONCE)
              for continuation in continue_greedily(
                  model, tokenizer, texts[start : start + GENERATED_AT_ONCE], new_tokens)]  # fmt: skip
    return {
        "held_out_tokens": text[:, 1:].numel(),
        "held_out_loss_context_256": _loss(model, text[:, :-1].reshape(-1, 256), text[:, 1:].reshape(-1, 256)),
        "held_out_loss_context_1024": _loss(model, text[:, :-1], text[:, 1:]),
        "agreement_held_out_text": _shares([exits_agree(model, row[None, :-1])[:, 0] for row in text]),
        "agreement_own_greedy_text": _shares(
            [exits_agree(model, torch.cat((p, c))[None, :-1])[:, 0, len(p) - 1 :] for p, c in greedy]
        ),
        "accuracy_in_copies": copy_accuracy(model, tokenizer, held_out),
        "distinct_4_grams": sum(distinct_n_grams(c, 4) for _, c in greedy) / len(greedy),
    }


def held_out_windows(tokenizer: PreTrainedTokenizerBase, held_out: tuple[Source, ...], windows: int) -> Tensor:
    """Windows of 1024 tokens plus one, evenly spread over the held-out files."""
    stream: list[int] = []
    for source in held_out:
        stream += [*tokenizer.encode(source.text, verbose=False), tokenizer.eos_token_id]
    starts = torch.linspace(0, len(stream) - CONTEXT - 1, windows).long().tolist()
    return torch.tensor([stream[start : start + CONTEXT + 1] for start in starts])  # b t+1


def exits_agree(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Whether an early exit after each of EXITS has the full model's argmax; exits b t, bool."""
    states = model.model(tokens, output_hidden_states=True).hidden_states
    final = model.lm_head(states[-1]).argmax(-1)  # b t; the last state has been through the norm already
    early = [model.lm_head(model.model.norm(states[e])).argmax(-1) for e in EXITS]
    return torch.stack([tokens == final for tokens in early])


def copy_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, held_out: tuple[Source, ...]
) -> dict[str, float]:
    """Share of tokens that the argmax predicts in held-out definitions and, after a marker, in their copies."""
    marker = tokenizer.encode(f"\n\n{ONCE_MORE}")
    right = torch.zeros(2)
    total = 0
    for text in sorted({d.text for source in held_out for d in definitions(source)}):
        body = tokenizer.encode(f"\n{text}", verbose=False)
        if len(body) not in COPIED:
            continue
        tokens = torch.tensor([[tokenizer.eos_token_id, *body, *marker, *body]])
        hits = model(tokens[:, :-1]).logits.argmax(-1)[0] == tokens[0, 1:]
        right += torch.stack([hits[: len(body)].sum(), hits[-len(body) :].sum()])
        total += len(body)
    return {"original": float(right[0]) / total, "copy": float(right[1]) / total}


def continue_greedily(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new_tokens: int
) -> list[tuple[Tensor, Tensor]]:
    """For each prompt its tokens, and the model's greedy tokens up to and without the end of text."""
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(  # type: ignore[misc]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    width = inputs["input_ids"].shape[1]
    pairs = []
    for row, mask in zip(output, inputs["attention_mask"], strict=True):
        new = row[width:]
        stops = (new == tokenizer.eos_token_id).nonzero()
        pairs.append((row[:width][mask.bool()], new[: int(stops[0])] if len(stops) else new))
    return pairs


def distinct_n_grams(tokens: Tensor, n: int) -> float:
    """Different n-grams over all n-grams of one text; 1 for a text without any."""
    if len(tokens) < n:
        return 1.0
    grams = tokens.unfold(0, n, 1)
    return len({tuple(gram) for gram in grams.tolist()}) / len(grams)


def _loss(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> float:
    total = 0.0
    for row, want in zip(tokens, labels, strict=True):
        logits = model(row[None]).logits[0]  # t v
        total += F.cross_entropy(logits, want, reduction="sum").item()
    return total / labels.numel()


def _shares(agree: list[Tensor]) -> dict[str, float]:
    table = torch.cat(agree, dim=1).float().mean(1)
    return {str(exit_layer): float(share) for exit_layer, share in zip(EXITS, table, strict=True)}
