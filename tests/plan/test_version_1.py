"""Plans of earlier releases: retired parts are dropped, and one warning names them."""

from __future__ import annotations

import warnings

import pytest

from selfspec.errors import PlanWarning
from selfspec.plan import version_1


@pytest.fixture(autouse=True)
def _some_retired_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_1, "RETIRED", ("old", "part.option", "list.*.cost"))


def test_one_warning_names_every_retired_part_that_was_on() -> None:
    data = {"old": True, "part": {"option": 2, "kept": 1}, "list": [{"cost": 0.0}, {"cost": 0.5, "kept": 1}]}
    with pytest.warns(PlanWarning, match="plan p has parts that no longer exist.*: old, part.option, list.*.cost") as w:
        left = version_1.without_retired_parts(data, "plan p")
    assert len(w) == 1
    assert left == {"part": {"kept": 1}, "list": [{}, {"kept": 1}]}
    assert data["old"] is True, "the caller's data stay as they are"


def test_retired_parts_that_were_off_are_dropped_silently() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert version_1.without_retired_parts({"old": False, "part": {"option": None}}, "plan p") == {"part": {}}


def test_other_parts_are_left_for_the_plan_to_judge() -> None:
    data = {"unknown": 1, "part": 3, "list": "none"}
    assert version_1.without_retired_parts(data, "plan p") == data
