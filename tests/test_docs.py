"""README and docs: options and files that they name exist, and their Python examples run on the embedded model."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from selfspec_search import SearchSettings
from transformers import AutoModelForCausalLM, AutoTokenizer

import selfspec
from selfspec.demo import calibration_prompts, model_dir

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("search", "generate", "bench", "demo", "report", "profile")
OTHER_PROGRAMS = ("pip", "pytest", "python", "optuna-dashboard")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf8"), re.DOTALL)


def options_of(command: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", run(command, "--help").stdout))


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    return {command: options_of(command) for command in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_in_a_page_is_an_option_of_a_command(page: Path, options: dict[str, set[str]]) -> None:
    inline = re.findall(r"`([^`\n]*)`", page.read_text("utf8"))
    ours = [code for code in inline if not code.startswith(OTHER_PROGRAMS)]
    named = {option for code in ours for option in re.findall(r"--[a-z][a-z-]*", code)}
    assert named <= set.union(*options.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_line_in_a_page_gives_its_command_options_that_exist(
    page: Path, options: dict[str, set[str]]
) -> None:
    for line in "".join(blocks(page, "sh")).splitlines():
        for command, arguments in re.findall(r"selfspec ([a-z]+)([^#]*)", line):
            assert set(re.findall(r"--[a-z][a-z-]*", arguments)) <= options[command], line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text("utf8")
    linked = [page.parent / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    named = [ROOT / name for name in re.findall(r"`((?:selfspec|search|benchmarks|tests)/[\w/.]+)`", text)]
    assert [path for path in linked + named if not path.exists()] == []


@pytest.mark.slow
def test_the_python_examples_run_on_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    selfspec.Plan(skip_set=selfspec.SkipSet(attn={4}), gamma=2).save("plan.json")
    monkeypatch.setattr("selfspec_search.SearchSettings", few_trials)
    monkeypatch.setattr("selfspec_search.profile.profile.CYCLES", 1)
    prompts = [json.loads(line)["prompt"] for line in calibration_prompts().read_text("utf8").splitlines()[:6]]
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    encoded = [torch.tensor(tokenizer(prompt)["input_ids"][-16:]) for prompt in prompts]
    small = AutoModelForCausalLM.from_pretrained(model_dir())
    names: dict[str, Any] = {"name": str(model_dir()), "small": small, "calibration": encoded[:4]}
    names["held_out"] = encoded[4:]
    for page in PAGES:
        for example in blocks(page, "python"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", selfspec.PlanWarning)
                exec(example, names)
    assert selfspec.Plan.from_pretrained("plan.json").provenance is not None  # the searched plan, written last


def few_trials(**settings: Any) -> SearchSettings:
    """The settings of an example, for a search of seconds."""
    return SearchSettings(**{**settings, "trials": 2, "new_tokens": 4, "gamma_max": 2, "confirm": 1, "repeats": 1})
