"""Choose: the editing prompts that the model continues by copying, or leaves for new code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selfspec.huggingface.loading import Loaded
from workloads.editing import Function
from workloads.faithfulness import faithful, looped
from workloads.workload import NEW_TOKENS, endless

ROWS = 16
"""Prompts that are continued together."""
FAITHFUL = 0.75
"""The least share of written tokens that must be true copies."""
START, END = NEW_TOKENS // 2, 3 * NEW_TOKENS // 8
"""Tokens at the start and at the end in which a change from copying to new code must show."""
COPIED_FIRST = 0.5
STILL_COPIED = 0.25
LOOPED = 0.25
"""The largest shares of the end that may be copied or looped if the end is to count as new code."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A function, and shares of the model's continuation of its prompt."""

    function: Function
    faithful: float  # true copies
    start: float  # true copies in the first `START` tokens
    end: float  # true copies in the last `END` tokens
    end_looped: float  # loops in the last `END` tokens

    @classmethod
    def of(cls, function: Function, prompt: Sequence[int], written: Sequence[int]) -> Candidate:
        true = faithful(prompt, written)
        return cls(
            function=function,
            faithful=round(float(true.mean()), 4),
            start=round(float(true[:START].mean()), 4),
            end=round(float(true[-END:].mean()), 4),
            end_looped=round(float(looped(written)[-END:].mean()), 4),
        )

    @property
    def copies(self) -> bool:
        """Whether the continuation copies the function, as the editing workload requires."""
        return self.faithful >= FAITHFUL

    @property
    def changes(self) -> bool:
        """Whether the continuation first copies, then is new code without loops."""
        fresh = self.end <= STILL_COPIED and self.end_looped <= LOOPED
        return self.start >= COPIED_FIRST and fresh

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "function"} | {
            "name": self.function.name
        }


def candidates(loaded: Loaded, functions: Sequence[Function]) -> Iterator[Candidate]:
    """Continue the prompt of each function greedily, in batches of similar lengths."""
    encoded = [(torch.tensor(loaded.tokenizer(function.prompt)["input_ids"]), function) for function in functions]
    fitting = sorted((e for e in encoded if len(e[0]) + NEW_TOKENS <= (loaded.context or 0)), key=lambda e: len(e[0]))
    for first in range(0, len(fitting), ROWS):
        prompts, these = zip(*fitting[first : first + ROWS], strict=True)
        for function, prompt, written in zip(these, prompts, _continued(loaded, prompts), strict=True):
            yield Candidate.of(function, prompt.tolist(), written.tolist())


def _continued(loaded: Loaded, prompts: Sequence[Tensor]) -> Tensor:
    """The model's continuations, `b t`."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.stack([F.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in prompts])
    output: Tensor = loaded.model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, **endless(loaded)
    )
    return output[:, width:]


def least_looping(loaded: Loaded, prompts: Sequence[str], count: int) -> list[str]:
    """The prompts whose continuations loop least: loops would favour prompt lookup."""
    shares = {}
    for prompt in prompts:
        (written,) = _continued(loaded, [torch.tensor(loaded.tokenizer(prompt)["input_ids"])])
        shares[prompt] = float(looped(written.tolist()).mean())
    if len(shares) < count:
        raise ValueError(f"there are {len(shares)} prompts, but {count} were asked for")
    return sorted(shares, key=lambda prompt: (shares[prompt], prompt))[:count]


def chosen(found: Sequence[Candidate], count: int) -> list[Candidate]:
    """The most faithful copying candidates, one of each name, since many files define the same method."""
    copying = sorted((c for c in found if c.copies), key=lambda c: (-c.faithful, c.function.prompt))
    return _first_of_each_name(copying, count)


def changing(found: Sequence[Candidate], count: int) -> list[Candidate]:
    """The candidates that change from copying to new code, the widest gap between start and end first."""
    passing = sorted((c for c in found if c.changes), key=lambda c: (c.end - c.start, c.function.prompt))
    return _first_of_each_name(passing, count)


def _first_of_each_name(found: Sequence[Candidate], count: int) -> list[Candidate]:
    by_name: dict[str, Candidate] = {}
    for candidate in found:
        by_name.setdefault(candidate.function.name, candidate)
    if len(by_name) < count:
        raise ValueError(f"the model yields {len(by_name)} prompts, but {count} were asked for")
    return list(by_name.values())[:count]
