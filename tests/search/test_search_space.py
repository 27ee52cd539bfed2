"""The space: parameters of trials, seeds, and changes of draft specs."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given
from selfspec_search.space import OWN_HEAD, Head, Space, nested, seeds, sublayers

from selfspec.plan.draft_spec import INT4, INT8, DraftSpec, Quantised, SubVocabulary
from selfspec.plan.sublayers import QuantisedSet, SkipSet

LAYERS = 7
EVERY = QuantisedSet(attn=range(LAYERS), mlp=range(LAYERS))
ATTENTION = QuantisedSet(attn=range(LAYERS))
SOME = SubVocabulary.of(range(13), 211)
SKIPS = Space(num_layers=LAYERS)
WIDE = Space(
    num_layers=LAYERS,
    formats={INT8.code: ATTENTION, INT4.code: EVERY},
    heads={OWN_HEAD: Head(), "quantised": Head(quantised=True), "13 tokens": Head(quantised=True, vocabulary=SOME)},
)
MIXED = DraftSpec(
    skip_set=SkipSet(attn={0, 3}, mlp={3, 5}),
    quantised=Quantised(format=INT4, sublayers=QuantisedSet(attn={1}, mlp={0, 6}), head=True),
    vocabulary=SOME,
)


def test_skip_sets_survive_the_conversion_to_parameters() -> None:
    skip_set = SkipSet(attn={0, 3, 6}, mlp={3, 5})
    params = SKIPS.to_params(skip_set)
    assert len(params) == 2 * LAYERS
    assert sum(choice == "skip" for choice in params.values()) == len(skip_set)
    assert SKIPS.from_params(params) == DraftSpec.of(skip_set)
    assert set(SKIPS.to_params(MIXED).values()) == {"keep", "skip"}, "this space does not quantise"


def test_draft_specs_survive_the_conversion_to_parameters() -> None:
    assert WIDE.from_params(WIDE.to_params(MIXED)) == MIXED
    assert WIDE.from_params(WIDE.to_params(DraftSpec())) == DraftSpec()


@given(st.fixed_dictionaries({name: st.sampled_from(choices) for name, choices in WIDE.choices.items()}))
def test_every_choice_of_parameters_is_a_draft_spec_and_equal_draft_specs_have_equal_parameters(
    params: dict[str, str],
) -> None:
    draft_spec = WIDE.from_params(params)
    draft_spec.validate(LAYERS)
    assert WIDE.from_params(WIDE.to_params(draft_spec)) == draft_spec
    if draft_spec.format == INT8 and draft_spec.quantised is not None:
        assert not draft_spec.quantised.sublayers.mlp, "MLPs are not faster in this format"


def test_choices_that_the_space_does_not_offer_become_keep() -> None:
    only_quantised = Space(num_layers=LAYERS, skips=False, formats={INT4.code: EVERY})
    assert only_quantised.nearest(SkipSet(attn={1})) == DraftSpec()
    eight_bits = DraftSpec(quantised=Quantised(format=INT8, sublayers=QuantisedSet(mlp={2})))
    assert SKIPS.nearest(eight_bits) == DraftSpec()
    assert only_quantised.nearest(eight_bits).format == INT4


@pytest.mark.parametrize("layers", [1, 2, 7, 16, 61])
def test_seeds_include_early_exits(layers: int) -> None:
    for skip_set in seeds(layers):
        skip_set.validate(layers)
    found = list(Space(num_layers=layers).seeds())
    exits = [DraftSpec.of(SkipSet.early_exit(layer, layers)) in found for layer in range(1, layers)]
    assert sum(exits) == min(layers - 1, 16)


def test_seeds_begin_with_everything_quantised_in_each_format_and_try_each_head() -> None:
    first, second, *others = WIDE.seeds()
    quantised = (first.quantised, second.quantised)
    assert quantised == (
        Quantised(format=INT8, sublayers=ATTENTION, head=True),
        Quantised(format=INT4, sublayers=EVERY, head=True),
    )
    assert DraftSpec(quantised=Quantised(format=INT4, sublayers=EVERY, head=True), vocabulary=SOME) in others
    assert DraftSpec(quantised=Quantised(format=INT4, sublayers=EVERY)) in others
    unskipped = Space(num_layers=LAYERS, skips=False, formats=WIDE.formats).seeds()
    assert not any(draft_spec.skip_set for draft_spec in unskipped)


def test_all_sub_layers_outside_the_skip_set_are_quantised() -> None:
    skip_set = SkipSet(attn={2}, mlp={0, 2})
    draft_spec = WIDE.quantised(INT4.code, skip_set)
    assert draft_spec.skip_set == skip_set
    assert {draft_spec.choice(*sublayer) for sublayer in sublayers(LAYERS) if sublayer not in set(skip_set)} == {
        "quantise"
    }


def test_a_change_changes_one_parameter() -> None:
    changes = WIDE.changes(MIXED)
    assert len(changes) == 2 * 2 * LAYERS + 1 + 2
    for name, before, after in changes:
        changed = WIDE.to_params(WIDE.changed(MIXED, (name, before, after)))
        differing = {key for key, value in WIDE.to_params(MIXED).items() if changed[key] != value}
        # MLPs are not faster in 8 bits, so they are kept in that format.
        assert differing <= {name, *("mlp_0", "mlp_6")} if name == "format" else differing <= {name}
    skip_set = SkipSet(attn={1}, mlp={2})
    assert SKIPS.changed(DraftSpec.of(skip_set), ("attn_1", "skip", "keep")) == DraftSpec.of(SkipSet(mlp={2}))
    assert (
        len({SKIPS.changed(DraftSpec.of(skip_set), change) for change in SKIPS.changes(DraftSpec.of(skip_set))}) == 14
    )


def test_nested_sets_grow_along_the_order() -> None:
    order = sublayers(LAYERS)[::-1]
    sets = sorted(nested(order), key=len)
    assert all(set(small) < set(large) for small, large in pairwise(sets))
    assert all(set(skip_set) == set(order[: len(skip_set)]) for skip_set in sets)


def test_a_space_is_read_back_exactly() -> None:
    assert Space.from_bytes(WIDE.to_bytes()) == WIDE
    assert Space.from_bytes(SKIPS.to_bytes()) == SKIPS


def test_every_draft_spec_of_a_small_space_is_listed_once() -> None:
    small = Space(num_layers=2, formats={INT4.code: QuantisedSet(attn={0, 1})})
    every = list(small.every())
    assert len(every) == small.size == 3**4
    assert every[0] == DraftSpec()
    assert len(set(every)) == 3**2 * 2**2, "quantised MLPs are not faster"


def test_old_studies_that_could_only_skip_are_read() -> None:
    params = {name: choice == "skip" for name, choice in SKIPS.to_params(SkipSet(attn={2}, mlp={0})).items()}
    assert SKIPS.from_params(params) == DraftSpec.of(SkipSet(attn={2}, mlp={0}))
