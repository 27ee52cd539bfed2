from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from models import FIRST_DROPPED, damped_model, prompts
from torch import Tensor
from transformers import PreTrainedModel

from selfspec import InputError, PassLengths, Plan, Stats
from selfspec.benchmark.contenders import (
    EARLY_EXIT,
    GENERATE,
    OURS,
    PADDED,
    PLAIN,
    PROMPT_LOOKUP,
    EarlyExit,
    PeerError,
    early_exits,
    fastest,
    line_up,
)
from selfspec.benchmark.measure import Measurement, measure
from selfspec.runtime.runtime import Runtime

PROMPTS = [row[mask.bool()] for row, mask in zip(*prompts(11, 5, 7), strict=True)]
PLAN = Plan(skip_set=FIRST_DROPPED, gamma=3)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return damped_model("llama", FIRST_DROPPED)


@dataclass
class Scripted:
    """Returns prepared tokens, and records each call."""

    name: str
    log: list[tuple[str, int]]
    new: list[Tensor] = field(default_factory=lambda: [torch.tensor([1, 2, 3])])
    stats: Stats | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def decode(self, prompt: Tensor, new_tokens: int) -> Tensor:
        self.log.append((self.name, len(prompt)))
        return self.new[len(self.log) % len(self.new)]


def measurement(
    seconds: list[list[list[float]]], tokens: list[list[int]] | None = None, names: Sequence[str] = "abc"
) -> Measurement:
    array = np.array(seconds)
    tokens = tokens or [[10] * array.shape[2]] * array.shape[0]
    return Measurement(
        contenders=[Scripted(name, []) for name in names[: len(array)]],
        prompts=PROMPTS[: array.shape[2]],
        seconds=array,
        outputs=[[torch.zeros(n, dtype=torch.long) for n in row] for row in tokens],
        unsteady=[],
    )


def test_every_repeat_decodes_every_prompt_with_every_contender_in_rotating_order() -> None:
    log: list[tuple[str, int]] = []
    seen: list[tuple[int, int]] = []
    measure(
        [Scripted(name, log) for name in "abc"],
        PROMPTS,
        new_tokens=3,
        repeats=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert log[:3] == [("a", 11), ("b", 11), ("c", 11)]  # the longest prompt, untimed
    orders = ["".join(name for name, _ in log[start : start + 3]) for start in range(3, len(log), 3)]
    assert orders == ["abc", "bca", "cab", "bca", "cab", "abc"]
    assert [length for _, length in log[3::3]] == [11, 5, 7, 11, 5, 7]
    assert seen == [(done, 18) for done in range(1, 19)]


def test_a_contender_with_different_tokens_in_each_repeat_is_reported() -> None:
    fickle = Scripted("fickle", [], [torch.tensor([1]), torch.tensor([2])])
    assert measure([fickle], PROMPTS[:1], new_tokens=1, repeats=2).unsteady == ["fickle"]


@pytest.mark.parametrize(("prompts", "new_tokens", "repeats"), [(PROMPTS, 0, 1), (PROMPTS, 1, 0), ([], 1, 1)])
def test_a_benchmark_without_work_is_an_error(prompts: list[Tensor], new_tokens: int, repeats: int) -> None:
    with pytest.raises(InputError, match="at least one prompt"):
        measure([], prompts, new_tokens=new_tokens, repeats=repeats)


def test_speed_uses_the_median_repeat_of_each_prompt() -> None:
    #                     repeats of prompts 1 and 2: medians 2 and 3
    measured = measurement([[[1.0, 3.0], [2.0, 9.0], [9.0, 1.0]]], [[30, 20]])
    assert measured.tokens_per_second("a") == pytest.approx(50 / 5)


def test_a_ratio_compares_speeds_and_its_interval_is_paired() -> None:
    # Prompts and repeats differ widely, but b always takes half of a's time, so a paired interval has no width.
    a = np.random.default_rng(0).uniform(1, 9, size=(5, 3))
    measured = measurement([a.tolist(), (a / 2).tolist()])
    ratio = measured.ratio("b", "a")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
    assert str(ratio) == "2.00x (2.00-2.00)"


def test_an_interval_includes_prompts_without_a_speedup() -> None:
    measured = measurement([[[4.0, 4.0, 4.0]] * 3, [[4.0, 4.0, 1.0]] * 3])
    ratio = measured.ratio("b", "a")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((12 / 9, 1, 4))
    assert measured.ratio("b", "a", seed=0) == ratio


def test_all_contenders_write_the_same_tokens_in_float32(llama: PreTrainedModel) -> None:
    lined_up = line_up(llama, PLAN, PROMPTS, 17)
    measured = measure(lined_up.contenders, PROMPTS, new_tokens=17, repeats=1)
    scores = {score.name: score for score in measured.scores(lined_up.ours.runtime, gamma=3)}
    assert list(scores) == [GENERATE, PLAIN, EARLY_EXIT, PROMPT_LOOKUP, OURS]
    assert lined_up.absent == []
    assert all(score.differing.differing_tokens == 0 for score in scores.values())
    ours, plain = scores[OURS].stats, scores[PLAIN].stats
    assert None not in (ours, plain)
    assert ours.tokens == plain.tokens == 3 * 17  # without the warm-up
    assert 1 < ours.tokens_per_round < 4
    assert (plain.tokens_per_round, plain.drafted) == (1, 0)
    assert set(scores[OURS].to_dict()["ratios"]) == {PLAIN, GENERATE}


@pytest.mark.parametrize(
    ("target", "draft", "padded"),
    [([4], 1, True), ([2, 5, 5], 3, True), ([1, 4], 3, False), ([], 2, False)],
    ids=["plain", "all", "not passes over one token", "drafts"],
)
def test_plain_decoding_runs_unpadded_and_also_padded_if_the_plan_pads_its_passes(
    llama: PreTrainedModel, target: list[int], draft: int, padded: bool
) -> None:
    pass_lengths = PassLengths(rows=1, target=target, draft=draft)
    plan = PLAN.model_copy(update={"pass_lengths": pass_lengths})
    contenders = {one.name: one for one in line_up(llama, plan, PROMPTS, 7, peers=False).contenders}
    assert list(contenders) == [GENERATE, PLAIN, *[PADDED] * padded, OURS]
    found = {name: one.spec.runtime.pass_lengths for name, one in contenders.items() if name != GENERATE}
    assert found == {PLAIN: None, **({PADDED: pass_lengths} if padded else {}), OURS: pass_lengths}


@pytest.mark.parametrize(
    ("padded", "baseline", "speedup"),
    [([1.0, 9.0, 1.0], PADDED, 2.0), ([5.0, 5.0, 5.0], PLAIN, 4.0), ([1.0, 5.0, 9.0], PLAIN, 4.0)],
    ids=["faster but once", "slower", "slower but once"],
)
def test_speedups_are_over_the_faster_median_of_the_two_plain_decodings(
    llama: PreTrainedModel, padded: list[float], baseline: str, speedup: float
) -> None:
    seconds = [[[2.0]] * 3, [[each] for each in padded], [[0.5]] * 3, [[3.0]] * 3]
    measured = measurement(seconds, names=(PLAIN, PADDED, OURS, GENERATE))
    assert measured.baseline == baseline
    scores = {score.name: score for score in measured.scores(Runtime(llama), gamma=3)}
    assert set(scores[OURS].ratios) == {baseline, GENERATE}
    assert scores[OURS].ratios[baseline].value == speedup


def test_early_exit_restores_the_model_even_after_an_exception(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = llama.generation_config.to_dict()
    read = {}

    def truncate_and_fail(*_: Any, **options: Any) -> Tensor:
        read.update(options, drafts=llama.generation_config.num_assistant_tokens)
        llama.config.num_hidden_layers = 2
        raise RuntimeError("broken")

    monkeypatch.setattr(llama, "generate", truncate_and_fail)
    with pytest.raises(RuntimeError, match="broken"):
        EarlyExit(llama, exit_layer=2, draft_tokens=5).decode(PROMPTS[0], 3)
    assert (read["assistant_early_exit"], read["drafts"]) == (2, 5)
    assert llama.config.num_hidden_layers == 7
    assert llama.generation_config.to_dict() == before
    with pytest.raises(PeerError, match="assistant_early_exit cannot decode with this model: broken"):
        fastest(early_exits(llama), PROMPTS, 3)


def test_early_exits_cover_the_depth_without_the_whole_model(llama: PreTrainedModel) -> None:
    assert sorted({entrant.exit_layer for entrant in early_exits(llama)}) == [1, 2, 3, 5]
