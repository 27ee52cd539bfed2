"""Damaged inputs of every kind: read, or refused in one line, in bounded time and memory, with nothing half-written.

Each test makes some hundred inputs from valid ones; a few thousand if marked slow. `SELFSPEC_FUZZ=100000` makes more,
and `SELFSPEC_FUZZ_SEED=1` makes others.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from commands import run
from mutations import ODD, bounded, count, mutants, mutate_bytes, read, seed
from saved import PLAN, save_model
from selfspec_search.report import ReportData, make_page

from selfspec import Plan, SelfspecError, wrap
from selfspec.errors import printable
from selfspec.huggingface.loading import Loaded, load, quiet_hugging_face
from selfspec.huggingface.prompts import read_prompts
from selfspec.plan.draft_spec import SubVocabulary

COSTS = {"rows": 1, "draft_step": 0.1, "rounds": [1.0] * 9, "agreement": [0.7, 0.5], "matches": [[0.5, 0.6]] * 5}
FIGURES = {"tokens_per_round": 2.1, "acceptance_rate": 0.7, "tokens_per_second": 50.0, "speedup": 1.2}
FOUND = {
    "conditions": {"device": "cpu", "dtype": "float32", "rows": 1, "context": 90, "sampling": {"do_sample": False}},
    **{"seed": 3, "trials": 5, "study": "name", "settings": {"gamma_max": 8}, "errors": {"speedup": -0.1}},
    **{"predicted": FIGURES, "measured": FIGURES | {"interval": [1.1, 1.3], "spread": [1.0, 2.0, 3.0]}},
}
VERSION_2: dict[str, Any] = {
    "selfspec_version": 2,
    "skip_set": {"attn": [1, 2], "mlp": [2]},
    "quantised": {"format": "int4", "group_size": 32, "attn": [3], "mlp": [], "head": True},
    "draft_vocabulary": SubVocabulary.of(range(100), 257).code,
    **{"gamma": 4, "exit_threshold": 0.3, "prompt_lookup": {"gamma": 5, "min_ngram": 2, "max_ngram": 8}},
    **{"round_costs": [COSTS, COSTS | {"rows": 4}], "pass_lengths": {"rows": 1, "target": [3, 3, 3], "draft": 2}},
    "model": {"model_type": "llama", "num_layers": 7, "fingerprint": "0123456789abcdef"},
    "provenance": FOUND,
}
VERSION_1 = {
    "selfspec_version": 1,
    **{name: VERSION_2[name] for name in ("skip_set", "quantised", "gamma", "prompt_lookup", "provenance")},
    **{"outlook": COSTS | {"branching": 0.1}, "other_rows": [COSTS | {"rows": 4}], "resume": True},
    "padding": VERSION_2["pass_lengths"],
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    quiet_hugging_face()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about odd values
        yield


def some(default: int, slow: int) -> Any:
    """Parameters of a test: some inputs, and more that only CI makes."""
    return pytest.mark.parametrize("inputs", [default, pytest.param(slow, marks=pytest.mark.slow)])


def share(refused: int, inputs: int) -> None:
    """Most mutations damage, but not all: a reader that refuses all or none is not tested."""
    assert 0.2 * inputs < refused < inputs


# --- Plans ---


@some(400, 4000)
@pytest.mark.parametrize("valid", [VERSION_1, VERSION_2], ids=["version 1", "version 2"])
def test_plans(valid: dict[str, Any], inputs: int, tmp_path: Path) -> None:
    path, refused = tmp_path / "plan.json", 0
    for name, content in mutants(valid, count(inputs)):
        path.write_bytes(content)

        def use() -> None:
            plan = Plan.from_pretrained(path)
            assert Plan.from_json(plan.to_json()) == plan
            assert printable(plan) == str(plan)

        refused += read(use, name) is not None
    share(refused, count(inputs))


@some(5, 100)
def test_reports_of_plans(inputs: int) -> None:
    drawn = 0
    for name, content in mutants(VERSION_2, 10**9):
        try:
            plan = Plan.from_json(content.decode())
        except (SelfspecError, UnicodeDecodeError):
            continue
        assert read(lambda plan=plan: make_page(ReportData(source="plan.json", plan=plan)), name) is None
        drawn += 1
        if drawn == count(inputs):
            break


# --- Prompt files ---


@some(400, 4000)
@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_prompt_files(suffix: str, inputs: int, tmp_path: Path) -> None:
    path, refused = tmp_path / f"prompts{suffix}", 0
    lines: list[Any] = [
        {"prompt": "one é"},
        {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "three"}]},
    ]
    for (name, first), (_, second) in zip(*(mutants(line, count(inputs)) for line in lines), strict=True):
        content = first + b"\r\n" + second
        path.write_bytes(content if name % 3 else mutate_bytes(content, Random(name)))
        refused += read(lambda: read_prompts(path), name) is not None
    assert refused > 0
    assert suffix == ".txt" or refused < count(inputs)


# --- Models ---


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def decode(directory: Path) -> None:
    loaded = load(str(directory), device="cpu")
    spec = wrap(loaded.model, PLAN)
    spec.generate(torch.tensor([[5, 9, 11]]), max_new_tokens=3, do_sample=False)


@some(100, 700)
def test_configs(inputs: int, model_dir: Path) -> None:
    valid, refused = json.loads((model_dir / "config.json").read_text()), 0
    before = sorted(os.listdir(model_dir))
    for name, content in mutants(valid, count(inputs)):
        (model_dir / "config.json").write_bytes(content)
        refused += read(lambda: decode(model_dir), name) is not None
    assert sorted(os.listdir(model_dir)) == before
    share(refused, count(inputs))


@some(100, 700)
def test_generation_configs(inputs: int, model_dir: Path) -> None:
    valid = {"eos_token_id": [0, 7], "pad_token_id": 0, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
    for name, content in mutants(valid, count(inputs)):
        (model_dir / "generation_config.json").write_bytes(content)
        read(lambda: decode(model_dir), name)


# --- Command lines ---


@pytest.fixture
def _loaded_once(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(str(model_dir), device="cpu")

    def again(name: str, *_: object, **__: object) -> Loaded:
        return loaded if name == str(model_dir) else load(name)

    monkeypatch.setattr("selfspec.cli.generate.load_model", again)


@some(300, 3000)
@pytest.mark.usefixtures("_loaded_once")
def test_command_lines(inputs: int, model_dir: Path, tmp_path: Path) -> None:
    plan, prompts = PLAN.save(tmp_path / "plan.json"), tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    before, stray = sorted(os.listdir(tmp_path)), "no-model"
    valid = [
        ["generate", model_dir, "--plan", plan, "--prompt", "x", "--max-new-tokens", 3, "--temperature", 0.5],
        ["generate", model_dir, "--plan", plan, "--prompt-file", prompts, "--max-new-tokens", 2, "--seed", 3, "--chat"],
        ["search", stray, "--prompts", prompts, "--out", tmp_path / "x.json", "--trials", 3, "--memory", "1G"],
        ["bench", stray, "--plan", plan, "--prompts", prompts, "--repeats", 1, "--draft-model", stray],
        ["profile", stray, "--contexts", "128,512", "--rows", 2, "--gamma-max", 3],
        ["report", stray, "--study", "x", "--out", tmp_path / "x.html"],
    ]
    refused = 0
    for index in range(seed() * 10**6, seed() * 10**6 + count(inputs)):
        random = Random(index)
        line = [str(argument) for argument in random.choice(valid)]
        for _ in range(random.randint(1, 3)):
            place = random.randrange(1, len(line))
            odd = [str(value) for value in ODD if not isinstance(value, int) or abs(value) < 10**50]
            match random.randrange(4):
                case 0:
                    del line[place]
                case 1:
                    line.insert(place, random.choice(line))
                case _:
                    line[place] = random.choice(odd)
            if len(line) == 1:
                break
        with bounded():
            result = run(*line)
        assert result.exit_code in (0, 1, 2), (line, result.output, result.exception)
        if result.exit_code:
            *_, last = result.stderr[:-1].split("\n")
            assert last.startswith("error: ") or not result.stderr, (line, result.stderr)
            assert printable(last) == last, line
            assert len(result.stderr) < 10_000, line
            refused += 1
    share(refused, count(inputs))
    assert sorted(os.listdir(tmp_path)) == before
