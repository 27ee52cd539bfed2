"""Padded passes are lossless, and never write beyond the cache."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from captured import (
    GAMMA,
    GREEDY,
    LOOKUP,
    NEW_TOKENS,
    SAMPLING,
    assert_replays,
    assert_same_draws,
    batch,
    fixed_widths,
    graphs_of,
    tape_of,
    taped,
)
from models import FIRST_DROPPED, assert_exercised, damp, damped_model, prompts, tiny_model
from near_ties import judge_every_token
from quantised_models import damped_model as quantisable
from quantised_models import drafting, few_prompts
from torch import Tensor
from transformers import PreTrainedModel

import selfspec.runtime.kv_cache
import selfspec.runtime.prefill
from selfspec import Plan, PlanError, PlanWarning, SkipSet, wrap
from selfspec.benchmark.lossless import compare
from selfspec.models.support import SUPPORTED_MODEL_TYPES
from selfspec.plan.round_costs import PassLengths, RoundCosts
from selfspec.runtime.forward_pass import Pass
from selfspec.runtime.kv_cache import KVCache
from selfspec.runtime.prefill import prefill
from selfspec.runtime.runtime import Runtime

TARGET = [3, 3, 3, 5, 5]


def padded(rows: int = 1, *, target: list[int] = TARGET, draft: int = 2, **changes: Any) -> Plan:
    """A plan that pads passes for `rows` rows."""
    settings = {
        "skip_set": FIRST_DROPPED,
        "gamma": GAMMA,
        "pass_lengths": PassLengths(rows=rows, target=target, draft=draft),
    }
    return Plan(**settings | changes)


def searched_in(dtype: str = "float32", *, compiled: bool = False, device: str = "cpu") -> dict[str, Any]:
    """The provenance of a plan from a search under these conditions."""
    conditions = {"device": device, "dtype": dtype, "compiled": compiled}
    return {"conditions": conditions, "seed": 0, "trials": 1}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each pass, without the passes of prefill."""
    lengths: list[int] = []
    begin, inner = KVCache.begin, selfspec.runtime.prefill.prefill
    prompt = False

    def noted(self: KVCache, t: int, **options: Any) -> Pass:
        if not prompt:
            lengths.append(t)
        return begin(self, t, **options)

    def of_the_prompt(*args: Any) -> None:
        nonlocal prompt
        prompt = True
        inner(*args)
        prompt = False

    monkeypatch.setattr(KVCache, "begin", noted)
    monkeypatch.setattr(selfspec.runtime.prefill, "prefill", of_the_prompt)
    return lengths


@pytest.fixture
def no_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has exactly the requested slots."""
    monkeypatch.setattr(selfspec.runtime.kv_cache, "SLOT_BUCKET", 1)


# --- Lossless ---

WINDOWED = ["gemma3_text", "mistral"]
FEW = {"llama", "qwen3_moe", *WINDOWED}
FAMILIES = [
    pytest.param(family, marks=[] if family in FEW else pytest.mark.slow) for family in sorted(SUPPORTED_MODEL_TYPES)
]


@pytest.mark.parametrize("lengths", [(11,), (13, 7, 10)], ids=["one row", "rows of unequal length"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_passes_are_lossless(family: str, lengths: tuple[int, ...], passes: list[int]) -> None:
    model, given = damped_model(family, FIRST_DROPPED), batch(*lengths)
    spec = wrap(model, padded(len(lengths)))
    expected = model.generate(**given, **GREEDY)
    passes.clear()
    ours = spec.generate(**given, **GREEDY)
    assert torch.equal(ours, expected)
    assert_exercised(spec.stats, ours, given["input_ids"].shape[1])
    assert set(passes) == {2, 3, 5} or set(passes) == {2, 5}, "draft passes, and verify passes of all drafts"


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_never_see_the_padding(family: str, passes: list[int]) -> None:
    # The padding is longer than the window: visible padding would hide all real tokens.
    model, given = damped_model(family, FIRST_DROPPED), batch(11, 5)
    spec = wrap(model, padded(2, target=[9, 9, 9, 9], draft=8))
    assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert set(passes) == {8, 9}
    assert 0.2 < spec.stats.acceptance_rate < 0.9


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
@pytest.mark.parametrize("lengths", [(11,), (13, 7, 10)], ids=["one row", "rows of unequal length"])
def test_plain_decoding_is_padded(family: str, lengths: tuple[int, ...], passes: list[int]) -> None:
    model, given = damped_model(family, FIRST_DROPPED), batch(*lengths)
    spec = wrap(model, Plan.none(pass_lengths=PassLengths(rows=len(lengths), target=[4])))
    assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert passes == [4] * NEW_TOKENS
    assert spec.stats.drafted == 0


def test_lengths_outside_the_table_are_not_padded(llama: PreTrainedModel, passes: list[int]) -> None:
    spec = wrap(llama, padded(target=[2, 2], draft=1))
    given = batch(11)
    assert torch.equal(spec.generate(**given, **GREEDY), llama.generate(**given, **GREEDY))
    assert {1, GAMMA + 1} <= set(passes) <= {1, 2, 3, GAMMA + 1}
    assert PassLengths(rows=1, target=[2, 2]).of_target(3) == 3


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [({"exit_threshold": 0.04}, {2, 3, 5}), ({"prompt_lookup": LOOKUP}, {2, 3, 5}), ({"gamma": 0}, {3})],
    ids=["threshold", "lookup", "never drafts"],
)
def test_every_drafter_is_padded(
    changes: dict[str, Any], lengths: set[int], llama: PreTrainedModel, passes: list[int]
) -> None:
    given = batch(22, 5, 14)
    given["input_ids"][:, -3:] = given["input_ids"][:, :3]  # something to look up in the first row
    spec = wrap(llama, padded(3, **changes))
    assert torch.equal(spec.generate(**given, **GREEDY), llama.generate(**given, **GREEDY))
    assert set(passes) == lengths
    if spec.plan.gamma:
        assert 0 < spec.stats.accepted < spec.stats.drafted


def test_a_policy_chooses_among_padded_draft_lengths(llama: PreTrainedModel, passes: list[int]) -> None:
    round_costs = RoundCosts(
        rows=1, draft_step=0.2, rounds=[1.0, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25], agreement=[0.9, 0.8]
    )
    spec = wrap(llama, padded(round_costs=[round_costs], target=[3, 3, 5, 5, 8, 8, 8]))
    options, given = GREEDY | {"max_new_tokens": 60}, batch(11)
    assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
    assert len(spec.stats.choices) > 1
    assert set(passes) <= {2, 3, 5, 8}


def test_a_quantised_draft_is_padded(passes: list[int]) -> None:
    model, given = quantisable("llama"), few_prompts(13, 7, 10)
    plan = drafting(trimmed=True, pass_lengths=PassLengths(rows=3, target=TARGET, draft=4))
    spec, bare = wrap(model, plan), wrap(model, drafting(trimmed=True))
    assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert set(passes) >= {4, 5}
    assert 1 not in passes
    bare.generate(**given, **GREEDY)
    assert spec.stats.history == bare.stats.history


def test_rows_end_at_their_own_stop_tokens(llama: PreTrainedModel) -> None:
    given = batch(13, 7, 10)
    free = llama.generate(**given, **GREEDY)[:, 13:]
    options = GREEDY | {"eos_token_id": [int(free[0, 5]), int(free[1, 11])]}
    spec = wrap(llama, padded(3))
    assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
    assert spec.runtime.pass_lengths is not None


def test_scores_and_logits_exclude_the_padding(llama: PreTrainedModel) -> None:
    options = GREEDY | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    given = batch(13, 7)
    ours, theirs = wrap(llama, padded(2)).generate(**given, **options), llama.generate(**given, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.logits) == len(ours.scores) == NEW_TOKENS
    for mine, their in ((ours.scores, theirs.scores), (ours.logits, theirs.logits)):
        torch.testing.assert_close(torch.stack(mine), torch.stack(their), rtol=0, atol=1e-4)


def test_padded_and_unpadded_passes_compute_the_same_logits(llama: PreTrainedModel) -> None:
    runtime = Runtime(llama, FIRST_DROPPED, pass_lengths=PassLengths(rows=2, target=[7, 7], draft=6))
    runtime.reserve(2, 32)
    tokens, _ = prompts(11, 11)
    prefill(runtime, tokens, torch.tensor([11, 4]))
    for view, t in (("target", 1), ("target", 2), ("draft", 1), ("target", 3)):
        some = prompts(t, t, seed=1)[0]
        long = runtime.run(view, some)  # type: ignore[arg-type]
        with runtime.padded(None):
            torch.testing.assert_close(long, runtime.run(view, some), rtol=0, atol=1e-5)  # type: ignore[arg-type]
        assert long.shape[1] == t
        assert runtime.cache.lengths.tolist() == [11, 4]


# --- Sampling ---


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3}], ids=str)
def test_with_the_same_seed_padded_and_unpadded_passes_draw_the_same_tokens(options: dict[str, Any]) -> None:
    # In float64 rounding changes a draw too rarely to fail this test.
    model = damped_model("llama", FIRST_DROPPED, dtype=torch.float64)
    spec, unpadded = wrap(model, padded(3)), wrap(model, padded(3, pass_lengths=None))
    assert_same_draws(unpadded, spec, batch(13, 7, 10), **SAMPLING | {"top_k": 0} | options)
    assert spec.runtime.pass_lengths is not None


# --- Rows and conditions without padding ---


@pytest.mark.parametrize("lengths", [(11,), (11, 5), (11, 5, 7, 3)], ids=len)
def test_other_numbers_of_rows_are_not_padded(
    lengths: tuple[int, ...], llama: PreTrainedModel, passes: list[int]
) -> None:
    spec, given = wrap(llama, padded(3)), batch(*lengths)
    assert torch.equal(spec.generate(**given, **GREEDY), llama.generate(**given, **GREEDY))
    assert spec.runtime.passes.lengths is None
    assert set(passes) <= set(range(1, GAMMA + 2))


@pytest.mark.slow
def test_padded_and_unpadded_requests_alternate(llama: PreTrainedModel, passes: list[int], no_slack: None) -> None:
    spec = wrap(llama, padded(2))
    for lengths in ((11,), (11, 5), (30,), (7, 19), (3, 2, 1), (22, 22)):
        passes.clear()
        given = batch(*lengths)
        assert torch.equal(spec.generate(**given, **GREEDY), llama.generate(**given, **GREEDY))
        assert (spec.runtime.passes.lengths is not None) == (len(lengths) == 2) == (1 not in passes)


def test_num_return_sequences_are_rows(llama: PreTrainedModel) -> None:
    spec = wrap(llama, padded(4))
    spec.generate(**batch(11, 5), do_sample=True, num_return_sequences=2, max_new_tokens=5)
    assert spec.runtime.pass_lengths is not None


@pytest.mark.parametrize(
    "conditions", [{"dtype": "bfloat16"}, {"compiled": True}, {"device": "a card"}], ids=lambda c: next(iter(c))
)
def test_a_plan_from_other_conditions_does_not_pad(
    conditions: dict[str, Any], llama: PreTrainedModel, passes: list[int]
) -> None:
    with pytest.warns(PlanWarning, match="plan was searched with"):
        spec = wrap(llama, padded(provenance=searched_in(**conditions)))
    given = batch(11)
    assert torch.equal(spec.generate(**given, **GREEDY), llama.generate(**given, **GREEDY))
    assert spec.runtime.passes.lengths is None
    assert set(passes) <= set(range(1, GAMMA + 2))


def test_a_plan_pads_only_while_the_model_has_the_dtype_of_the_search(passes: list[int]) -> None:
    model = damped_model("llama", FIRST_DROPPED)
    spec, given = wrap(model, padded(provenance=searched_in())), batch(11)
    spec.generate(**given, **GREEDY)
    assert spec.runtime.pass_lengths == spec.plan.pass_lengths
    passes.clear()
    model.to(torch.float64)
    assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert spec.runtime.passes.lengths is None
    assert 1 in passes
    model.to(torch.float32)
    assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert spec.runtime.pass_lengths == spec.plan.pass_lengths


def test_custom_logits_processors_do_not_change_the_padding(llama: PreTrainedModel, passes: list[int]) -> None:
    class Own:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores * 2

    spec, given = wrap(llama, padded(2)), batch(11, 5)
    assert torch.equal(spec.generate(**given, **GREEDY, logits_processor=[Own()]), llama.generate(**given, **GREEDY))
    assert spec.stats.slower_paths
    assert passes == [3] * NEW_TOKENS


# --- Room ---


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 5, 6, 7, 8, 19])
@pytest.mark.parametrize("lengths", [(1,), (13,), (13, 7, 13)], ids=["a token", "one row", "rows of unequal length"])
@pytest.mark.slow
def test_the_last_padded_pass_of_a_request_fits_into_the_cache(
    lengths: tuple[int, ...], new_tokens: int, llama: PreTrainedModel, no_slack: None
) -> None:
    longest = 16  # 12 tokens more than a verify pass
    spec = wrap(llama, padded(len(lengths), target=[longest] * (GAMMA + 1), draft=longest - 1))
    given, options = batch(*lengths), GREEDY | {"max_new_tokens": new_tokens}
    assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
    assert spec.runtime.cache.slots == max(lengths) + new_tokens + GAMMA + 1 + longest - 1
    assert all(t.isfinite().all() for i in spec.runtime.views.layer_shapes for t in spec.runtime.cache.layer(i))


@pytest.mark.parametrize(
    ("target", "draft", "most"), [([1, 2, 3], 1, 0), ([3, 3, 3], 1, 2), ([1, 2, 9], 2, 6), ([2], 7, 6), ([], 1, 0)]
)
def test_pass_lengths_report_the_most_padding(target: list[int], draft: int, most: int) -> None:
    pass_lengths = PassLengths(rows=1, target=target, draft=draft)
    assert pass_lengths.most == most
    assert [pass_lengths.of_target(t) for t in range(1, 6)] == target + list(range(len(target) + 1, 6))


def test_prefill_is_not_padded(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfspec.runtime.prefill, "CPU_CHUNK", 3)
    begin, lengths = KVCache.begin, list[int]()

    def noted(self: KVCache, t: int, **options: Any) -> Pass:
        lengths.append(t)
        return begin(self, t, **options)

    monkeypatch.setattr(KVCache, "begin", noted)
    spec, given = wrap(llama, padded(target=[9] * 4, draft=9)), batch(12)
    assert torch.equal(spec.generate(**given, **GREEDY), llama.generate(**given, **GREEDY))
    assert lengths[:4] == [3, 3, 3, 2]
    assert set(lengths[4:]) == {9}


# --- Captured and compiled ---


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.slow
def test_replayed_rounds_of_padded_passes_are_lossless_and_equal_unpadded_rounds(
    family: str, rows: int, no_slack: None
) -> None:
    model = damped_model(family, FIRST_DROPPED)
    spec, uncaptured = taped(model, padded(rows)), fixed_widths(model, padded(rows, pass_lengths=None))
    assert_replays(spec, uncaptured, batch(*(13, 7, 10)[:rows]))
    assert spec.runtime.pass_lengths is not None


@pytest.mark.slow
def test_padded_graphs_never_serve_unpadded_requests(llama: PreTrainedModel, no_slack: None) -> None:
    spec = taped(llama, padded(1))
    for lengths in ((13,), (13, 7), (13,), (24,)):
        for _ in range(2):
            given = batch(*lengths)
            assert torch.equal(spec.generate(**given, **GREEDY), llama.generate(**given, **GREEDY))
            assert spec.stats.captured


def test_padded_plain_decoding_is_captured(llama: PreTrainedModel) -> None:
    spec, given = taped(llama, Plan.none(pass_lengths=PassLengths(rows=1, target=[3]))), batch(11)
    for _ in range(2):
        assert torch.equal(spec.generate(**given, **GREEDY), llama.generate(**given, **GREEDY))
    assert spec.stats.captured
    assert tape_of(spec).played > NEW_TOKENS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_passes_are_padded_and_lossless() -> None:
    model, given = tiny_model("llama", num_hidden_layers=2), batch(11, 5)
    damp(model, skipped := SkipSet(attn={1}), 0.03)
    spec = wrap(model, padded(2, skip_set=skipped), compile=True)
    assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert spec.stats.compiled
    assert 0 < spec.stats.accepted < spec.stats.drafted
    assert set(spec.runtime.passes._functions) == {("draft", 2), ("target", 5)}


# --- bfloat16 ---


@pytest.mark.rounding
@pytest.mark.parametrize(
    ("plan", "lengths"),
    [(padded(), {2, 3, 5}), (Plan.none(pass_lengths=PassLengths(rows=1, target=[5])), {5})],
    ids=["drafts", "plain"],
)
def test_in_bfloat16_padded_output_differs_from_plain_decoding_by_near_ties_alone(
    plan: Plan, lengths: set[int], passes: list[int]
) -> None:
    # Whether any token differs depends on the processor. Whether passes are padded does not.
    model = damped_model("llama", FIRST_DROPPED, dtype=torch.bfloat16)
    spec = wrap(model, plan)
    written = [spec.generate(**batch(11, seed=seed), **GREEDY)[0] for seed in (0, 9, 11)]
    assert set(passes) == lengths
    verdict = judge_every_token(spec, wrap(model, Plan.none()), [(row[:11], row[11:]) for row in written])
    assert verdict.errors == 0, str(verdict)
    assert verdict.tokens >= 3 * NEW_TOKENS


def test_compare_restores_the_padding_of_the_runtime() -> None:
    model = damped_model("llama", FIRST_DROPPED, dtype=torch.bfloat16)
    pass_lengths = PassLengths(rows=1, target=TARGET)
    runtime = Runtime(model, FIRST_DROPPED, pass_lengths=pass_lengths)
    compare(runtime, [(torch.tensor([3, 5]), torch.tensor([7, 11]), torch.tensor([7, 13]))], gamma=GAMMA)
    assert runtime.passes.lengths == pass_lengths


# --- In a plan file ---


def test_pass_lengths_survive_json() -> None:
    measured = PassLengths(rows=8, target=[2, 2], gains={"target 1": [1.25, 1.125, 1.5]})
    for plan in (padded(), padded(3, target=[], draft=1), Plan.none(pass_lengths=measured)):
        assert Plan.from_json(plan.to_json()) == plan
    data = json.loads(padded(3).to_json())
    assert data["pass_lengths"] == {"rows": 3, "target": TARGET, "draft": 2}
    assert "pass_lengths" not in json.loads(padded(pass_lengths=None).to_json())
    assert PassLengths(rows=1, target=[1]).draft == 1


@pytest.mark.parametrize(
    ("pass_lengths", "message"),
    [
        ({"rows": 1, "target": [3, 3, 2]}, "key 'pass_lengths': .*a pass over t tokens must have at least t"),
        ({"rows": 1, "target": [0]}, "key 'pass_lengths.target.0': .*greater than or equal to 1"),
        ({"rows": 0, "target": [1]}, "key 'pass_lengths.rows': .*greater than or equal to 1"),
        ({"rows": 1, "target": [1], "draft": 0}, "key 'pass_lengths.draft': .*greater than or equal to 1"),
        ({"rows": 1, "target": [129]}, "key 'pass_lengths.target.0': .*less than or equal to 128"),
        ({"rows": 1, "target": [1.5]}, "key 'pass_lengths.target.0': .*valid integer"),
        ({"rows": 1}, "lacks the key 'pass_lengths.target'"),
        ({"target": [1]}, "lacks the key 'pass_lengths.rows'"),
        ({"rows": 1, "target": [1], "verify": 2}, "unknown key 'pass_lengths.verify'"),
        ({"rows": 1, "target": [1], "gains": {"draft": [1.25, 1.5]}}, "key 'pass_lengths.gains.draft': .*at least 3"),
    ],
)
def test_invalid_pass_lengths_are_refused(pass_lengths: dict[str, Any], message: str) -> None:
    data = {"selfspec_version": 2, "skip_set": {}, "gamma": 2, "pass_lengths": pass_lengths}
    with pytest.raises(PlanError, match=message) as error:
        Plan.from_json(json.dumps(data))
    assert "\n" not in str(error.value)
    with pytest.raises(PlanError, match=message):
        Plan(skip_set=SkipSet(), gamma=2, pass_lengths=pass_lengths)


@pytest.mark.slow
def test_new_pass_lengths_drop_the_graphs() -> None:
    spec = taped(damped_model("llama", FIRST_DROPPED), padded())
    given = batch(11)
    expected = spec.model.generate(**given, **GREEDY)
    for lengths in (None, padded(draft=4).pass_lengths):  # requests have the lengths of the plan
        with spec.runtime.padded(lengths):
            assert len(graphs_of(spec)) == 0
        for _ in range(3):
            assert torch.equal(spec.generate(**given, **GREEDY), expected)
        assert len(graphs_of(spec)) >= 2
