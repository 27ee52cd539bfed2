"""Write the prompts of all workloads, in minutes on one core: run `python -m workloads.write` in `benchmarks`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from selfspec.demo import held_out_prompts
from selfspec.demo.copying import NEW_DOCSTRING, ONCE_MORE
from selfspec.demo.corpus import Source, load_corpus
from selfspec.huggingface.loading import Loaded, load
from selfspec.huggingface.prompts import read_prompts
from workloads.choose import FAITHFUL, Candidate, candidates, changing, chosen, least_looping
from workloads.editing import short_functions
from workloads.prose import prose_prompts
from workloads.workload import CODE, COUNT, EDITING, FOLDER, MIXED, PROSE

SEED = 0
OF_EACH = COUNT // 4
"""Prompts of each of the four kinds in the mixed workload."""
CHOICE = FOLDER / "choice.json"
"""The file with the figures of the choice of editing prompts."""
CANDIDATES = 256
"""Functions: the candidates for editing prompts."""
DOCSTRINGS = 24
"""Docstrings: the candidates for prose prompts."""
MARKERS = (NEW_DOCSTRING, ONCE_MORE, " renamed to ")


def main() -> None:
    """Write all workloads, with one thread, so that a machine always writes the same prompts."""
    torch.set_num_threads(1)
    files = load_corpus().held_out
    loaded = load("demo", device="cpu", dtype="float32")
    code = code_prompts()
    docstrings = prose_prompts(files, loaded.tokenizer, Random(f"{SEED} prose"))
    prose = least_looping(loaded, docstrings[:DOCSTRINGS], COUNT)
    editing, changes = edits(loaded, files)
    mixed = [prompt for four in zip(code, editing, prose, changes, strict=False) for prompt in four]
    for workload, prompts in ((CODE, code), (EDITING, editing), (PROSE, prose), (MIXED, mixed)):
        write(workload.path, prompts)


def code_prompts() -> list[str]:
    """The package's held-out prompts without markers of copies."""
    texts = [prompt.text for prompt in read_prompts(held_out_prompts())]
    return [text for text in texts if not any(marker in text for marker in MARKERS)][:COUNT]


def edits(loaded: Loaded, files: Sequence[Source]) -> tuple[list[str], list[str]]:
    """Prompts whose continuations copy, and prompts whose continuations change to new code."""
    functions = short_functions(files, loaded.tokenizer, Random(f"{SEED} editing"))
    found = list(candidates(loaded, functions[:CANDIDATES]))
    kept, changes = chosen(found, COUNT), changing(found, OF_EACH)
    CHOICE.write_text(json.dumps(choice(found, kept, changes), indent=2) + "\n", encoding="utf-8")
    return [c.function.prompt for c in kept], [c.function.prompt for c in changes]


def choice(found: Sequence[Candidate], kept: Sequence[Candidate], changes: Sequence[Candidate]) -> dict[str, Any]:
    """The figures of all candidates and of the chosen prompts."""
    return {
        "candidates": len(found),
        "mean_faithful_of_all": round(sum(c.faithful for c in found) / len(found), 4),
        "least_faithful": FAITHFUL,
        "copying": sum(c.copies for c in found),
        "changing": sum(c.changes for c in found),
        "editing": [c.to_dict() for c in kept],
        "mixed": [c.to_dict() for c in changes],
    }


def write(path: Path, prompts: Sequence[str]) -> None:
    """JSON lines with the key `prompt`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")


if __name__ == "__main__":
    main()
