"""Train a mid-size model (108 million parameters, 28 layers) on the Python sources of this machine.

What `benchmarks/gpu.py` measures end to end. The standard library and the installed packages, a byte-level BPE
tokenizer of 16,384 tokens made from them, and LayerSkip's recipe for as many minutes as are given; then prompts cut
from files that were never trained on. Everything is kept in --out. Prints the loss as it falls; the last line is JSON.

    python benchmarks/midsize.py                       # six minutes of training on one GPU, about nine in all
    python benchmarks/midsize.py --toy --out DIR       # seconds on a CPU; its model is of no use
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import platformdirs
import torch
from common.machine import device_of
from common.record import Record, parser, run_script, write
from midsize_model.size import REAL, TOY, Size
from midsize_model.sources import Stream, documents, gather, train_tokenizer
from midsize_model.training import Training, evaluate, new_model
from selfspec_search.replay.text_cache import CACHE_VARIABLE
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from selfspec import InputError
from selfspec.demo.checkpoint import save_model
from selfspec.demo.corpus import Corpus
from selfspec.demo.prompts import write_prompts

REAL_MINUTES, TOY_MINUTES = 6.0, 0.03


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a training leaves."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    figures: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    record = Record("midsize", options)
    device = device_of(options.device, toy=options.toy)
    prepare(options.out, options.minutes)
    minutes = options.minutes or (TOY_MINUTES if options.toy else REAL_MINUTES)
    made = train(TOY if options.toy else REAL, device, minutes, options.seed)
    report = record.of(device, **made.figures)
    keep(made, options.out, report, options.seed)
    print(json.dumps(report | {"out": str(options.out)}, default=str))
    return report


def train(size: Size, device: torch.device, minutes: float, seed: int) -> Made:
    """Gather, tokenize, train, and measure what will be kept."""
    start = monotonic()
    corpus = gather(size, seed)
    tokenizer = train_tokenizer(corpus, size)
    stream = Stream(documents(corpus, seed), tokenizer, device, seed)
    model = new_model(size, tokenizer, seed).to(device)
    prepared = monotonic() - start
    print(f"{len(corpus.train)} files, {len(stream.tokens)} tokens, prepared in {prepared:.0f} s", flush=True)
    training = Training(model, stream, size)
    training.run(60 * minutes)
    model.to(torch.bfloat16).float()  # as it is kept
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": size.layers,
        "files": {"train": len(corpus.train), "held_out": len(corpus.held_out)},
        "stream_tokens": len(stream.tokens),
        "preparing_seconds": round(prepared, 1),
        "seconds": round(60 * minutes, 1),
        "steps": training.steps,
        "tokens_seen": training.tokens_seen,
        **evaluate(model, tokenizer, corpus, size.windows),
    }
    return Made(model=model, tokenizer=tokenizer, corpus=corpus, figures=figures)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--out", type=Path, default=default_folder(), help="the model's folder (%(default)s)")
    options.add_argument("--minutes", type=float, help="of training, the preparation not counted; by default 6")
    options.add_argument("--device", help="by default CUDA; the CPU for --toy")
    options.add_argument("--toy", action="store_true", help="a tiny model and a tiny corpus, to try the code")
    return options.parse_args(argv)


def default_folder() -> Path:
    """Beside the texts that searches keep."""
    given = os.environ.get(CACHE_VARIABLE)
    return (Path(given) if given else platformdirs.user_cache_path("selfspec")) / "midsize"


def prepare(folder: Path, minutes: float | None) -> None:
    """Fail now, not when all is trained."""
    if minutes is not None and minutes <= 0:
        raise InputError(f"--minutes is {minutes:g}, but it must be more than 0")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from None


def keep(made: Made, folder: Path, report: dict[str, Any], seed: int) -> None:
    """The model as a Hugging Face directory, its prompts, and how it was trained."""
    save_model(made.model, made.tokenizer, folder)
    write_prompts(folder, made.corpus, made.tokenizer, seed=seed)
    write(report, folder / "training.json")


if __name__ == "__main__":
    run_script(main)
