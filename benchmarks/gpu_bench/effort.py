"""Effort: how much of everything is measured, on a GPU and as a toy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Sizes of one run.

    Args:
        copy_bytes, matmul_size: of the ceilings.
        pass_repeats: stretches of a pass, a copy or a product, of which the median counts.
        new_tokens, repeats: of a timed decoding of a cell.
        peer_tokens: new tokens of a timed decoding by Hugging Face's ways, which take their time.
        prompts: so many rows at least tell a cell's agreement, and are timed, one batch after the other.
        tolerance: how far the agreement may be off before the scale is set anew, `steps` times at most.
        search_prompts, search_tokens, search_trials, gamma_max: of a search; as many prompts of `prompt_length`.
        confirm_prompts: held-out prompts of a search.
    """

    copy_bytes: int
    matmul_size: int
    pass_repeats: int
    new_tokens: int
    repeats: int
    peer_tokens: int
    prompts: int
    tolerance: float
    steps: int
    search_prompts: int
    search_tokens: int
    search_trials: int
    gamma_max: int
    prompt_length: int
    confirm_prompts: int


REAL = Effort(
    copy_bytes=4 << 30,
    matmul_size=8192,
    pass_repeats=9,
    new_tokens=130,
    repeats=3,
    peer_tokens=34,
    prompts=4,
    tolerance=0.015,
    steps=6,
    search_prompts=32,
    search_tokens=128,
    search_trials=200,
    gamma_max=8,
    prompt_length=128,
    confirm_prompts=8,
)
"""Search: 200 trials of full size, 32 prompts x 128 tokens, drafts of up to 8."""

TOY = Effort(
    copy_bytes=16 << 20,
    matmul_size=257,
    pass_repeats=5,
    new_tokens=37,
    repeats=3,
    peer_tokens=19,
    prompts=2,
    tolerance=0.04,
    steps=7,
    search_prompts=3,
    search_tokens=17,
    search_trials=5,
    gamma_max=2,
    prompt_length=11,
    confirm_prompts=2,
)
