"""Workload: prompts of one kind of text, for the embedded model.

The prompts were cut from files that the embedded model was never trained on. They are committed in `prompts`, since
another Python version has other sources. `python -m workloads.write`, run in `benchmarks`, writes them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from selfspec.errors import InputError
from selfspec.huggingface.loading import Loaded
from selfspec.huggingface.prompts import load_prompts

FOLDER = Path(__file__).parent / "prompts"
COUNT = 12
"""Prompts of each workload."""
NEW_TOKENS = 128
"""Tokens that are written after each prompt."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One kind of text."""

    name: str
    description: str

    @property
    def path(self) -> Path:
        """The JSON-lines file of the prompts, key `prompt`."""
        return FOLDER / f"{self.name}.jsonl"

    def prompts(self, loaded: Loaded, count: int = COUNT, new_tokens: int = NEW_TOKENS) -> list[Tensor]:
        """The first `count` prompts as token ids, `t` each.

        Raises:
            InputError: there are fewer prompts, or a prompt leaves no room for the new tokens.
        """
        prompts = load_prompts(self.path, loaded.tokenizer, context=loaded.context, new_tokens=new_tokens)
        if not 1 <= count <= len(prompts):
            raise InputError(f"workload {self.name} has {len(prompts)} prompts; {count} were asked for")
        return prompts[:count]


CODE = Workload(name="code", description="code completion: a file up to some line within a function")
EDITING = Workload(name="editing", description="a function, repeated with new docstrings")
PROSE = Workload(name="prose", description="documentation: the first half of a long docstring")
MIXED = Workload(name="mixed", description="code, editing, prose, and copies that change into new code, in turn")

WORKLOADS = (CODE, EDITING, PROSE, MIXED)


def endless(loaded: Loaded) -> dict[str, Any]:
    """Options of `generate` that suppress the end of text, so that all texts have one length."""
    return {"suppress_tokens": [loaded.tokenizer.eos_token_id]}
