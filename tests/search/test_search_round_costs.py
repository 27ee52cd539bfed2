"""Round costs: match shares, costs for other numbers of rows, and plans with both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import FIRST_DROPPED, damped_model, prompts
from profiles import costs_of, measuring, profile_of
from replays import random_prompts
from selfspec_search import Progress, Sampling, SearchResult, SearchSettings, load_study, repick, search
from selfspec_search.confirm.confirm import Confirmed
from selfspec_search.confirm.contender import Contender
from selfspec_search.profile.profile import Profile
from selfspec_search.profile.round_costs import BatchCostProbe, match_shares, strip_trailing_zeros
from selfspec_search.replay.lookup_table import LookupTable
from selfspec_search.replay.texts import Text
from transformers import PreTrainedModel

from selfspec import Plan, PlanError, PlanWarning, wrap
from selfspec.cli.formatting import facts
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.round_costs import MATCHES, RoundCosts

KNOWN = RoundCosts(
    rows=2,
    draft_step=0.1,
    rounds=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
    agreement=[0.7, 0.5],
    lookup=0.01,
    matches=[[0.2, 0.5]] * 5,
)
CALIBRATION, HELD_OUT = random_prompts(5, 11, 2, 7), random_prompts(3, 13, 6, seed=2)
SETTINGS = {"trials": 5, "gamma_max": 3, "new_tokens": 19, "confirm": 1, "repeats": 1, "confirm_texts": 2}


@pytest.fixture
def model() -> PreTrainedModel:
    return damped_model("llama", FIRST_DROPPED)


# --- Match shares ---


def naive_shares(texts: list[list[int]], prompts: list[int], depths: int) -> list[list[float]]:
    """Match shares by definition: at each start, copy after the latest of the longest earlier matches."""
    drafted, accepted = np.zeros((5, 2)), np.zeros((5, 2))
    for text, prompt in zip(texts, prompts, strict=True):
        for start in range(prompt, len(text)):
            context, best, place = text[:start], 0, 0
            for end in range(1, start):
                length = 0
                while length < min(8, end) and context[end - 1 - length] == context[start - 1 - length]:
                    length += 1
                if length and length >= best:
                    best, place = length, end
            if not best:
                continue
            at = max(index for index, least in enumerate(MATCHES) if least <= best)
            copy = list(context)
            for depth in range(min(depths, len(text) - start)):
                copy.append(copy[place + depth])
                drafted[at, min(depth, 1)] += 1
                if copy[-1] != text[start + depth]:
                    break
                accepted[at, min(depth, 1)] += 1
    return ((accepted + 0.5) / (drafted + 1)).tolist()


@pytest.mark.parametrize("depths", [1, 3, 16])
@pytest.mark.parametrize("vocabulary", [1, 2, 5, 211])
def test_match_shares_equal_a_naive_count(depths: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    written = [torch.randint(vocabulary, (length,), generator=generator) for length in (37, 13, 5)]
    written.append(written[0][:11].repeat(5))  # a text with long matches
    lengths = [7, 2, 1, 13]
    texts = [
        Text(tokens=tokens, prompt=prompt, allowed=len(tokens) - prompt)
        for tokens, prompt in zip(written, lengths, strict=True)
    ]
    table = LookupTable.of(texts, depths)
    expected = naive_shares([tokens.tolist() for tokens in written], lengths, depths)
    assert match_shares(texts, table, depths) == [pytest.approx(pair) for pair in expected]


def test_match_shares_without_matches_are_one_half_and_unreached_depths_are_stripped() -> None:
    text = Text(tokens=torch.arange(19), prompt=7, allowed=12)  # no token occurs twice
    assert match_shares([text], LookupTable.of([text], 3), 3) == [[0.5, 0.5]] * 5
    assert strip_trailing_zeros([0.5, 0.0, 0.25, 0.0, 0.0]) == [0.5, 0.0, 0.25]
    assert strip_trailing_zeros([0.0, 0.0]) == strip_trailing_zeros([]) == [0.0]


# --- Costs for other numbers of rows ---


@pytest.mark.parametrize("known", [KNOWN, KNOWN.model_copy(update={"matches": [], "lookup": 0.0})])
@pytest.mark.slow
def test_round_costs_for_other_rows_have_new_seconds_and_the_same_agreement(
    known: RoundCosts, model: PreTrainedModel
) -> None:
    texts = [Text(tokens=prompt, prompt=len(prompt) - 2, allowed=2) for prompt in random_prompts(5, 11, 7)]
    others = {"sampling": Sampling(), "backend": None, "compile": None, "pass_lengths": None}
    probe = BatchCostProbe(model=model, draft_spec=DraftSpec.of(FIRST_DROPPED), texts=texts, **others)
    for rows in (1, 7):  # 7 rows need more tokens than the texts have
        found = probe.round_costs(known, rows)
        assert RoundCosts(**found.model_dump()) == found, "the measured round costs are valid"
        assert found.rows == rows
        assert len(found.rounds) == len(known.rounds)
        assert found.rounds == sorted(found.rounds)
        assert 0 < found.draft_step < 5
        assert (found.lookup > 0) == bool(known.matches), "without prompt lookup"
        kept = ("agreement", "matches")
        assert [getattr(found, name) for name in kept] == [getattr(known, name) for name in kept]


# --- A search ---

PROFILE = profile_of(costs_of(attention=0.001, mlp=0.002, gamma_max=6, captured=True))


@pytest.fixture
def fixed_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured times decide nothing: costs are fixed, and plans with layer skipping win."""

    def rank(self: Confirmed) -> bool:
        return not self.prediction.drafting.gamma

    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", measuring(PROFILE))
    monkeypatch.setattr("selfspec_search.profile.round_costs.CYCLES", 1)
    monkeypatch.setattr(Confirmed, "rank", property(rank))
    monkeypatch.setattr(Contender, "is_faster_than", lambda self, plain: True)


@pytest.mark.usefixtures("fixed_times")
def test_the_policy_adapts_for_measured_rows_and_between_them_but_not_beyond(model: PreTrainedModel) -> None:
    progress: list[Progress] = []
    result = search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS, more_rows=[5, 1, 5]), progress.append)
    plan = result.plan
    assert plan.rows == [1, 5]
    assert progress[-1] == Progress(phase="rows", done=1, total=1)
    assert dict(facts(result))["rows"] == "the policy adapts for 1 to 5, by what 1, 5 cost"
    assert plan.round_costs[0].agreement[0] > 0
    assert Plan.from_json(plan.to_json()) == plan
    between = plan.round_costs_for(2)
    low, high = plan.round_costs
    assert between.rounds == pytest.approx([low.rounds[n] + (high.rounds[n] - low.rounds[n]) / 4 for n in range(7)])
    spec = wrap(model, plan)

    def policy_for(rows: int) -> str:
        tokens, mask = prompts(*range(3, 3 + rows))
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 13}
        assert torch.equal(spec.generate(tokens, **options), model.generate(tokens, **options))
        return spec.stats.policy

    assert [policy_for(rows) for rows in (1, 2, 5)] == ["adaptive"] * 3
    with pytest.warns(PlanWarning, match="plan knows what 1 and 5 rows cost, not 6"):
        assert policy_for(6).startswith("none")


@pytest.mark.usefixtures("fixed_times")
def test_a_plan_leaves_out_rows_for_which_memory_does_not_suffice(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_costs = BatchCostProbe.round_costs

    def short_of_memory(probe: BatchCostProbe, known: RoundCosts, rows: int) -> RoundCosts:
        if rows == 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")
        return round_costs(probe, known, rows)

    monkeypatch.setattr(BatchCostProbe, "round_costs", short_of_memory)
    with pytest.warns(PlanWarning, match="memory does not suffice for 5 rows"):
        result = search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS, more_rows=[5, 3]))
    assert result.plan.rows == [1, 3]


@pytest.mark.usefixtures("fixed_times")
@pytest.mark.parametrize("sampled", [True, False])
def test_a_result_says_whether_texts_were_sampled(model: PreTrainedModel, sampled: bool) -> None:
    sampling = Sampling(do_sample=True, temperature=0.7) if sampled else Sampling()
    result = search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS, sampling=sampling))
    assert dict(facts(result))["tokens per round"].endswith(", sampled") == sampled
    differing = [row["differing texts"] for row in result.rows() if row["plan"] != "plain decoding"]
    assert set(differing) == {"" if sampled else "0"}
    assert result.plan.rows == [1]


@pytest.mark.usefixtures("fixed_times")
def test_repick_measures_more_rows_and_keeps_the_lookup_length_of_the_study(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, longest = str(tmp_path / "trials.db"), list[object]()

    def measured(*args: object, gamma_max: int, **kwargs: object) -> Profile:
        longest.append(gamma_max)
        return PROFILE

    search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS, storage=storage, lookup_max=5))
    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", measured)
    study = load_study(storage)

    def again(**changes: object) -> SearchResult:
        return repick(model, study, SearchSettings(**SETTINGS, **changes))

    assert again().plan.rows == [1]
    assert again(more_rows=[3]).plan.rows == [1, 3]
    (without,) = again(lookup=False).plan.round_costs
    assert (without.matches, without.lookup) == ([], 0.0)
    assert longest == [5, 5, 3], "5 with prompt lookup, as in the study; 3 without"


# --- Files ---


def test_round_costs_without_lookup_are_read() -> None:
    written = json.loads(Plan(skip_set=FIRST_DROPPED, gamma=3, round_costs=[KNOWN]).to_json())
    for key in ("lookup", "matches"):
        del written["round_costs"][0][key]
    (costs,) = Plan.from_json(json.dumps(written)).round_costs
    assert (costs.lookup, costs.matches, costs.rows) == (0.0, [], 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round_costs": {"matches": [[0.5, 0.5]] * 3}}, "matches has 3 entries, but must have 5 or none"),
        ({"round_costs": {"matches": [[0.5]] * 5}}, "round_costs.0.matches.0"),
        ({"round_costs": {"rounds": [1.0, 0.0]}}, "round_costs.0.rounds.1"),
        ({"round_costs": {"draft_step": -1.0}}, "round_costs.0.draft_step"),
        ({"round_costs": {"agreement": []}}, "round_costs.0.agreement"),
        ({"round_costs": {"rows": 0}}, "round_costs.0.rows"),
        ({"round_costs": {"rounds": [1.0, 2.0]}}, "gamma is 3, but its round_costs for 2 rows end at 1 drafted tokens"),
        ({"round_costs": [KNOWN.model_dump()] * 2}, "plan has two round_costs for 2 rows; remove one of them"),
        ({"gamma": 7}, "gamma is 7, but its round_costs for 2 rows end at 6"),
    ],
)
def test_a_plan_with_invalid_round_costs_is_refused_in_one_line(changes: dict[str, object], message: str) -> None:
    written = json.loads(Plan(skip_set=FIRST_DROPPED, gamma=3, round_costs=[KNOWN]).to_json())
    for key, value in changes.items():
        written[key] = [written[key][0] | value] if isinstance(value, dict) else value
    with pytest.raises(PlanError) as caught:
        Plan.from_json(json.dumps(written))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Value error" not in str(caught.value)
    assert len(str(caught.value)) < 250, "the message does not repeat the round costs"
