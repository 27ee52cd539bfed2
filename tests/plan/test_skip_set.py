"""SkipSet: the sub-layers that a draft skips."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfspec import PlanError, QuantisedSet, SkipSet
from selfspec.plan.sublayers import SublayerSet

layer_sets = st.frozensets(st.integers(0, 40))
skip_sets = st.builds(SkipSet, attn=layer_sets, mlp=layer_sets)


def test_attention_and_mlp_are_skipped_apart() -> None:
    skip_set = SkipSet(attn=[3, 1, 3], mlp=(2,))
    assert skip_set.attn == frozenset({1, 3})
    assert skip_set.mlp == frozenset({2})
    assert len(skip_set) == 3
    assert list(skip_set) == [("attn", 1), ("attn", 3), ("mlp", 2)]


def test_nothing_is_skipped_by_default_and_that_is_false() -> None:
    assert not SkipSet()
    assert SkipSet(mlp={0})
    assert str(SkipSet()) == "nothing"


def test_layers_that_lose_both_sub_layers_are_dropped() -> None:
    assert SkipSet(attn={1, 2, 5}, mlp={2, 3, 5}).dropped_layers() == {2, 5}


def test_an_early_exit_skips_all_from_its_layer_on() -> None:
    assert SkipSet.early_exit(3, 5) == SkipSet(attn={3, 4}, mlp={3, 4})
    assert SkipSet.early_exit(5, 5) == SkipSet()
    assert SkipSet.early_exit(0, 2) == SkipSet(attn={0, 1}, mlp={0, 1})


@pytest.mark.parametrize("exit_layer", [-1, 6])
def test_an_early_exit_outside_the_model_is_an_error(exit_layer: int) -> None:
    with pytest.raises(PlanError, match=rf"exit layer is {exit_layer}, but this model has 5 layers; give 0\.\.5"):
        SkipSet.early_exit(exit_layer, 5)


@given(skip_sets)
def test_json_and_pickle_give_back_the_same_skip_set(skip_set: SkipSet) -> None:
    assert SkipSet.from_dict(json.loads(json.dumps(skip_set.to_dict()))) == skip_set
    assert pickle.loads(pickle.dumps(skip_set)) == skip_set
    assert hash(SkipSet.from_dict(skip_set.to_dict())) == hash(skip_set)


@given(st.one_of(skip_sets, st.builds(QuantisedSet, attn=layer_sets, mlp=layer_sets)))
def test_the_text_names_exactly_the_sub_layers_of_the_set(skip_set: SublayerSet) -> None:
    named: list[tuple[str, int]] = []
    for part in str(skip_set).split(" | ") if skip_set else []:
        kind, ranges = part.split(" ")
        for run in ranges.split(","):
            first, _, last = run.partition("-")
            named.extend((kind, layer) for layer in range(int(first), int(last or first) + 1))
    assert named == list(skip_set)


def test_the_text_form_is_compact() -> None:
    assert str(SkipSet(attn={3, 4, 5, 9}, mlp={4})) == "attn 3-5,9 | mlp 4"
    assert str(SkipSet(mlp={0, 1})) == "mlp 0-1"


@given(skip_sets, st.integers(1, 41))
def test_validation_passes_exactly_when_every_layer_exists(skip_set: SkipSet, num_layers: int) -> None:
    outside = [layer for _, layer in skip_set if layer >= num_layers]
    if not outside:
        skip_set.validate(num_layers)
        return
    with pytest.raises(PlanError, match=rf"but this model has {num_layers} \(0\.\.{num_layers - 1}\)"):
        skip_set.validate(num_layers)


def test_validation_names_the_layer_and_its_kind() -> None:
    with pytest.raises(PlanError, match=r"skip set names mlp layer 40, but this model has 32 \(0\.\.31\)"):
        SkipSet(attn={31}, mlp={3, 40, 41}).validate(32)


@pytest.mark.parametrize("layers", [[-1], [1.0], ["3"], [True], [None], "34", None, 5], ids=repr)
def test_what_is_no_layer_is_refused(layers: Any) -> None:
    with pytest.raises(PlanError, match="skip set: mlp"):
        SkipSet(mlp=layers)


@pytest.mark.parametrize("data", [[], None, 3, {"attention": [1]}, {"attn": [1], "mlp": [2], "kv": [3]}], ids=repr)
def test_what_is_no_skip_set_is_refused(data: Any) -> None:
    with pytest.raises(PlanError, match="a skip set takes the keys 'attn' and 'mlp'"):
        SkipSet.from_dict(data)


def test_a_skip_set_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        SkipSet().attn = frozenset({1})  # type: ignore[misc]
