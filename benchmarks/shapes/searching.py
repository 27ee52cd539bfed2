"""Searching: the time of a full search of a real shape. The plan means little with random weights."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from common.machine import no_cached_texts
from selfspec_search import SearchSettings, search

from shapes.dial import Dial
from shapes.effort import Effort
from shapes.skip_cells import BASIS, FIRST_GUESS
from shapes.subject import Subject


def measure_search(subject: Subject, effort: Effort, agreement: float) -> dict[str, Any]:
    """Search with full-size trials on random prompts, with the weights of the cell of this agreement."""
    subject.forget()  # the search makes its own runtimes
    skip_set, sizes = subject.skip_set, effort.search
    scale = subject.scales.get((skip_set, agreement), FIRST_GUESS)
    Dial(subject).turn(skip_set=skip_set, skipped_scale=scale)
    calibration, held_out = (
        [batch[0].cpu() for batch in subject.prompts(count, 1, effort.prompt_length, seed=seed)]
        for count, seed in ((sizes.calibration, 2), (sizes.confirming, 3))
    )
    settings = SearchSettings(
        draft="skip",
        trials=sizes.trials,
        new_tokens=sizes.new_tokens,
        gamma_max=sizes.gamma_max,
        seed=subject.seed,
    )
    start = perf_counter()
    with no_cached_texts():
        found = search(subject.model, calibration, held_out, settings)
    return {
        "shape": subject.shape.name,
        "basis": BASIS,
        "sublayers": 2 * subject.num_layers,
        "prompts": sizes.calibration,
        "new_tokens": sizes.new_tokens,
        "gamma_max": sizes.gamma_max,
        "trials_whole": found.trials_complete,
        "trials_ended_early": found.trials_pruned,
        "seconds": perf_counter() - start,
        "phases_s": found.seconds,
        "plan": str(found.plan),
        "replay_equals_decoding_in_every_round": found.rounds_equal,
    }
