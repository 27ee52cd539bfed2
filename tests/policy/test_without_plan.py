"""Without a plan: prompt lookup where a short measurement says that it pays, and the model's own text."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import ENDS_SKIPPED, damped_model, prompts, tiny_model
from transformers import PreTrainedModel

from selfspec import Plan, wrap
from selfspec.policy import without_plan as module
from selfspec.policy.without_plan import DRAFTED, pass_seconds, quick_plan
from selfspec.runtime.runtime import Runtime

FLAT = {n: 0.01 + 0.0001 * n for n in DRAFTED}
STEEP = {n: 0.01 * (n + 1) for n in DRAFTED}
GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture
def model() -> PreTrainedModel:
    return damped_model("llama", ENDS_SKIPPED)


def test_lookup_takes_part_where_longer_passes_are_cheap(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pass_seconds", lambda runtime: FLAT)
    plan = quick_plan(Runtime(model))
    assert plan.prompt_lookup is not None
    assert plan.gamma == 0
    (costs,) = plan.round_costs
    assert costs.rounds[4] == pytest.approx(FLAT[4])
    assert costs.rounds[5] == pytest.approx(FLAT[4] + 0.0001)  # between the measured lengths


def test_plain_decoding_where_a_draft_can_never_pay(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pass_seconds", lambda runtime: STEEP)
    assert quick_plan(Runtime(model)) == Plan.none()


def test_slow_passes_are_timed_at_fewer_lengths(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(pass_seconds(Runtime(model))) <= set(DRAFTED)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    few = pass_seconds(Runtime(model))
    assert list(few) == list(DRAFTED[:2])
    assert all(seconds > 0 for seconds in few.values())


def test_the_measurement_stays_within_the_models_positions() -> None:
    assert set(pass_seconds(Runtime(tiny_model("llama", max_position_embeddings=7)))) <= {0, 1, 2, 4}


def test_text_without_a_plan_is_the_models_own(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pass_seconds", lambda runtime: FLAT)
    spec = wrap(model)
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11] * 3])
    assert torch.equal(spec.generate(tokens, **GREEDY), model.generate(tokens, **GREEDY))
    assert spec.stats.policy == "adaptive"
    assert spec.stats.drafted > 0, "the text repeats itself, so lookup drafts"
    batch, mask = prompts(13, 7, 10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = spec.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(ours, model.generate(batch, attention_mask=mask, **GREEDY))
    assert any("knows what 1 row cost, not 3, so they are decoded plainly" in str(one.message) for one in caught)


def test_without_a_plan_a_draft_model_drafts(model: PreTrainedModel) -> None:
    spec = wrap(model, draft_model=tiny_model("llama", num_hidden_layers=1))
    tokens, mask = prompts(9)
    ours = spec.generate(tokens, attention_mask=mask, **GREEDY)
    assert torch.equal(ours, model.generate(tokens, attention_mask=mask, **GREEDY))
    assert spec.plan.gamma == 4
    assert spec.stats.drafted > 0


def test_passes_compiled_on_a_cpu_are_not_measured(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pass_seconds", lambda runtime: pytest.fail("each length would be compiled"))
    runtime = Runtime(model)
    runtime.passes.compile = True
    assert quick_plan(runtime) == Plan.none()
