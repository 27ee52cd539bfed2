"""Effort: how much of everything is measured of a shape, at real sizes and as a toy."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class SearchEffort:
    """Sizes of a search, and of the decoding that follows it.

    Args:
        calibration, confirming: prompts that plans are compared on, and held-out ones that confirm them.
        timed, repeats: held-out prompts that are decoded afterwards, and how often.
    """

    trials: int
    new_tokens: int
    gamma_max: int
    calibration: int
    confirming: int
    timed: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Sizes of one run.

    Args:
        prompts, prompt_length, new_tokens, repeats: of timed decodings; `prompts` rows or more give a cell's agreement.
        tolerance: how far the agreement may be off before the next scale is tried, `steps` times at most.
        pass_repeats, in_a_row: stretches of a pass, a copy or a product, and how many of them make a stretch; the
            median stretch counts.
        copy_bytes, matmul_size: of the device's ceilings.
        peer_tokens: new tokens of a timed decoding by Hugging Face's ways, which take their time.
        agreements: that are set for quantised drafts, each a cell.
        lengths: tokens of the target's passes that are timed; a draft is at most one shorter than the longest.
        context: tokens cached before a timed pass.
        trimmed: tokens of a trimmed head.
    """

    prompts: int
    prompt_length: int
    new_tokens: int
    repeats: int
    tolerance: float
    steps: int
    pass_repeats: int
    in_a_row: int
    copy_bytes: int
    matmul_size: int
    peer_tokens: int
    agreements: tuple[float, ...]
    lengths: tuple[int, ...]
    context: int
    trimmed: int
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
    lengths=(1, 3, 5, 7, 9),  # few, since each is compiled
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
    repeats=3,
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
