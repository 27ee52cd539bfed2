"""What a search chooses from, as parameters of trials; the draft specs that it starts from, and those beside one."""

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


def test_parameters_and_skip_sets_are_each_other_s_inverse() -> None:
    skip_set = SkipSet(attn={0, 3, 6}, mlp={3, 5})
    params = SKIPS.to_params(skip_set)
    assert len(params) == 2 * LAYERS
    assert sum(choice == "skip" for choice in params.values()) == len(skip_set)
    assert SKIPS.from_params(params) == DraftSpec.of(skip_set)
    assert set(SKIPS.to_params(MIXED).values()) == {"keep", "skip"}, "nothing is quantised where that is not offered"


def test_parameters_and_draft_specs_are_each_other_s_inverse() -> None:
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
        assert not draft_spec.quantised.sublayers.mlp, "which gain nothing in this format"


def test_what_the_space_does_not_offer_is_kept_as_it_is_in_the_model() -> None:
    only_quantised = Space(num_layers=LAYERS, skips=False, formats={INT4.code: EVERY})
    assert only_quantised.nearest(SkipSet(attn={1})) == DraftSpec()
    eight_bits = DraftSpec(quantised=Quantised(format=INT8, sublayers=QuantisedSet(mlp={2})))
    assert SKIPS.nearest(eight_bits) == DraftSpec()
    assert only_quantised.nearest(eight_bits).format == INT4


@pytest.mark.parametrize("layers", [1, 2, 7, 16, 61])
def test_seeds_fit_the_model_and_hold_nothing_skipped_and_the_early_exits(layers: int) -> None:
    for skip_set in seeds(layers):
        skip_set.validate(layers)
    found = list(Space(num_layers=layers).seeds())
    assert DraftSpec() in found
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


def test_all_else_is_quantised_beside_a_skip_set() -> None:
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
        # In 8 bits MLPs gain nothing, so theirs are kept then.
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


def test_a_space_survives_its_storage() -> None:
    assert Space.from_bytes(WIDE.to_bytes()) == WIDE
    assert Space.from_bytes(SKIPS.to_bytes()) == SKIPS


def test_a_small_space_can_be_gone_through() -> None:
    small = Space(num_layers=2, formats={INT4.code: QuantisedSet(attn={0, 1})})
    every = list(small.every())
    assert len(every) == small.size == 3**4
    assert every[0] == DraftSpec()
    assert len(set(every)) == 3**2 * 2**2, "MLPs gain nothing from being quantised"


def test_studies_of_when_skipping_was_the_only_choice_are_read() -> None:
    params = {name: choice == "skip" for name, choice in SKIPS.to_params(SkipSet(attn={2}, mlp={0})).items()}
    assert SKIPS.from_params(params) == DraftSpec.of(SkipSet(attn={2}, mlp={0}))
