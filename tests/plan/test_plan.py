"""Plan and plan file: strict, written completely or not at all, and only for the model of the plan."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import LAYERS, tiny_model
from transformers import AutoConfig

from selfspec import InputError, PassLengths, Plan, PlanError, PromptLookup, RoundCosts, SkipSet, wrap
from selfspec.plan.provenance import Conditions, Figures, ModelIdentity, Provenance, config_fingerprint

EDITABLE = {"selfspec_version": 2, "skip_set": {"attn": [1], "mlp": []}, "gamma": 4}
IDENTITY = {"model_type": "llama", "num_layers": 3, "fingerprint": "0"}

texts = st.text(max_size=5)
figures = st.none() | st.builds(
    Figures,
    tokens_per_round=st.floats(0, 65),
    acceptance_rate=st.floats(0, 1),
    tokens_per_second=st.floats(0, 1e6),
    speedup=st.floats(0, 65),
    texts=st.integers(0, 99),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
plans = st.builds(
    Plan,
    skip_set=st.builds(SkipSet, attn=st.frozensets(st.integers(0, 40)), mlp=st.frozensets(st.integers(0, 40))),
    gamma=st.integers(0, 64),
    exit_threshold=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
    model=st.none() | st.builds(ModelIdentity, model_type=texts, num_layers=st.just(41), fingerprint=texts),
    provenance=st.none()
    | st.builds(
        Provenance,
        conditions=st.builds(
            Conditions, device=texts, dtype=texts, sampling=st.dictionaries(texts, json_values, max_size=2)
        ),
        seed=st.integers(0, 2**32 - 1),
        trials=st.integers(0, 10**6),
        predicted=figures,
        measured=figures,
    ),
)


# --- In code ---


def test_wrap_takes_a_plan_made_by_hand() -> None:
    plan = Plan(skip_set=SkipSet(attn={1, 3}, mlp={2}), gamma=4)
    spec = wrap(tiny_model("llama"), plan)
    assert spec.plan is plan
    assert spec.runtime.draft_spec.skip_set == plan.skip_set


def test_a_plan_may_decode_plainly() -> None:
    assert not Plan.none().speculates
    assert Plan.none().skip_set == SkipSet()
    assert Plan(skip_set=SkipSet(attn={1}), gamma=1).speculates


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Plan.none().gamma = 3  # type: ignore[misc]


# --- The file ---


@given(plans)
def test_a_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_file_is_readable_json() -> None:
    text = Plan(skip_set=SkipSet(attn={9, 3}, mlp={4}), gamma=4, exit_threshold=0.25).to_json()
    assert json.loads(text) == {
        "selfspec_version": 2,
        "skip_set": {"attn": [3, 9], "mlp": [4]},
        "gamma": 4,
        "exit_threshold": 0.25,
    }
    assert text.startswith('{\n  "selfspec_version": 2,')
    assert text.endswith("}\n")


def test_a_plan_is_saved_in_the_directory_of_a_model(tmp_path: Path) -> None:
    plan = Plan(skip_set=SkipSet(attn={1}), gamma=2)
    path = plan.save_pretrained(tmp_path / "new" / "model")
    assert path == tmp_path / "new" / "model" / "selfspec_plan.json"
    assert Plan.from_pretrained(path) == Plan.from_pretrained(path.parent) == Plan.from_pretrained(str(path)) == plan


def test_wrap_reads_a_plan_from_a_file_or_a_directory(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = Plan(skip_set=SkipSet(attn={1}), gamma=2, model=ModelIdentity.of(model.config))
    path = plan.save_pretrained(tmp_path)
    assert wrap(model, path).plan == wrap(model, str(tmp_path)).plan == plan


@pytest.mark.parametrize("given", [{"skip_set": {}, "gamma": 2}, 4, b"plan.json", SkipSet()], ids=repr)
def test_wrap_refuses_other_types_than_plans_and_paths(given: Any) -> None:
    message = f"expected a Plan, a plan file, or a directory with a plan, but {type(given).__name__} was given"
    with pytest.raises(PlanError, match=message) as caught:
        wrap(tiny_model("llama"), given)
    assert "\n" not in str(caught.value)


# --- Edited and broken files ---


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"gama": 5}, "unknown key 'gama'; remove it, or search again"),
        ({"gamma": -1}, "key 'gamma': .*greater than or equal to 0"),
        ({"gamma": 65}, "key 'gamma': .*less than or equal to 64"),
        ({"gamma": "4"}, r"key 'gamma': .*valid integer \(given: '4'\)"),
        ({"gamma": True}, r"key 'gamma': .*valid integer \(given: True\)"),
        ({"gamma": 4.0}, "key 'gamma': .*valid integer"),
        ({"exit_threshold": 1.0}, "key 'exit_threshold': .*less than 1"),
        ({"exit_threshold": 0}, "key 'exit_threshold': .*greater than 0"),
        ({"skip_set": {"attn": [-1]}}, "skip set: attn holds -1, but layers are integers from 0"),
        ({"skip_set": {"heads": [1]}}, "a skip set takes the keys 'attn' and 'mlp'"),
        ({"skip_set": None}, "a skip set takes the keys 'attn' and 'mlp'"),
        ({"quantised": {"format": "fp8"}}, "format is 'fp8', but it must be one of int8, int4"),
        ({"model": IDENTITY | {"size": 7}}, "unknown key 'model.size'"),
        ({"model": IDENTITY | {"num_layers": 1}}, r"attn layer 1, but this model has 1"),
        ({"provenance": {"seed": 0, "trials": 3}}, "lacks the key 'provenance.conditions'"),
        ({"prompt_lookup": {"gamma": 0}}, "key 'prompt_lookup.gamma': .*greater than or equal to 1"),
        ({"prompt_lookup": {}}, "lacks the key 'prompt_lookup.gamma'; search again"),
        ({"prompt_lookup": {"gamma": 4, "depth": 2}}, "unknown key 'prompt_lookup.depth'; remove it"),
        (
            {"prompt_lookup": {"gamma": 4, "min_ngram": 5, "max_ngram": 3}},
            "key 'prompt_lookup': min_ngram is 5, but it must be at most max_ngram, 3",
        ),
        (
            {"selfspec_version": 3, "key of version 3": 0},
            "has selfspec_version 3, but this selfspec reads 1 and 2; search ag",
        ),
        ({"selfspec_version": "1"}, "has selfspec_version '1', but this selfspec reads 1 and 2"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_an_invalid_plan_is_refused_with_key_and_problem(edit: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(EDITABLE | edit))
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_pretrained(path)
    assert str(caught.value).startswith(f"plan {path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["skip_set", "gamma"])
def test_a_plan_without_a_required_key_is_refused(key: str) -> None:
    data = {name: value for name, value in EDITABLE.items() if name != key}
    with pytest.raises(PlanError, match=f"plan lacks the key '{key}'; search again"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", '{"gamma": 4,}', "gamma: 4"])
def test_text_that_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"p\.json is not JSON \(.* at line 1\); save the plan again"):
        Plan.from_json(text, source="p.json")


@pytest.mark.parametrize("text", ["[]", "null", "4", '{"gamma": 4}', '{"model_type": "llama"}'])
def test_json_that_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is not a selfspec plan: it lacks selfspec_version; make a plan with"):
        Plan.from_json(text)


def test_a_missing_file_is_an_error_with_the_command_that_makes_a_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no plan at .*absent\.json; make a plan with 'selfspec search MODEL --out"):
        Plan.from_pretrained(tmp_path / "absent.json")
    with pytest.raises(PlanError, match=r"no plan at .*selfspec_plan\.json"):
        Plan.from_pretrained(tmp_path)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(PlanError, match=r"cannot be read: .*utf"):
        Plan.from_pretrained(tmp_path / "weights")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptLookup(), "PromptLookup lacks 'gamma'; add it"),
        (lambda: PromptLookup(gamma=0), r"PromptLookup's gamma: .*greater than or equal to 1 \(given: 0\)"),
        (lambda: PromptLookup(gamma=4, longest=3), "PromptLookup takes no 'longest'; leave it out"),
        (lambda: PromptLookup(gamma=4, min_ngram=5, max_ngram=3), "PromptLookup: min_ngram is 5, but it must be at"),
        (lambda: RoundCosts(rows=1, draft_step=0.1, agreement=[0.5]), "RoundCosts lacks 'rounds'; add it"),
        (lambda: PassLengths(rows=1, target=[1, 1]), "PassLengths: target is .*, but a pass over t tokens must have"),
    ],
)
def test_an_invalid_part_made_by_hand_is_refused_with_its_class_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}") as caught:
        make()
    assert "\n" not in str(caught.value)


# --- Writing completely or not at all ---


def test_saving_replaces_the_old_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan(skip_set=SkipSet(), gamma=1).save(path)
    Plan(skip_set=SkipSet(), gamma=2).save(path)
    assert Plan.from_pretrained(path).gamma == 2
    assert os.listdir(tmp_path) == ["plan.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_saving_in_a_missing_directory_or_in_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*plan\.json: No such file or directory"):
        Plan.none().save(tmp_path / "absent" / "plan.json")
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"cannot make the directory .*taken: File exists"):
        Plan.none().save_pretrained(tmp_path / "taken")


# --- The model of the plan ---


def test_a_plan_fits_the_model_it_was_made_for() -> None:
    model = tiny_model("qwen3")
    plan = Plan(skip_set=SkipSet(attn={LAYERS - 1}), gamma=2, model=ModelIdentity.of(model.config))
    plan.check_fits(model.config)
    assert wrap(model, plan).plan == plan


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral", {}, "made for llama with 7 layers, but this model is mistral with 7; run 'selfspec search'"),
        ("llama", {"num_hidden_layers": 8}, "made for llama with 7 layers, but this model is llama with 8"),
        ("llama", {"intermediate_size": 83}, "made for a llama with another config"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "another config"),
    ],
    ids=["another family", "another depth", "another width", "another RoPE"],
)
def test_a_plan_for_another_model_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    plan = Plan(skip_set=SkipSet(attn={1}), gamma=2, model=ModelIdentity.of(tiny_model("llama").config))
    with pytest.raises(PlanError, match=message):
        wrap(tiny_model(family, **changes), plan)


def test_a_skip_set_outside_the_model_is_refused_without_an_identity() -> None:
    with pytest.raises(PlanError, match=r"names attn layer 7, but this model has 7 \(0\.\.6\)"):
        wrap(tiny_model("llama"), Plan(skip_set=SkipSet(attn={7}), gamma=2))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "phi3"])
def test_the_fingerprint_survives_saving_casting_and_another_pad_token(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    fingerprint = config_fingerprint(model.config)
    model.config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    loaded.pad_token_id, loaded.eos_token_id = 5, [3, 4]
    assert config_fingerprint(loaded) == fingerprint
    assert config_fingerprint(model.to(torch.bfloat16).config) == fingerprint
    model.set_attn_implementation("eager")
    assert config_fingerprint(model.config) == fingerprint


def test_the_fingerprint_ignores_new_settings_with_default_values() -> None:
    config = tiny_model("llama").config
    before = config_fingerprint(config)
    later = type("LaterConfig", (type(config),), {"clip_queries": None})
    config.__class__ = later
    config.clip_queries = None
    assert config_fingerprint(config) == before
    config.clip_queries = 7.0
    assert config_fingerprint(config) != before
