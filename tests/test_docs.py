"""The README and the pages under docs/: their examples run, and the files and options that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

import selfspec
from selfspec import Plan, PromptLookup, SkipSet
from selfspec.cli import app
from selfspec.demo import model_dir

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("demo", "search", "generate", "bench", "profile", "report")


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf8"), re.DOTALL)


def test_the_ten_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Plan(skip_set=SkipSet(attn={4, 5}), gamma=2, prompt_lookup=PromptLookup(gamma=4)).save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    ten_lines, by_hand, metrics = python_blocks(ROOT / "README.md")
    names = {"name": str(model_dir())}
    exec(ten_lines.replace("max_new_tokens=256", "max_new_tokens=8"), names)
    assert isinstance(names["tokenizer"], PreTrainedTokenizerBase)
    exec(by_hand, names | {"small": names["model"]})
    if "prometheus_client" in metrics:  # an optional package
        pytest.importorskip("prometheus_client")
    exec(metrics, names)


def test_every_option_that_a_page_names_exists() -> None:
    runner = CliRunner()
    helps = "".join(runner.invoke(app, [name, "--help"], env={"COLUMNS": "300"}).output for name in COMMANDS)
    known = set(re.findall(r"--[a-z][a-z-]+", helps))
    for page in PAGES:
        commands = re.sub(r"```sh\n.*?python .*?```", "", page.read_text("utf8"), flags=re.DOTALL)
        named = {
            option
            for line in commands.splitlines()
            if "python benchmarks/" not in line
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)
        }
        assert named <= known, f"{page.name} names {sorted(named - known)}"


def test_every_file_that_the_architecture_page_names_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf8").replace("`.../", "`search/selfspec_search/")
    paths = re.findall(r"`((?:selfspec|search|tests|benchmarks)/[\w./]*)`", text)
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_public_name_in_an_example_is_public() -> None:
    for page in PAGES:
        for block in python_blocks(page):
            for imported in re.findall(r"from selfspec import ([\w, ]+)", block):
                assert set(imported.split(", ")) <= set(selfspec.__all__)
