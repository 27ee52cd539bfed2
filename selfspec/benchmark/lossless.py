"""Compare two greedy outputs: the first difference, and whether rounding explains the difference.

In float32, outputs must be equal, so each difference is an error. In a narrower dtype, passes of 1 and of gamma + 1
tokens use different kernels, so two almost equal logits may change places. A difference is a near-tie if the gap
between the target's two largest logits is at most twice the rounding, and an error otherwise. The rounding is the
largest logit difference between the target's passes of 1 and of gamma + 1 tokens, over all positions of the row up to
the difference: at one position alone, the passes may agree by luck.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from selfspec.runtime.prefill import prefill
from selfspec.runtime.runtime import Runtime

MOST_POSITIONS = 256
"""Positions: the most, up to a difference, whose logits are compared. The limit bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first differing token of one row. `gap` and `rounding` are None in float32."""

    position: int
    """Counted from the first new token."""
    expected: int | None
    got: int | None
    """None, like `expected`, if the output had already ended."""
    gap: float | None = None
    """The difference between the target's two largest logits."""
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
    """The result of a comparison of rows."""

    rows: int
    tokens: int
    """The number of expected tokens."""
    differing_tokens: int
    """Positions that differ. After a row's first difference the texts differ, so later positions say little."""
    differences: tuple[Difference, ...]
    """The first difference of each row with a difference."""

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
    """The first position where two rows differ, the end of the shorter row included; None for equal rows."""
    n = min(len(expected), len(got))
    unequal = (expected[:n] != got[:n]).nonzero()
    if len(unequal):
        return int(unequal[0])
    return n if len(expected) != len(got) else None


def count_differing(expected: Tensor, got: Tensor) -> int:
    """The number of differing positions, including positions that only one row has."""
    n = min(len(expected), len(got))
    return int((expected[:n] != got[:n]).sum()) + abs(len(expected) - len(got))


def compare(runtime: Runtime, rows: Iterable[tuple[Tensor, Tensor, Tensor]], *, gamma: int) -> Verdict:
    """Compare the new tokens of `rows`, each (prompt, expected, got), 1-D.

    `runtime` computes the target's logits at a difference; `gamma` is the plan's gamma.
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
        one_by_one = _logits(runtime, text, len(prompt), 1, padded=False)  # as in plain decoding
        by_rounds = _logits(runtime, text, len(prompt), gamma + 1)
        top = one_by_one[-1].topk(2).values
        unmasked = one_by_one > -torch.inf  # heads mask the padding of a vocabulary
        gap, rounding = (top[0] - top[1]).item(), (one_by_one - by_rounds)[unmasked].abs().max().item()
    return Difference(
        position=position,
        expected=int(expected[position]) if position < len(expected) else None,
        got=int(got[position]) if position < len(got) else None,
        gap=gap,
        rounding=rounding,
    )


@torch.inference_mode()
def _logits(runtime: Runtime, text: Tensor, prompt_length: int, t: int, *, padded: bool = True) -> Tensor:
    """The target's float32 logits `n v` after the prompt and after each new token of `text`, the last `MOST_POSITIONS`.

    Passes over the new tokens have `t` tokens, as in decoding.
    """
    row, found = text.to(runtime.model.device)[None], deque[Tensor](maxlen=MOST_POSITIONS // t + 2)
    start = prompt_length - 1
    padding = -(row.shape[1] - start) % t  # every pass has `t` tokens; no token of the text sees the filling
    row = torch.nn.functional.pad(row, (0, padding))
    runtime.reserve(1, row.shape[1])
    prefill(runtime, row[:, :start], torch.tensor([start], device=row.device))
    with runtime.padded(runtime.passes.lengths if padded else None):
        for chunk in row[:, start:].split(t, dim=1):
            found.append(runtime.run("target", chunk)[0].clone())  # a captured pass reuses its output
            runtime.cache.lengths += t
    logits = torch.cat([*found])
    return logits[: len(logits) - padding][-MOST_POSITIONS:].float()
