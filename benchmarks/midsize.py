"""Train a mid-size model (108 million parameters, 28 layers) on the Python sources of this machine.

`benchmarks/quantised.py gpu` measures the model end to end. The corpus is the standard library and the installed
packages. The script trains a byte-level BPE tokenizer of 16,384 tokens, then the model by LayerSkip's recipe for the
given minutes, and cuts prompts from held-out files. It writes everything to --out. Prints the loss; the last line is
JSON.

    python benchmarks/midsize.py                       # six minutes of training on one GPU, about nine in all
    python benchmarks/midsize.py --toy --out DIR       # seconds on a CPU; the model is useless
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
    """The result of a training."""

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
    """Gather the corpus, train tokenizer and model, and evaluate the model."""
    start = monotonic()
    corpus = gather(size, seed)
    tokenizer = train_tokenizer(corpus, size)
    stream = Stream(documents(corpus, seed), tokenizer, device, seed)
    model = new_model(size, tokenizer, seed).to(device)
    prepared = monotonic() - start
    print(f"{len(corpus.train)} files, {len(stream.tokens)} tokens, prepared in {prepared:.0f} s", flush=True)
    training = Training(model, stream, size)
    training.run(60 * minutes)
    model.to(torch.bfloat16).float()  # evaluate the weights as they are saved
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
    options.add_argument("--out", type=Path, default=default_folder(), help="folder of the model (%(default)s)")
    options.add_argument("--minutes", type=float, help="minutes of training, without preparation; by default 6")
    options.add_argument("--device", help="by default CUDA; the CPU for --toy")
    options.add_argument("--toy", action="store_true", help="a tiny model and a tiny corpus, to try the code")
    return options.parse_args(argv)


def default_folder() -> Path:
    """In the cache directory that also holds the texts of searches."""
    given = os.environ.get(CACHE_VARIABLE)
    return (Path(given) if given else platformdirs.user_cache_path("selfspec")) / "midsize"


def prepare(folder: Path, minutes: float | None) -> None:
    """Check the arguments before training.

    Raises:
        InputError: the minutes are not positive, or the folder cannot be made.
    """
    if minutes is not None and minutes <= 0:
        raise InputError(f"--minutes is {minutes:g}, but it must be more than 0")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from None


def keep(made: Made, folder: Path, report: dict[str, Any], seed: int) -> None:
    """Save the model as a Hugging Face directory, with its prompts and `training.json`."""
    save_model(made.model, made.tokenizer, folder)
    write_prompts(folder, made.corpus, made.tokenizer, seed=seed)
    write(report, folder / "training.json")


if __name__ == "__main__":
    run_script(main)
