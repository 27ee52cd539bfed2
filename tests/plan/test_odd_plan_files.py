"""Plan files that nobody writes on purpose: one line, at once, with little memory, nothing unescaped."""

from __future__ import annotations

import base64
import json
import os
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model
from transformers import AutoConfig

from selfspec import Plan, PlanError, PlanWarning, RoundCosts, SkipSet, wrap
from selfspec.errors import LONGEST_QUOTE, SelfspecError, excerpt, printable, shortened
from selfspec.plan.draft_spec import MOST_VOCABULARY, SubVocabulary
from selfspec.plan.plan import MOST_BYTES
from selfspec.plan.provenance import ModelIdentity
from selfspec.plan.strict_json import MOST_LEVELS

PLAN = {"selfspec_version": 2, "skip_set": {"attn": [1], "mlp": []}, "gamma": 3}
FIGURES = {"tokens_per_round": 2.1, "acceptance_rate": 0.7, "tokens_per_second": 50.0, "speedup": 1.2}
FOUND = {"conditions": {"device": "cpu", "dtype": "float32"}, "seed": 3, "trials": 5}
HOSTILE = "\x1b]0;title\x07\n\r\u202e\x9b31m"
"""Characters that command a terminal, break the line or reverse it."""


def refusal(text: str) -> str:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    message = str(caught.value)
    assert printable(message) == message
    assert len(message) < 400
    return message


def edited(**parts: Any) -> str:
    return refusal(json.dumps(PLAN | parts))


# --- Compressed vocabularies ---


def test_a_vocabulary_is_inflated_no_further_than_the_largest_vocabulary() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(2**27), 9)).decode()
    assert len(bomb) < MOST_BYTES
    tracemalloc.start()
    assert f"more than {MOST_VOCABULARY} tokens" in edited(draft_vocabulary=bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_the_largest_vocabulary_is_read() -> None:
    assert SubVocabulary.of([MOST_VOCABULARY - 1], MOST_VOCABULARY).tokens == (MOST_VOCABULARY - 1,)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-3], lambda data: data + b"more", lambda data: data * 2, lambda data: b""],
    ids=["cut", "longer", "twice", "nothing"],
)
def test_a_cut_or_longer_vocabulary_is_refused(damage: Callable[[bytes], bytes]) -> None:
    data = damage(zlib.compress(bytes([5] * 10)))
    assert "cannot be decoded" in edited(draft_vocabulary=base64.b64encode(data).decode())


def test_a_vocabulary_beyond_the_models_is_refused() -> None:
    vocabulary = SubVocabulary.of([3, 2000], 2001).code
    with pytest.raises(PlanError, match=r"draft_vocabulary has token 2000, but this model has 0\.\."):
        wrap(tiny_model("llama"), Plan(skip_set=SkipSet(), gamma=2, draft_vocabulary=vocabulary))


# --- JSON ---


@pytest.mark.parametrize("start", ["[", '{"a":', '[{"selfspec_version":'])
def test_deep_nesting_is_refused(start: str) -> None:
    assert f"nests deeper than {MOST_LEVELS} levels" in refusal(start * 100_000)
    closing = "".join({"[": "]", "{": "}"}[bracket] for bracket in reversed(start) if bracket in "[{")
    deep = f'{{"selfspec_version": 2, "gamma": {start * 30}1{closing * 30}}}'
    assert f"nests deeper than {MOST_LEVELS} levels" in refusal(deep)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"gamma": 3, "gamma": 4}', "the key 'gamma' is given twice"),
        ('{"skip_set": {"attn": [1], "attn": [2]}}', "the key 'attn' is given twice"),
        ('{"gamma": NaN}', "'NaN' is not a finite number"),
        ('{"gamma": -Infinity}', "'-Infinity' is not a finite number"),
        ('{"gamma": 1e999}', "'1e999' is not a finite number"),
        (f'{{"gamma": {"9" * 5000}}}', "is not a plan: Exceeds the limit"),
    ],
)
def test_json_that_no_plan_holds_is_refused(text: str, message: str) -> None:
    assert message in refusal(text)


@pytest.mark.parametrize("key", ["self", "cls", "data", "__init__", "model_config", ""])
def test_every_unknown_key_is_refused_by_name(key: str) -> None:
    assert f"unknown key '{key}'" in edited(**{key: 1})
    assert f"unknown key 'prompt_lookup.{key}'" in edited(prompt_lookup={"gamma": 4, key: 1})


@pytest.mark.parametrize("version", [True, 1.0, 2.0, None, [1], "2", -(10**4000)], ids=excerpt)
def test_a_version_is_an_integer(version: Any) -> None:
    assert "has selfspec_version" in edited(selfspec_version=version)


@pytest.mark.parametrize("layer", [-1, 10**6, 10**4000, 1.0, True, None, [], HOSTILE], ids=excerpt)
def test_a_layer_is_an_integer_that_models_have(layer: Any) -> None:
    for kind in ("attn", "mlp"):
        assert f"{kind} holds" in edited(skip_set={kind: [layer]})
        assert f"{kind} holds" in edited(quantised={"format": "int8", kind: [layer]})


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("costs", [{"rounds": [1.0] * 10**5}, {"agreement": [0.5] * 10**5}, {"rows": 10**30}])
def test_round_costs_have_the_size_of_a_measurement(version: int, costs: dict[str, Any]) -> None:
    whole = {"rows": 1, "draft_step": 0.1, "rounds": [1.0] * 9, "agreement": [0.5]} | costs
    parts = {"outlook": whole} if version == 1 else {"round_costs": [whole]}
    assert "round_costs.0" in edited(selfspec_version=version, **parts)


@pytest.mark.parametrize("name", ["predicted", "predicted_on_held_out", "measured"])
@pytest.mark.parametrize(
    "odd",
    [
        {"speedup": -1.2},
        {"speedup": 1e300},
        {"speedup": 10**400},
        {"tokens_per_second": -50.0},
        {"tokens_per_round": -0.1},
        {"acceptance_rate": 1.5},
        {"acceptance_rate": -0.5},
        {"agreement": [0.5, 7.0]},
        {"interval": [-1.0, 2.0]},
        {"interval": [0.5] * 3},
        {"spread": [1.0] * 1000},
        {"texts": -3},
    ],
    ids=excerpt,
)
def test_figures_that_cannot_be_are_refused(name: str, odd: dict[str, Any]) -> None:
    (key,) = odd
    assert f"plan key 'provenance.{name}.{key}" in edited(provenance=FOUND | {name: FIGURES | odd})
    Plan.from_json(json.dumps(PLAN | {"provenance": FOUND | {name: FIGURES}}))


def test_thousands_of_problems_are_one_message() -> None:
    assert edited(**{f"key {number}": 1 for number in range(30_000)}).count("unknown key") == 1


# --- Messages ---


@pytest.mark.parametrize("where", ["key", "value", "layer", "format", "nested key", "version", "version 1"])
def test_nothing_of_a_file_reaches_the_terminal_unescaped_or_at_length(where: str) -> None:
    odd = HOSTILE + "x" * 10_000
    parts: dict[str, dict[str, Any]] = {
        "key": {odd: 1},
        "value": {"gamma": odd},
        "layer": {"skip_set": {"attn": [odd]}},
        "format": {"quantised": {"format": odd}},
        "nested key": {"skip_set": {odd: []}},
        "version": {"selfspec_version": odd},
        "version 1": {"selfspec_version": 1, "outlook": {odd: 1}},
    }
    assert "x" * (LONGEST_QUOTE + 1) not in edited(**parts[where])


def test_the_names_of_a_plans_model_are_escaped_and_cut() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=2)
    for identity in (
        ModelIdentity(model_type=HOSTILE + "y" * 999, num_layers=2, fingerprint="0"),
        ModelIdentity(model_type="llama", num_layers=2, fingerprint=HOSTILE + "y" * 999),
    ):
        with pytest.raises(PlanError) as caught:
            Plan(skip_set=SkipSet(), gamma=2, model=identity).check_fits(config)
        assert printable(caught.value) == str(caught.value)
        assert "y" * (LONGEST_QUOTE + 1) not in str(caught.value)


def test_the_names_of_files_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / HOSTILE.replace("/", "")
    path.write_text(json.dumps({"selfspec_version": 1, "skip_set": {}, "gamma": 2, "resume": True}))
    with pytest.warns(PlanWarning) as warned:
        Plan.from_pretrained(path)
    assert printable(warned[0].message) == str(warned[0].message)
    path.write_text("{")
    with pytest.raises(PlanError) as caught:
        Plan.from_pretrained(path)
    assert printable(caught.value) == str(caught.value)
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.from_pretrained("a null\0character")


def test_every_error_is_one_line_whoever_raises_it() -> None:
    assert str(SelfspecError(f"model '{HOSTILE}'")) == "model '\\x1b]0;title\\x07\\n\\r\\u202e\\x9b31m'"
    assert str(SelfspecError("é 漢字 \\ 'x'")) == "é 漢字 \\ 'x'"


@pytest.mark.parametrize("value", ["x" * 10**6, [0] * 10**5, 10**5000, {"a": "\n" * 99}, b"\0" * 999], ids=type)
def test_an_excerpt_is_short(value: object) -> None:
    assert 0 < len(excerpt(value)) <= LONGEST_QUOTE
    assert 0 < len(shortened(str(type(value)) * 99)) <= LONGEST_QUOTE


# --- What is no ordinary file ---


def read(path: Path | str) -> str:
    with pytest.raises(PlanError) as caught:
        Plan.from_pretrained(path)
    return str(caught.value)


def test_a_plan_is_no_device_and_no_directory(tmp_path: Path) -> None:
    for device in ("/dev/zero", "/dev/null"):
        assert f"plan {device} is a device; give a file" in read(device)
    (tmp_path / "selfspec_plan.json").mkdir()
    assert "cannot be read: Is a directory" in read(tmp_path)


def test_a_named_pipe_without_a_writer_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not JSON" in read(tmp_path / "pipe")


def test_a_plan_may_come_through_a_pipe() -> None:
    out, into = os.pipe()
    os.write(into, json.dumps(PLAN).encode())
    os.close(into)
    try:
        assert Plan.from_pretrained(f"/dev/fd/{out}").gamma == 3
    finally:
        os.close(out)


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.touch()
    os.truncate(path, 2**33)
    assert f"plan {path} is larger than 1 MiB" in read(path)


def test_a_part_made_by_hand_refuses_an_argument_called_self() -> None:
    with pytest.raises(PlanError, match="RoundCosts takes no 'self'; leave it out"):
        RoundCosts(**{"rows": 1, "draft_step": 0.1, "rounds": [1.0, 1.1], "agreement": [0.5], "self": 3})
