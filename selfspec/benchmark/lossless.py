"""Comparing two greedy outputs: where they first differ, and whether rounding explains it.

In float32 outputs must be equal, so differences are counted and nothing excuses them. In a narrower dtype a pass over
one token and one over gamma + 1 tokens use different kernels, and a near-tie between two tokens may flip: a difference
is a near-tie if the target's top-two gap there is at most twice the largest logit difference between its own two ways
of getting there, and an error otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from selfspec.runtime.prefill import prefill
from selfspec.runtime.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first differing token of one row. `gap` and `rounding` are None where nothing excuses a difference."""

    position: int
    """Counted from the first new token."""
    expected: int | None
    got: int | None
    """None where one output had ended already."""
    gap: float | None = None
    """Between the target's two largest logits."""
    rounding: float | None = None
    """The largest logit difference between the target's 1-token and (gamma + 1)-token passes."""

    @property
    def is_near_tie(self) -> bool:
        return self.gap is not None and self.rounding is not None and self.gap <= 2 * self.rounding

    def __str__(self) -> str:
        where = f"new token {self.position} is {self.got}, expected {self.expected}"
        if self.gap is None:
            return f"{where}: an error, float32 must be equal"
        kind = "a near-tie" if self.is_near_tie else "an error"
        return f"{where}: {kind}, the top two logits are {self.gap:.3g} apart, rounding makes {self.rounding:.3g}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of comparing some rows."""

    rows: int
    tokens: int
    """How many tokens were compared."""
    differing_tokens: int
    """Positions that differ. Behind a row's first difference the texts have parted, so later ones say little."""
    differences: tuple[Difference, ...]
    """The first one of every row that has any."""

    @property
    def near_ties(self) -> int:
        return sum(difference.is_near_tie for difference in self.differences)

    @property
    def errors(self) -> int:
        return len(self.differences) - self.near_ties

    def __str__(self) -> str:
        if not self.differences:
            return "0"
        parts = [f"{self.near_ties} near-ties"] * bool(self.near_ties) + [f"{self.errors} errors"] * bool(self.errors)
        return f"{self.differing_tokens} ({', '.join(parts)} in {self.rows} rows)"


def first_difference(expected: Tensor, got: Tensor) -> int | None:
    """The first position where two rows of tokens differ, the end of the shorter one included; None if equal."""
    n = min(len(expected), len(got))
    unequal = (expected[:n] != got[:n]).nonzero()
    if len(unequal):
        return int(unequal[0])
    return n if len(expected) != len(got) else None


def count_differing(expected: Tensor, got: Tensor) -> int:
    """Positions that differ; those that only one row has count too."""
    n = min(len(expected), len(got))
    return int((expected[:n] != got[:n]).sum()) + abs(len(expected) - len(got))


def compare(runtime: Runtime, rows: Iterable[tuple[Tensor, Tensor, Tensor]], *, gamma: int) -> Verdict:
    """Compare the new tokens of `rows`, each (prompt, expected, got), 1-D.

    `runtime` computes the target's logits where a difference is to be judged; `gamma` is the plan's.
    """
    count = tokens = differing = 0
    differences: list[Difference] = []
    for prompt, expected, got in rows:
        count, tokens = count + 1, tokens + len(expected)
        differing += count_differing(expected, got)
        if (position := first_difference(expected, got)) is not None:
            differences.append(_judge(runtime, prompt, expected, got, position, gamma))
    return Verdict(rows=count, tokens=tokens, differing_tokens=differing, differences=tuple(differences))


def _judge(runtime: Runtime, prompt: Tensor, expected: Tensor, got: Tensor, position: int, gamma: int) -> Difference:
    gap = rounding = None
    if runtime.model.dtype != torch.float32:
        text = torch.cat([prompt, expected[:position]])
        one_by_one = _last_logits(runtime, text, len(prompt), 1, padded=False)  # as the plain model's
        by_rounds = _last_logits(runtime, text, len(prompt), gamma + 1)
        top = one_by_one.topk(2).values
        gap, rounding = (top[0] - top[1]).item(), (one_by_one - by_rounds).abs().max().item()
    return Difference(
        position=position,
        expected=int(expected[position]) if position < len(expected) else None,
        got=int(got[position]) if position < len(got) else None,
        gap=gap,
        rounding=rounding,
    )


@torch.inference_mode()
def _last_logits(runtime: Runtime, text: Tensor, prompt_length: int, t: int, *, padded: bool = True) -> Tensor:
    """The target's float32 logits `v` behind `text`, whose new tokens went through passes of `t` tokens.

    Every new token's keys and values come from such passes too, as they did when the text was decoded.
    """
    row = text.to(runtime.model.device)[None]
    start = prompt_length - 1
    padding = -(row.shape[1] - start) % t  # the last pass is as long as the others; nothing before it sees the filling
    row = torch.nn.functional.pad(row, (0, padding))
    runtime.reserve(1, row.shape[1])
    prefill(runtime, row[:, :start], torch.tensor([start], device=row.device))
    with runtime.padded(runtime.passes.lengths if padded else None):
        for chunk in row[:, start:].split(t, dim=1):
            logits = runtime.run("target", chunk)
            runtime.cache.lengths += t
    return logits[0, t - 1 - padding].float()
