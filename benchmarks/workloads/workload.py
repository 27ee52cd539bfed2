"""Workloads: what the drafters are given to continue, by kind of text, for the embedded model.

The prompts were cut from files that the embedded model was never trained on, and are kept in `prompts`, as another
Python has other sources; `python -m workloads.write`, run in `benchmarks`, writes them again.
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
"""What is written behind each; every prompt leaves room for it."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One kind of text: a name, what it is, and its prompts in the order they are to be decoded in."""

    name: str
    description: str

    @property
    def path(self) -> Path:
        """The JSON lines of the prompts, key `prompt`."""
        return FOLDER / f"{self.name}.jsonl"

    def prompts(self, loaded: Loaded, count: int = COUNT, new_tokens: int = NEW_TOKENS) -> list[Tensor]:
        """The first prompts as token ids, `t` each.

        Raises:
            InputError: there are fewer prompts, or one leaves no room for the new tokens.
        """
        prompts = load_prompts(self.path, loaded.tokenizer, context=loaded.context, new_tokens=new_tokens)
        if not 1 <= count <= len(prompts):
            raise InputError(f"workload {self.name} has {len(prompts)} prompts; {count} were asked for")
        return prompts[:count]


CODE = Workload(name="code", description="code completion: a file up to some line within a function")
EDITING = Workload(name="editing", description="a function again and again, each time with a new docstring")
PROSE = Workload(name="prose", description="documentation: the first half of a long docstring")
MIXED = Workload(name="mixed", description="code, editing, prose, and copies that turn into fresh code, one by one")

WORKLOADS = (CODE, EDITING, PROSE, MIXED)


def endless(loaded: Loaded) -> dict[str, Any]:
    """Options of `generate` for texts of one length: without the end of text, which would cut an edit off at once."""
    return {"suppress_tokens": [loaded.tokenizer.eos_token_id]}
