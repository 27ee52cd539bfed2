"""Effort: prompts, tokens and repeats of a run, for a GPU, a CPU and `--toy`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class SearchEffort:
    """Sizes of a search, and of the decoding after the search."""

    trials: int
    new_tokens: int
    gamma_max: int
    calibration: int  # prompts
    confirming: int  # held-out prompts that confirm plans
    timed: int  # held-out prompts that all decoders decode afterwards
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Sizes of one run."""

    prompts: int  # of timed decodings, and the fewest rows that measure a cell's agreement
    prompt_length: int
    new_tokens: int
    repeats: int
    tolerance: float  # of a set agreement
    steps: int  # scales that are tried for an agreement, at most
    pass_repeats: int  # timed stretches of a pass, a copy or a product; the median counts
    in_a_row: int  # calls of a stretch
    copy_bytes: int
    matmul_size: int
    peer_tokens: int  # new tokens of a timed decoding by Hugging Face
    agreements: tuple[float, ...]  # set for quantised drafts, one cell each
    lengths: tuple[int, ...]  # tokens of the target's timed passes
    context: int  # tokens cached before a timed pass
    trimmed: int  # tokens of a trimmed head
    search: SearchEffort


GPU = Effort(
    prompts=4,
    prompt_length=128,
    new_tokens=130,
    repeats=3,
    tolerance=0.015,
    steps=6,
    pass_repeats=9,
    in_a_row=8,
    copy_bytes=4 << 30,
    matmul_size=8192,
    peer_tokens=34,
    agreements=(0.9, 0.95),
    lengths=(1, 3, 5, 7, 9),  # few, since each length is compiled
    context=512,
    trimmed=32_000,
    search=SearchEffort(trials=200, new_tokens=128, gamma_max=8, calibration=32, confirming=8, timed=16, repeats=3),
)
CPU = replace(
    GPU,
    prompts=2,
    prompt_length=17,
    new_tokens=32,
    tolerance=0.02,
    pass_repeats=5,
    in_a_row=2,
    lengths=(1, 2, 3, 4, 5, 6, 7, 8, 9),
    context=128,
)
TOY = Effort(
    prompts=2,
    prompt_length=11,
    new_tokens=37,
    repeats=2,
    tolerance=0.04,
    steps=7,
    pass_repeats=3,
    in_a_row=3,
    copy_bytes=16 << 20,
    matmul_size=257,
    peer_tokens=19,
    agreements=(0.9, 0.8),
    lengths=(1, 2, 3, 4, 5),
    context=37,
    trimmed=128,
    search=SearchEffort(trials=6, new_tokens=17, gamma_max=2, calibration=3, confirming=2, timed=1, repeats=2),
)
