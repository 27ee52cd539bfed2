"""What low precision leaves of losslessness: every token written is the target's choice, or one of a near-tie."""

from __future__ import annotations

import torch
from torch import Tensor

from selfspec import SelfSpeculator
from selfspec.benchmark.lossless import Verdict, compare, first_difference

Row = tuple[Tensor, Tensor, Tensor]


def judge_every_token(spec: SelfSpeculator, plain: SelfSpeculator, texts: list[tuple[Tensor, Tensor]]) -> Verdict:
    """Judge all that `spec` wrote behind each prompt, (prompt, written), by what `plain` decoding writes there.

    Two texts have nothing in common behind a near-tie that fell differently. Where it falls depends on the processor,
    so plain decoding goes on from there with the tokens of `spec`, and no token is left out.
    """
    rows = [row for prompt, written in texts for row in _rows(plain, prompt, written)]
    return compare(spec.runtime, rows, gamma=spec.plan.gamma)


def _rows(plain: SelfSpeculator, prompt: Tensor, written: Tensor) -> list[Row]:
    rows: list[Row] = []
    while len(written):
        given = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt)[None]}
        expected = plain.generate(**given, do_sample=False, max_new_tokens=len(written))[0, len(prompt) :]
        rows.append((prompt, expected, written))
        if (at := first_difference(expected, written)) is None:
            break
        prompt, written = torch.cat([prompt, written[: at + 1]]), written[at + 1 :]
    return rows
