"""Skip sets as choices, and the sets that a search starts from."""

from __future__ import annotations

from itertools import pairwise

import pytest
from selfspec_search.space import flipped, from_params, nested, seeds, sublayers, to_params

from selfspec.skip_set import SkipSet

LAYERS = 7


def test_parameters_and_skip_sets_are_each_other_s_inverse() -> None:
    skip_set = SkipSet(attn={0, 3, 6}, mlp={3, 5})
    params = to_params(skip_set, LAYERS)
    assert len(params) == 2 * LAYERS
    assert sum(params.values()) == len(skip_set)
    assert from_params(params, LAYERS) == skip_set


@pytest.mark.parametrize("layers", [1, 2, 7, 16, 61])
def test_seeds_fit_the_model_and_hold_nothing_skipped_and_the_early_exits(layers: int) -> None:
    found = list(seeds(layers))
    for skip_set in found:
        skip_set.validate(layers)
    assert SkipSet() in found
    exits = [SkipSet.early_exit(layer, layers) in found for layer in range(1, layers)]
    assert sum(exits) == min(layers - 1, 16)


def test_a_flip_runs_what_was_skipped_and_skips_what_was_run() -> None:
    skip_set = SkipSet(attn={1}, mlp={2})
    assert flipped(skip_set, ("attn", 1)) == SkipSet(mlp={2})
    assert flipped(skip_set, ("attn", 1), ("attn", 2)) == SkipSet(attn={2}, mlp={2})
    assert len({flipped(skip_set, sublayer) for sublayer in sublayers(LAYERS)}) == 2 * LAYERS


def test_nested_sets_grow_along_the_order() -> None:
    order = sublayers(LAYERS)[::-1]
    sets = sorted(nested(order), key=len)
    assert all(set(small) < set(large) for small, large in pairwise(sets))
    assert all(set(skip_set) == set(order[: len(skip_set)]) for skip_set in sets)
