"""Train the demonstration model: python -m selfspec.demo.train --recipe layerskip --out DIR."""

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from selfspec.demo.batches import Batches
from selfspec.demo.checkpoint import Checkpoint, save_model
from selfspec.demo.corpus import Corpus, load_corpus, train_tokenizer
from selfspec.demo.evaluation import evaluate
from selfspec.demo.network import LAYERS, TrainingPass, new_model
from selfspec.demo.prompts import write_prompts
from selfspec.demo.recipe import RECIPES, Recipe

PROMPT_SEED = 0
LOG_EVERY = 10  # steps
SECONDS_BETWEEN_CHECKPOINTS = 240


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a training writes, and whether it may use a C++ compiler."""

    out: Path
    checkpoint: Checkpoint
    compiled: bool = True


def train(
    recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, run: Run
) -> tuple[LlamaForCausalLM, float]:
    """Run all steps, from the checkpoint where there is one; the model and the seconds spent."""
    model = new_model(tokenizer, seed=recipe.seed)
    optimizers = make_optimizers(model, recipe)
    batches = Batches(corpus.train, tokenizer, seed=recipe.seed)
    training_pass = TrainingPass(model, compiled=run.compiled)
    first, before = run.checkpoint.resume(model, optimizers)
    print(f"{recipe.name}: {recipe.steps} steps from {first}, {batches.tokens} tokens in the files", flush=True)
    started = saved = time.monotonic()
    seconds = before
    for step in range(first, recipe.steps):
        losses = train_step(step, recipe, batches, training_pass, optimizers)
        now = time.monotonic()
        seconds = before + now - started
        if step % LOG_EVERY == 0:
            print(json.dumps({"step": step, "seconds": round(seconds), **losses}), flush=True)
        if now - saved > SECONDS_BETWEEN_CHECKPOINTS or step + 1 == recipe.steps:
            run.checkpoint.save(model, optimizers, tokenizer, step=step + 1, seconds=seconds)
            saved = now
    return model, seconds


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, Adam for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_step(
    step: int,
    recipe: Recipe,
    batches: Batches,
    training_pass: TrainingPass,
    optimizers: list[torch.optim.Optimizer],
) -> dict[str, float]:
    """One step of the recipe; the losses it saw."""
    phase = recipe.phase(step)
    loss, early = training_pass(
        batches.batch(step, rows=phase.rows, length=phase.length),
        recipe.dropped(step, LAYERS),
        recipe.exit_layer(step),
        recipe.progress(step),
    )
    total = loss if early is None else loss + recipe.early_weight(step) * early
    total.backward()  # type: ignore[no-untyped-call]
    for optimizer, rate in zip(optimizers, (recipe.muon_rate, recipe.adam_rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * recipe.rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": round(loss.item(), 4)} | ({} if early is None else {"early": round(early.item(), 4)})


def finish(
    model: LlamaForCausalLM,
    seconds: float,
    recipe: Recipe,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
) -> None:
    """Save the model, measure what was saved, and write training.json beside it."""
    save_model(model, tokenizer, out)
    saved = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    report = {
        "recipe": asdict(recipe),
        "tokens_seen": sum(recipe.phase(s).rows * recipe.phase(s).length for s in range(recipe.steps)),
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in saved.parameters()),
        "files": {"train": len(corpus.train), "held_out": [s.path for s in corpus.held_out]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **evaluate(saved, tokenizer, corpus.held_out, Path(__file__).with_name("prompts") / "held_out.jsonl"),
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report), flush=True)


def main() -> None:
    """The command line."""
    options = _options()
    torch.set_num_threads(options.threads)
    recipe = RECIPES[options.recipe]
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps)
    corpus = load_corpus()
    tokenizer = train_tokenizer([source.text for source in corpus.train])
    if options.prompts:
        write_prompts(options.out, corpus, tokenizer, seed=PROMPT_SEED)
        return
    folder = options.checkpoint or options.out.with_name(options.out.name + ".checkpoint")
    run = Run(out=options.out, checkpoint=Checkpoint(folder=folder), compiled=not options.no_compile)
    model, seconds = train(recipe, corpus, tokenizer, run)
    finish(model, seconds, recipe, corpus, tokenizer, run.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m selfspec.demo.train", description="Train the demonstration model.")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="layerskip")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, or for the prompts")
    parser.add_argument("--prompts", action="store_true", help="write the prompts into --out instead of training")
    parser.add_argument("--checkpoint", type=Path, help="folder of the checkpoint; default: --out + .checkpoint")
    parser.add_argument("--steps", type=int, help="fewer or more steps than the recipe's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="do without a C++ compiler")
    return parser.parse_args()


if __name__ == "__main__":
    main()
