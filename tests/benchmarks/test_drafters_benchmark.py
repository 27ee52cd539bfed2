"""The benchmark of drafters: prices, and a small run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import drafters
import pytest
from selfspec_search import SearchSettings
from workloads.prices import Prices

from selfspec import Stats
from selfspec.plan.round_costs import RoundCosts


def test_a_decoding_is_priced_by_its_counts() -> None:
    round_costs = RoundCosts(rows=1, draft_step=0.5, rounds=[1.0, 1.25, 1.5], agreement=[0.5], lookup=0.125)
    stats = Stats(tokens=11, steps=3, pass_lengths={1: 2, 3: 4}, choices={"none": 2, "layers 1": 4})
    without = 2 * 1.0 + 4 * 1.5 + 3 * 0.5
    assert Prices(round_costs=round_costs, looks=False).seconds(stats) == pytest.approx(without)
    assert Prices(round_costs=round_costs, looks=True).seconds(stats) == pytest.approx(without + 6 * 0.125)
    assert Prices(round_costs=round_costs, looks=False).speed(stats) == pytest.approx(11 / without)


@pytest.mark.slow
def test_the_benchmark_runs_at_a_small_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    less = {"confirm": 1, "confirm_texts": 2, "repeats": 1, "gamma_max": 3, "lookup_max": 4}
    monkeypatch.setattr("selfspec_search.profile.profile.CYCLES", 1)
    monkeypatch.setattr("selfspec_search.profile.round_costs.CYCLES", 1)
    monkeypatch.setattr(drafters, "SearchSettings", partial(SearchSettings, **less))
    small = "--prompts 1 --trials 2 --calibration 3 --repeats 1 --batch-repeats 1 --rows 1 2 --new-tokens 12"
    found = drafters.main([*small.split(), "--out", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text("utf8"))["results"] == found["results"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["benchmark"] == "drafters"
    assert [(r["workload"], r["rows"]) for r in found["results"]] == [
        (name, rows) for rows in (1, 2) for name in ("code", "editing", "prose", "mixed")
    ]
    for result in found["results"]:
        one_row = {"layers"} if result["rows"] == 1 else set()
        padded = {"plain, padded"} & set(result["drafters"])  # if the profile adopts a padding
        assert set(result["drafters"]) == {"plain", "lookup", "cascade", "adaptive"} | one_row | padded
        assert result.get("baseline", "plain") in result["drafters"]
        assert all(line["differing"] == 0 for line in result["drafters"].values())
        assert result["drafters"]["plain"]["priced"] == 1
