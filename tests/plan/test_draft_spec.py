"""Draft specs and their parts: formats, quantised sub-layers and sub-vocabularies."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfspec import DraftSpec, Format, Plan, PlanError, Quantised, QuantisedSet, SkipSet, SubVocabulary
from selfspec.plan.draft_spec import GROUP_SIZES, INT4, INT8
from selfspec.plan.provenance import ModelIdentity

VOCABULARY = 211

layers = st.frozensets(st.integers(0, 40))
formats = st.sampled_from([INT8, *(Format("int4", size) for size in GROUP_SIZES)])
quantised = st.builds(
    Quantised, format=formats, sublayers=st.builds(QuantisedSet, attn=layers, mlp=layers), head=st.booleans()
)


def one_line(error: pytest.ExceptionInfo[PlanError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Formats ---


def test_formats_have_names_and_int4_has_groups() -> None:
    assert [str(format) for format in (INT8, INT4)] == ["int8", "int4 in groups of 32"]
    assert Format("int4", 128) != Format("int4", 64)


@pytest.mark.parametrize(
    ("name", "group_size", "message"),
    [
        ("fp8", None, "format is 'fp8', but it must be one of int8, int4$"),
        (None, None, "format is None, but it must be one of int8, int4$"),
        (["int4"], 32, r"format is \['int4'\], but it must be one of"),
        ("int4", None, "int4 needs a group_size of 32, 64, 128, 256, not None"),
        ("int4", 48, "int4 needs a group_size of 32, 64, 128, 256, not 48"),
        ("int4", "64", "int4 needs a group_size of 32, 64, 128, 256, not '64'"),
        ("int4", 64.0, r"int4 needs a group_size of 32, 64, 128, 256, not 64\.0"),
        ("int8", 32, "int8 takes no group_size, but 32 was given; leave out group_size"),
        ("int8", 0, "int8 takes no group_size, but 0 was given; leave out group_size"),
    ],
)
def test_invalid_formats_are_refused(name: Any, group_size: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as error:
        Format(name, group_size)
    one_line(error)


# --- Quantised ---


@given(quantised)
def test_quantised_survives_json_and_pickle(some: Quantised) -> None:
    assert Quantised.from_dict(json.loads(json.dumps(some.to_dict()))) == some
    assert pickle.loads(pickle.dumps(some)) == some
    assert hash(Quantised.from_dict(some.to_dict())) == hash(some)


def test_everything_quantises_all_kept_sub_layers_and_the_head() -> None:
    skip_set = SkipSet(attn={0, 3}, mlp={4})
    everything = Quantised.everything(INT8, 5, skip_set=skip_set)
    assert everything.sublayers == QuantisedSet(attn={1, 2, 4}, mlp={0, 1, 2, 3})
    assert everything.head
    DraftSpec(skip_set=skip_set, quantised=everything)  # no sub-layer is both skipped and quantised
    assert len(Quantised.everything(INT8, 5).sublayers) == 10
    assert QuantisedSet(attn={1}) != SkipSet(attn={1})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "quantised takes the keys attn, format, group_size, head, mlp and needs format, but {} was given"),
        ({"format": "int8", "bits": 8}, "quantised takes the keys .*, but {'format': 'int8', 'bits': 8} was given"),
        (["int8"], r"quantised takes the keys .*, but \['int8'\] was given"),
        ({"format": "int8", "head": 1}, "quantised: head must be true or false, but 1 was given"),
        ({"format": "int8", "head": "yes"}, "quantised: head must be true or false, but 'yes' was given"),
        ({"format": "int8", "attn": "34"}, "quantised set: attn must be layer indices, but '34' was given"),
        ({"format": "int8", "mlp": [-1]}, "quantised set: mlp holds -1, but layers are integers from 0"),
        ({"format": "fp8"}, "format is 'fp8', but it must be one of int8, int4$"),
        ({"format": "int4"}, "int4 needs a group_size of 32, 64, 128, 256, not None"),
    ],
)
def test_invalid_quantised_parts_are_refused(data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as error:
        Quantised.from_dict(data)
    one_line(error)
    with pytest.raises(PlanError, match=message):
        Plan(skip_set=SkipSet(), gamma=2, quantised=data)


# --- Sub-vocabularies ---


@given(st.sets(st.integers(0, VOCABULARY - 1)))
def test_a_sub_vocabulary_returns_its_tokens_in_order(tokens: set[int]) -> None:
    some = SubVocabulary.of(sorted(tokens, reverse=True), VOCABULARY)
    assert some.tokens == tuple(sorted(tokens))
    assert len(some) == len(tokens)
    assert SubVocabulary(some.code) == some == pickle.loads(pickle.dumps(some))
    assert SubVocabulary.of([*tokens, *tokens], VOCABULARY) == some


@pytest.mark.parametrize("token", [-1, 11, 16, 1000])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(PlanError):
        SubVocabulary.of([3, token], 11)


def test_a_sub_vocabulary_of_a_large_model_is_short() -> None:
    few = SubVocabulary.of(range(0, 128_256, 8), 128_256)
    assert len(few) == 16_032
    assert len(few.code) < 128_256 // 8


def test_a_sub_vocabulary_can_hold_the_first_and_the_last_token() -> None:
    for vocabulary in (1, 7, 8, 9, 208):
        assert SubVocabulary.of([0, vocabulary - 1], vocabulary).tokens[-1] == vocabulary - 1
        assert SubVocabulary.of(range(vocabulary), vocabulary).tokens == tuple(range(vocabulary))
        assert SubVocabulary.of([], vocabulary).tokens == ()


CODE = SubVocabulary.of([3, 5, 8], 1999).code


@pytest.mark.parametrize(
    "code",
    [
        "",
        "no",
        "äöü",
        CODE[:-4],
        CODE[1:],
        "A" + CODE[1:],
        base64.b64encode(b"bits").decode(),
        f"{CODE[:6]}!{CODE[6:]}",
    ],
)
def test_a_code_that_was_cut_or_changed_is_refused(code: str) -> None:
    message = "draft_vocabulary cannot be decoded: the text was cut or changed; search again"
    with pytest.raises(PlanError, match=message) as error:
        _ = SubVocabulary(code).tokens
    assert one_line(error) == message
    with pytest.raises(PlanError, match=message):
        Plan(skip_set=SkipSet(), gamma=2, draft_vocabulary=code)


def test_a_plan_with_an_empty_draft_vocabulary_is_refused() -> None:
    nothing = base64.b64encode(zlib.compress(bytes(7))).decode()
    with pytest.raises(PlanError, match="draft_vocabulary is empty; remove the key, or search again"):
        Plan(skip_set=SkipSet(), gamma=2, draft_vocabulary=nothing)


# --- Draft specs ---

DRAFT_SPEC = DraftSpec(
    skip_set=SkipSet(attn={0, 1}, mlp={2}),
    quantised=Quantised(format=Format("int4", 64), sublayers=QuantisedSet(attn={2}, mlp={0, 1}), head=True),
    vocabulary=SubVocabulary.of([3, 5, 8], 11),
)


def test_a_draft_spec_chooses_for_every_sub_layer() -> None:
    assert [DRAFT_SPEC.choice("attn", layer) for layer in range(4)] == ["skip", "skip", "quantise", "keep"]
    assert [DRAFT_SPEC.choice("mlp", layer) for layer in range(4)] == ["quantise", "quantise", "skip", "keep"]
    assert DraftSpec().choice("attn", 0) == "keep"
    attention = Quantised(format=INT8, sublayers=QuantisedSet(attn={3}))
    assert DraftSpec(skip_set=SkipSet(mlp={3}), quantised=attention).choice("attn", 3) == "quantise"


def test_the_text_of_a_draft_spec() -> None:
    assert str(DRAFT_SPEC) == "skip attn 0-1 | mlp 2; int4 in groups of 64: attn 2 | mlp 0-1 | head; 3 tokens"
    assert str(DraftSpec()) == "skip nothing"
    only_head = DraftSpec(quantised=Quantised(format=INT8, head=True))
    assert str(only_head) == "skip nothing; int8: head"
    assert str(Quantised(format=INT8)) == "int8: nothing"


def test_a_skip_set_or_none_becomes_a_draft_spec() -> None:
    skip_set = SkipSet(mlp={1})
    assert DraftSpec.of(skip_set) == DraftSpec(skip_set=skip_set)
    assert DraftSpec.of(None) == DraftSpec()
    assert DraftSpec.of(DRAFT_SPEC) is DRAFT_SPEC


def test_a_quantised_or_trimmed_head_is_the_drafts_own() -> None:
    assert not DraftSpec(quantised=Quantised(format=INT8, sublayers=QuantisedSet(attn={1}))).has_own_head
    assert DraftSpec(quantised=Quantised(format=INT8, head=True)).has_own_head
    assert DraftSpec(vocabulary=DRAFT_SPEC.vocabulary).has_own_head
    assert DraftSpec(vocabulary=DRAFT_SPEC.vocabulary).format is None


def test_equal_draft_specs_have_equal_hashes() -> None:
    again = DraftSpec(
        skip_set=SkipSet(attn=[1, 0], mlp=[2]),
        quantised=Quantised.from_dict(DRAFT_SPEC.quantised.to_dict() if DRAFT_SPEC.quantised else {}),
        vocabulary=SubVocabulary.of((8, 3, 5), 11),
    )
    assert {again: 1}[DRAFT_SPEC] == 1


@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_a_sub_layer_both_skipped_and_quantised_is_refused(kind: str) -> None:
    skip_set, sublayers = SkipSet(**{kind: {5, 3, 1}}), QuantisedSet(**{kind: {2, 3, 5}})
    message = f"{kind} layer 3 is both skipped and quantised; choose one"
    with pytest.raises(PlanError, match=message) as error:
        DraftSpec(skip_set=skip_set, quantised=Quantised(format=INT8, sublayers=sublayers))
    assert one_line(error) == message
    data = {"format": "int8", kind: [2, 3, 5]}
    edited = {"selfspec_version": 2, "skip_set": {kind: [1, 3, 5]}, "gamma": 4, "quantised": data}
    with pytest.raises(PlanError, match=f"^p.json: {message}$"):
        Plan.from_json(json.dumps(edited), source="p.json")


def test_validation_names_the_quantised_layer_that_the_model_does_not_have() -> None:
    DRAFT_SPEC.validate(3)
    message = r"^quantised set names attn layer 2, but this model has 2 \(0\.\.1\)$"
    draft_spec = DraftSpec(quantised=DRAFT_SPEC.quantised)
    with pytest.raises(PlanError, match=message):
        draft_spec.validate(2)
    identity = ModelIdentity(model_type="llama", num_layers=2, fingerprint="0")
    with pytest.raises(PlanError, match=message):
        Plan(skip_set=SkipSet(), quantised=DRAFT_SPEC.quantised, gamma=2, model=identity)


# --- In a plan ---


@given(quantised, st.none() | st.sets(st.integers(0, VOCABULARY - 1), min_size=1), st.integers(0, 9))
def test_a_plan_keeps_its_draft_spec_through_json(some: Quantised, tokens: set[int] | None, gamma: int) -> None:
    vocabulary = None if tokens is None else SubVocabulary.of(tokens, VOCABULARY)
    plan = Plan(
        skip_set=SkipSet(attn={41}, mlp={42}),
        quantised=some,
        draft_vocabulary=vocabulary.code if vocabulary else None,
        gamma=gamma,
    )
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert (
        again.draft_spec == plan.draft_spec == DraftSpec(skip_set=plan.skip_set, quantised=some, vocabulary=vocabulary)
    )


def test_a_plan_that_only_skips_has_only_the_required_keys() -> None:
    plan = Plan(skip_set=SkipSet(attn={1}), gamma=2)
    assert json.loads(plan.to_json()).keys() == {"selfspec_version", "skip_set", "gamma"}
    assert plan.draft_spec == DraftSpec.of(plan.skip_set)


def test_the_text_of_a_plan_contains_its_draft_spec() -> None:
    plan = Plan(skip_set=DRAFT_SPEC.skip_set, quantised=DRAFT_SPEC.quantised, draft_vocabulary=CODE, gamma=4)
    assert str(plan) == f"{DRAFT_SPEC}; gamma 4"
