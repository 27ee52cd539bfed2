"""Plan files of version 1 are read: parts are renamed, and one warning names retired parts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from selfspec import PassLengths, Plan, PlanError, PlanWarning, RoundCosts
from selfspec.plan.version_1 import read_version_1

VERSION_1_COSTS = {"rows": 1, "draft_step": 0.1, "rounds": [1.0, 1.1, 1.2], "agreement": [0.7]}


def version_1(**parts: Any) -> str:
    return json.dumps({"selfspec_version": 1, "skip_set": {"attn": [1]}, "gamma": 2} | parts)


def test_version_1_is_read_with_the_names_of_version_2() -> None:
    three_rows = VERSION_1_COSTS | {"rows": 3, "looking": 0.01, "matches": [[0.5, 0.6]] * 5}
    lengths = {"rows": 1, "target": [3, 3, 3], "draft": 2}
    plan = Plan.from_json(version_1(outlook=VERSION_1_COSTS, other_rows=[three_rows], padding=lengths))
    costs = RoundCosts(rows=1, draft_step=0.1, rounds=[1.0, 1.1, 1.2], agreement=[0.7])
    more = costs.model_copy(update={"rows": 3, "lookup": 0.01, "matches": [[0.5, 0.6]] * 5})
    assert (plan.round_costs, plan.pass_lengths) == ([costs, more], PassLengths(**lengths))
    assert plan.selfspec_version == 2
    assert Plan.from_json(plan.to_json()) == plan


def test_invalid_plans_of_version_1_are_refused_in_one_line() -> None:
    for parts, message in (
        ({"outlook": 3}, "round_costs.0"),
        ({"outlook": VERSION_1_COSTS, "other_rows": 4}, "round_costs.1"),
        ({"padding": "no"}, "pass_lengths"),
        ({"gama": 3}, "unknown key 'gama'"),
    ):
        with pytest.raises(PlanError, match=message):
            Plan.from_json(version_1(**parts))


LOOKUP = {"gamma": 5, "min_ngram": 2, "max_ngram": 8}
FOUND = {"conditions": {"device": "cpu", "dtype": "float32"}, "seed": 3, "trials": 5}
COSTS = {"outlook": VERSION_1_COSTS, "other_rows": [VERSION_1_COSTS | {"rows": 3}]}
SIBLINGS = {"branching": 0.02, "rescued": 0.3}
WITH_SIBLINGS = {
    "outlook": VERSION_1_COSTS | SIBLINGS,
    "other_rows": [VERSION_1_COSTS | SIBLINGS | {"rows": 3}],
    "tree": {"siblings": 2, "width": 3},
}


@pytest.mark.parametrize(
    ("parts", "kept", "named"),
    [
        ({"resume": True}, {}, "resume"),
        ({"prompt_lookup": LOOKUP | {"checked": True}}, {"prompt_lookup": LOOKUP}, "prompt_lookup.checked"),
        ({"provenance": FOUND | {"profile": {"contexts": [7]}}}, {"provenance": FOUND}, "provenance.profile"),
        (
            WITH_SIBLINGS,
            COSTS,
            "tree, outlook.branching, outlook.rescued, other_rows.*.branching, other_rows.*.rescued",
        ),
    ],
)
def test_retired_parts_are_ignored_with_one_warning(parts: dict[str, Any], kept: dict[str, Any], named: str) -> None:
    with pytest.warns(PlanWarning) as caught:
        assert Plan.from_json(version_1(**parts)) == Plan.from_json(version_1(**kept))
    assert [str(w.message) for w in caught] == [f"plan has parts that no longer exist and are ignored: {named}"]


def test_retired_parts_that_were_off_are_dropped_silently() -> None:
    off = {"outlook": VERSION_1_COSTS | {"branching": 0.0, "rescued": 0.0}, "resume": False, "tree": None}
    assert Plan.from_json(version_1(**off)) == Plan.from_json(version_1(outlook=VERSION_1_COSTS))


def test_reading_version_1_does_not_change_the_callers_data() -> None:
    data = json.loads(version_1(**WITH_SIBLINGS))
    with pytest.warns(PlanWarning):
        read_version_1(data, "plan")
    assert data == json.loads(version_1(**WITH_SIBLINGS))
