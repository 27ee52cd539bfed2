"""`selfspec profile`: what it prints, writes and draws, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import commands
import pytest
from saved import CONTEXT
from selfspec_search.profile.profile import Profile

PNG = b"\x89PNG"


run, complaint = partial(commands.run, "profile"), partial(commands.complaint, "profile")


@pytest.fixture(autouse=True)
def _few_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfspec_search.profile.profile.CYCLES", 1)


def test_a_profile_is_printed_written_and_drawn(model_dir: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    result = run(model_dir, "--contexts", "29,11", "--rows", 2, "--gamma-max", 3, "--out", out, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    measured = Profile.from_dict(json.loads(out.read_text()))
    assert (measured.contexts, measured.rows, measured.gamma_max) == ((11, 29), 2, 3)
    lines = result.stdout.splitlines()
    header = next(index for index, line in enumerate(lines) if line.lstrip().startswith("context"))
    assert lines[header].split()[:8] == ["context", "pass", "of", "1", "2", "3", "4", "draft"]
    for line, context, costs in zip(lines[header + 1 :], measured.contexts, measured.costs, strict=False):
        cells = line.split()
        assert cells[0] == str(context)
        expected = [*costs.rounds, costs.measured["nothing"], costs.attention, costs.mlp, costs.layer, costs.fixed]
        assert [float(cell) for cell in cells[1:-1]] == pytest.approx([s * 1e3 for s in expected], rel=0.01, abs=6e-4)
    ratio = measured.costs[0].rounds[3] / measured.costs[0].rounds[0]
    assert f"a pass of 4 tokens costs, in plain passes: {ratio:.2f} at 11" in result.stdout
    assert "cpu, threads 1, float32, rows 2, eager, sdpa" in result.stdout
    assert plot.read_bytes().startswith(PNG)


def test_by_default_contexts_reach_as_far_as_the_model_allows(model_dir: Path, tmp_path: Path) -> None:
    assert run(model_dir, "--out", tmp_path).exit_code == 0
    written = json.loads((tmp_path / "profile.json").read_text())
    assert written["contexts"] == [CONTEXT - 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "0"], "--contexts is 0, but it must be at least 1"),
        (["--contexts", "128,-1"], "--contexts is -1, but it must be at least 1"),
        (["--contexts", "abc"], "--contexts is 'abc', but numbers of tokens are expected, as in 128,512,1024"),
        (["--contexts", ""], "--contexts is '', but numbers of tokens are expected, as in 128,512,1024"),
        (["--rows", "0"], "--rows is 0, but it must be at least 1"),
        (["--gamma-max", "0"], "--gamma-max is 0, but it must be at least 1"),
        (["--gamma-max", "65"], "--gamma-max is 65, but a plan's draft length is at most 64"),
        (["--out", "/nowhere/profile.json"], "cannot write /nowhere/profile.json: there is no directory /nowhere"),
        (["--plot", "/nowhere/profile.png"], "cannot write /nowhere/profile.png: there is no directory /nowhere"),
        (["--plot", "profile.gif"], "--plot is profile.gif, but a file that ends in .png, .svg, .pdf is expected"),
    ],
)
def test_bad_options_take_one_line_before_the_model_is_loaded(arguments: list[str], message: str) -> None:
    assert complaint("no/such/model/here", *arguments).startswith(message)


def test_a_context_beyond_the_models_positions_takes_one_line(model_dir: Path) -> None:
    said = complaint(model_dir, "--contexts", f"5,{CONTEXT}")
    assert said == (
        f"a context of {CONTEXT} tokens was given, but this model's positions end at {CONTEXT}; "
        f"give at most {CONTEXT - 1}, since a pass adds a token"
    )


@pytest.mark.slow
def test_nothing_is_drawn_with_where_no_plot_is_asked_for(model_dir: Path) -> None:
    code = (
        "import sys, selfspec_search.profile.profile; selfspec_search.profile.profile.CYCLES = 1\n"
        "from selfspec.cli import app\n"
        f"app(['profile', {str(model_dir)!r}, '--contexts', '5', '--gamma-max', '1'], standalone_mode=False)\n"
        "print('matplotlib' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "False"
