"""A separate draft model: the output is the target's own, and the draft model's cache is always right.

No test of the output shows a wrong draft, so `watched` compares the logits after every drafted token with the draft
model's own forward over the whole text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any

import pytest
import torch
from laws import OPTIONS, V, assert_sampled_texts_follow
from models import (
    ENDS_SKIPPED,
    FIRST_DROPPED,
    LAYERS,
    PAD,
    VOCABULARY,
    assert_exercised,
    damp,
    damped_model,
    prompts,
    tiny_model,
)
from pairs import text, tokenizer
from tape import NoReads, TapeRecorder
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList, PreTrainedModel

import selfspec.decoding.round
from selfspec import Format, InputError, Plan, Quantised, SelfSpeculator, SkipSet, UnsupportedModelError, wrap
from selfspec.benchmark.contenders import DRAFT_MODEL, OURS, line_up
from selfspec.decoding.drafter import NoDrafter
from selfspec.decoding.request import Request
from selfspec.drafters.draft_model import WIDEST_WITH_HEAD, DraftModelDrafter
from selfspec.models.support import SUPPORTED_MODEL_TYPES
from selfspec.models.views import run_view
from selfspec.plan.lookup import PromptLookup

LOOKUP = PromptLookup(gamma=4, min_ngram=1, max_ngram=3)
NEW_TOKENS = 33


def of_gamma(gamma: int, **settings: Any) -> Plan:
    return Plan(skip_set=SkipSet(), gamma=gamma, **settings)


def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model, and a draft model with weights of its own that is right about half of the time."""
    model = damped_model(family, ENDS_SKIPPED)
    draft_model = copy.deepcopy(model)
    damp(draft_model, ENDS_SKIPPED, 0.0)
    return model, draft_model


@cache
def llamas() -> tuple[PreTrainedModel, PreTrainedModel]:
    """One pair for all tests that do not change it."""
    return pair("llama")


@cache
def speculator(gamma: int = 3, *, lookup: bool = False, threshold: float | None = None) -> SelfSpeculator:
    model, draft_model = llamas()
    plan = of_gamma(gamma, prompt_lookup=LOOKUP if lookup else None, exit_threshold=threshold)
    return wrap(model, plan, draft_model=draft_model)


def batch(*lengths: int, **options: Any) -> dict[str, Any]:
    tokens, mask = prompts(*lengths)
    return {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False, **options}


def repetitive(rows: int, *, seed: int = 3) -> dict[str, Any]:
    """Prompts in which most tokens occur more than once, so that prompt lookup finds matches."""
    tokens, mask = prompts(*(11, 17, 5)[:rows], seed=seed)
    return batch(11) | {"input_ids": torch.where(mask.bool(), tokens % 5 + 1, PAD), "attention_mask": mask}


def assert_lossless(spec: SelfSpeculator, given: dict[str, Any]) -> Tensor:
    ours, theirs = spec.generate(**given), spec.model.generate(**given)
    assert torch.equal(ours, theirs), f"ours: {ours.tolist()}, theirs: {theirs.tolist()}"
    return ours


# --- The output is the model's own ---


@pytest.mark.parametrize("gamma", [1, 3, 6])
@pytest.mark.parametrize("lengths", [(11,), (13, 7, 10), (1, 9, 2)], ids=str)
def test_greedy_output_is_model_generates_and_every_draft_is_the_draft_models(
    gamma: int, lengths: tuple[int, ...]
) -> None:
    spec = speculator(gamma)
    with watched(spec) as seen:
        ours = assert_lossless(spec, batch(*lengths))
    if (gamma, lengths) == (3, (13, 7, 10)):
        assert_exercised(spec.stats, ours, 13)
    assert spec.stats.by_origin == {"draft model": [spec.stats.drafted, spec.stats.accepted]}
    assert list(spec.stats.choices) == [f"draft model {gamma}"]
    assert spec.stats.steps > 0
    assert 0 < spec.stats.accepted < spec.stats.drafted
    assert seen.drafts > 5
    assert seen.widths == {1, 2}, "some drafts must be accepted to the end, and some not"


FEW = ("gemma3_text", "phi3", "qwen3_moe")
OTHERS = [
    pytest.param(family, marks=pytest.mark.slow) for family in sorted(SUPPORTED_MODEL_TYPES.difference(FEW, {"llama"}))
]


@pytest.mark.parametrize("family", [*FEW, *OTHERS])
def test_every_family_drafts_for_itself(family: str) -> None:
    model, draft_model = pair(family)
    spec = wrap(model, of_gamma(3), draft_model=draft_model)
    given = batch(13, 7, 10, max_new_tokens=24)
    with watched(spec) as seen:
        ours = assert_lossless(spec, given)
    assert_exercised(spec.stats, ours, 13)
    assert seen.drafts > 5


def test_a_draft_model_of_another_shape_family_and_a_smaller_vocabulary_drafts() -> None:
    dropped = SkipSet(attn={4, 5, 6}, mlp={4, 5, 6})
    model = tiny_model("llama")
    damp(model, dropped, 0.03)
    smaller = tiny_model("llama", num_hidden_layers=4, vocab_size=VOCABULARY - 20)
    with torch.no_grad():
        for name, parameter in smaller.named_parameters():
            own = model.get_parameter(name)
            parameter.copy_(own[: VOCABULARY - 20] if parameter.shape != own.shape else own)
    given = batch(13, 7, 10, max_new_tokens=15)
    given["input_ids"][0, -2:] = VOCABULARY - 1  # tokens that the draft model does not know
    for draft_model in (smaller, tiny_model("qwen3", vocab_size=VOCABULARY - 20)):
        for options in ({}, {"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 1}):
            spec = wrap(model, of_gamma(3), draft_model=draft_model)
            with watched(spec) as seen:
                ours = spec.generate(**given | options)
            expected = given | options | {"do_sample": False}
            assert torch.equal(ours, model.generate(**expected))
            assert (ours[:, 13:] >= VOCABULARY - 20).any(), "the target must write tokens unknown to the draft model"
            assert seen.drafts > 5
        assert (spec.stats.acceptance_rate > 0.1) == (draft_model is smaller)


def with_padding(model: PreTrainedModel, tokens: int) -> PreTrainedModel:
    """The same model with further tokens in its vocabulary, which are the most likely ones everywhere."""
    larger = tiny_model(model.config.model_type, vocab_size=model.config.vocab_size + tokens)
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            own = model.get_parameter(name)
            parameter[: len(own)] = own
        body, last = model.get_decoder()(prompts(11)[0]).last_hidden_state, model.config.vocab_size
        larger.get_output_embeddings().weight[last:] = 9 * body.mean(dim=1)
    return larger


@pytest.mark.parametrize("static", [False, True])
def test_tokens_that_only_the_draft_model_has_are_never_drafted(static: bool) -> None:
    model, draft_model = llamas()
    larger = with_padding(draft_model, 13)
    assert (larger(**{"input_ids": batch(11)["input_ids"]}).logits.argmax(dim=-1) >= VOCABULARY).any()
    for gamma, threshold in ((3, None), (4, 0.05)):
        specs = [wrap(model, of_gamma(gamma, exit_threshold=threshold), draft_model=d) for d in (larger, draft_model)]
        for options in ({}, {"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 1}):
            given = batch(13, 7, 10, max_new_tokens=15, **options)
            for spec in specs:
                if static:
                    make_static(spec)
                with watched(spec):
                    ours = spec.generate(**given)
                assert torch.equal(ours, model.generate(**given | {"do_sample": False}))
            assert specs[0].stats.history == specs[1].stats.history, "both draft the same tokens"


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}, {"max_new_tokens": 1}],
    ids=str,
)
def test_processors_and_limits_hold(options: dict[str, Any]) -> None:
    assert_lossless(speculator(), batch(13, 7, 10, **options))


def test_rows_end_at_stop_tokens_and_stop_strings() -> None:
    written = llamas()[0].generate(**batch(13, 7, 10))[:, 13:]
    ours = assert_lossless(speculator(), batch(13, 7, 10, eos_token_id=[int(written[0, 4]), int(written[1, 17])]))
    assert (ours == PAD).any()
    given = batch(7, max_new_tokens=NEW_TOKENS, stop_strings=[text(llamas()[0].generate(**batch(7))[0, 12:14])])
    theirs = llamas()[0].generate(**given, tokenizer=tokenizer())
    assert torch.equal(speculator().generate(**given, tokenizer=tokenizer()), theirs)
    assert theirs.shape[1] < 7 + NEW_TOKENS


@pytest.mark.parametrize("threshold", [None, 0.05])
@pytest.mark.parametrize("gamma", [2, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_in_a_cascade_it_drafts_where_lookup_finds_nothing(rows: int, gamma: int, threshold: float | None) -> None:
    spec = speculator(gamma, lookup=True, threshold=threshold)
    with watched(spec) as seen:
        assert_lossless(spec, repetitive(rows, seed=3 if rows == 1 else 5))
    assert set(spec.stats.by_origin) == {"lookup", "draft model"}
    assert all(0 < accepted < drafted for drafted, accepted in spec.stats.by_origin.values()) or threshold
    assert seen.drafts > 3


def test_an_exit_threshold_ends_drafts_early() -> None:
    spec = speculator(6, threshold=0.05)
    with watched(spec):
        assert_lossless(spec, batch(13, 7, 10))
    assert len({drafted for step in spec.stats.history[:-3] for _, drafted, _ in step}) > 2


def test_a_stream_yields_the_tokens_of_generate() -> None:
    given = batch(11)
    expected = llamas()[0].generate(**given)[0, 11:].tolist()
    assert list(speculator().stream(**given)) == expected
    rounds = list(speculator().stream_rounds(**given))
    assert {row.origin for row in rounds} == {"draft model"}
    assert any(row.accepted == 3 for row in rounds)


def test_passes_of_static_runtimes_have_two_lengths() -> None:
    spec = wrap(llamas()[0], of_gamma(3), draft_model=llamas()[1])
    make_static(spec)
    with watched(spec) as seen:
        assert_lossless(spec, batch(13, 7, 1))
    assert {length for _, length in spec.draft_runtime.passes._functions} == {1, 2}
    assert seen.drafts > 5


def make_static(spec: SelfSpeculator) -> None:
    """Give both runtimes the shapes of compiled passes, without compiling."""

    def function(views: Any, cache: Any, view: Any, t: int, static: bool) -> Any:
        def forward(tokens: Tensor) -> Tensor:
            step = cache.begin(t, static=True)
            return run_view(views[view], tokens, step.positions, step)

        return forward

    for runtime in (spec.runtime, spec.draft_runtime):
        assert runtime is not None
        runtime.passes.compile = True
        runtime.passes._function = function  # type: ignore[method-assign]


# --- The draft model's cache is right ---


@dataclass
class Watch:
    """Drafts of the draft model, and widths of their catch-up passes."""

    drafts: int = 0
    widths: set[int] = field(default_factory=set)


@contextmanager
def watched(spec: SelfSpeculator) -> Iterator[Watch]:
    """Compare the logits after every token that may be drafted with the draft model's own forward over its text."""
    assert spec.draft_runtime is not None
    seen, model, original = Watch(), spec.draft_runtime.model, DraftModelDrafter._logits

    def checked(drafter: DraftModelDrafter, request: Request, token: Tensor, step: int) -> Tensor:
        made, known = original(drafter, request, token, step), drafter.own_vocabulary
        if step == 0:
            seen.drafts += 1
            seen.widths.add(drafter._catch_up_width)
        for row in (request.draft_limits(request.room) > step).nonzero()[:, 0].tolist():
            if request.found[row]:
                continue  # lookup drafts in this row
            start, end = int(request.pads[row]), int(request.ends[row]) + step
            own = request.sequences[row : row + 1, start:end].clamp(max=known - 1)
            theirs = model(own).logits[0, -1, : drafter.vocabulary]
            torch.testing.assert_close(made[row, 0, :known], theirs, atol=2e-4, rtol=1e-3)
            assert made.shape[-1] == drafter.vocabulary
            assert (made[row, 0, known:] == -torch.inf).all()
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftModelDrafter, "_logits", checked)
        yield seen


@pytest.mark.parametrize(("gamma", "lookup"), [(1, None), (3, None), (6, None), (3, LOOKUP)], ids=str)
def test_all_drafts_of_the_target_itself_are_accepted(gamma: int, lookup: PromptLookup | None) -> None:
    model = llamas()[0]
    spec = wrap(model, of_gamma(gamma, prompt_lookup=lookup), draft_model=model)
    assert_lossless(spec, repetitive(3) if lookup else batch(13, 7, 10))
    drafted, accepted = spec.stats.by_origin["draft model"]
    assert drafted == accepted > 5
    if lookup:
        assert spec.stats.by_origin["lookup"][1] > 0
    else:
        assert spec.stats.tokens_per_round > gamma


def test_accepted_tokens_of_lookup_are_fed_to_the_draft_model_later() -> None:
    model, never_right = llamas()[0], tiny_model("qwen3", seed=1)
    spec = wrap(model, of_gamma(3, prompt_lookup=LOOKUP), draft_model=never_right)
    given = repetitive(3, seed=5) | {"repetition_penalty": 0.9}  # below 1: text that repeats itself
    with watched(spec) as seen:
        assert_lossless(spec, given)
    (_, accepted), (_, looked_up) = (spec.stats.by_origin[name] for name in ("draft model", "lookup"))
    assert accepted == 0 < looked_up
    assert max(seen.widths) > 1


@contextmanager
def drafting_only(in_round: Callable[[int], bool]) -> Iterator[None]:
    """The draft model drafts only in rounds for which `in_round(number)` holds."""
    original, rounds = DraftModelDrafter.choose, count()

    def choose(drafter: DraftModelDrafter, request: Request) -> Any:
        return original(drafter, request) if in_round(next(rounds)) else (NoDrafter(), 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftModelDrafter, "choose", choose)
        yield


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("away", [2, WIDEST_WITH_HEAD + 5])
def test_it_catches_up_with_rounds_that_others_drafted(away: int, static: bool) -> None:
    model = llamas()[0]
    spec = wrap(model, of_gamma(3), draft_model=model)
    if static:
        make_static(spec)
    with drafting_only(lambda number: not 2 <= number < 2 + away), watched(spec) as seen:
        assert_lossless(spec, batch(13, 7, 1, max_new_tokens=51))
    assert max(seen.widths) >= away + 1
    assert spec.stats.acceptance_rate == 1.0
    assert spec.stats.choices["none"] == away


# --- Captured (see `tape.py`) ---


def taped(plan: Plan, draft_model: PreTrainedModel | None = None) -> SelfSpeculator:
    return SelfSpeculator(llamas()[0], plan, draft_model=draft_model or llamas()[1], recorder=TapeRecorder())


@pytest.mark.parametrize("lookup", [None, LOOKUP])
@pytest.mark.parametrize("lengths", [(11,), (13, 7, 1)], ids=str)
@pytest.mark.slow
def test_replayed_rounds_equal_uncaptured_rounds(lengths: tuple[int, ...], lookup: PromptLookup | None) -> None:
    plan = of_gamma(3, prompt_lookup=lookup)
    spec, uncaptured, given = taped(plan), wrap(llamas()[0], plan, draft_model=llamas()[1]), batch(*lengths)
    if lookup is not None:
        given = repetitive(len(lengths))
    assert_lossless(uncaptured, given)
    step = selfspec.decoding.round.step
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selfspec.decoding.round, "step", lambda *args: _without_reads(step, *args))
            assert_lossless(spec, given)
        assert spec.stats.history == uncaptured.stats.history, "only the history shows a wrong draft"
    assert spec.stats.captured
    assert not spec.stats.slower_paths
    assert spec.runtime.graphs is not None
    assert spec.runtime.graphs.recorder.played > spec.stats.passes  # type: ignore[attr-defined]


def _without_reads(step: Any, *args: Any) -> Any:
    with NoReads():
        return step(*args)


@pytest.mark.slow
def test_replayed_rounds_catch_up_with_rounds_that_others_drafted() -> None:
    spec, period = taped(of_gamma(3), llamas()[0]), WIDEST_WITH_HEAD + 4
    with drafting_only(lambda number: not 1 <= number % period < period - 2):
        for _ in range(2):
            assert_lossless(spec, batch(13, 7, 1, max_new_tokens=95))
            assert spec.stats.acceptance_rate == 1.0


@pytest.mark.slow
def test_a_change_of_either_model_drops_the_graphs_of_both() -> None:
    draft_model = copy.deepcopy(llamas()[1])
    spec = taped(of_gamma(3), draft_model)
    for new_tokens in (21, 150):  # a cache that grows
        assert_lossless(spec, batch(11, max_new_tokens=new_tokens))
    for parameter in draft_model.get_decoder().layers[1].parameters():
        parameter.data = parameter.data.clone().zero_()
    uncaptured = wrap(llamas()[0], of_gamma(3), draft_model=draft_model)
    assert_lossless(uncaptured, batch(11))
    assert_lossless(spec, batch(11))
    assert spec.stats.history == uncaptured.stats.history


def test_an_exit_threshold_is_not_captured() -> None:
    spec = taped(of_gamma(3, exit_threshold=0.05))
    assert_lossless(spec, batch(11))
    assert "the host reads the device after every drafted token" in spec.stats.slower_paths[0]


# --- Sampling ---


@pytest.mark.parametrize(
    ("setting", "way"),
    [
        ("plain", {}),
        ("all together", {}),
        ("own processor", {}),
        ("stop token", {}),
        ("plain", {"exit_threshold": 0.5}),
        ("plain", {"prompt_lookup": PromptLookup(gamma=3, min_ngram=1, max_ngram=2)}),
        ("own processor", {"prompt_lookup": PromptLookup(gamma=3, min_ngram=1, max_ngram=2)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("unknown", [0, 1, -2])
def test_sampled_texts_follow_the_targets_distribution(setting: str, way: dict[str, Any], unknown: int) -> None:
    torch.manual_seed(29)
    small = tiny_model("llama", vocab_size=V, num_hidden_layers=3, seed=4)
    draft_model = tiny_model("llama", vocab_size=V - unknown, num_hidden_layers=2, seed=4)
    first_rounds = assert_sampled_texts_follow(
        wrap(small, of_gamma(3, **way), draft_model=draft_model), OPTIONS[setting]
    )
    assert {accepted for _, accepted in first_rounds} == {0, 1, 2, 3}


def test_drafts_of_the_target_itself_are_accepted_when_sampled() -> None:
    model = llamas()[0]
    spec = wrap(model, of_gamma(3), draft_model=model)
    spec.generate(**batch(13, 7, 10, do_sample=True, temperature=0.8, top_p=0.9, repetition_penalty=1.2))
    assert spec.stats.acceptance_rate > 0.999  # rounding apart


# --- One request after the other ---


def test_one_speculator_serves_requests_of_any_size() -> None:
    spec = wrap(llamas()[0], of_gamma(3), draft_model=llamas()[1])
    for lengths, new_tokens in (((5,), 9), ((13, 7), 117), ((5,), 21), ((2, 3), 5)):
        with watched(spec):
            assert_lossless(spec, batch(*lengths, max_new_tokens=new_tokens))
        assert spec.stats.drafted


@pytest.mark.parametrize("where", ["target", "draft"])
def test_after_an_error_the_next_request_is_right(where: str) -> None:
    spec = wrap(llamas()[0], of_gamma(3), draft_model=llamas()[1])
    spec.generate(**batch(13, 7, 10))
    runtime = spec.runtime if where == "target" else spec.draft_runtime
    assert runtime is not None
    assert spec.draft_runtime is not None
    original, passes = runtime.run, iter(range(1000))

    def failing(view: Any, tokens: Tensor) -> Tensor:
        if next(passes) == 5:
            spec.draft_runtime.cache.layer(0)[0].fill_(torch.nan)  # type: ignore[union-attr]
            raise RuntimeError("out of order")
        return original(view, tokens)

    runtime.run = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of order"):
        spec.generate(**batch(13, 7, 10))
    runtime.run = original  # type: ignore[method-assign]
    assert not spec.draft_runtime.cache.layer(0)[0].any(), "the cache is zeroed"
    with watched(spec):
        assert_lossless(spec, batch(9, 13, 10))


def test_a_closed_stream_does_not_change_the_next_request() -> None:
    stream = speculator().stream(**batch(11))
    next(stream)
    stream.close()
    with watched(speculator()):
        assert_lossless(speculator(), batch(9))


def test_a_changed_draft_model_drafts_with_its_new_weights() -> None:
    model, draft_model = llamas()[0], copy.deepcopy(llamas()[1])
    spec = wrap(model, of_gamma(3), draft_model=draft_model)
    assert_lossless(spec, batch(11))
    before = spec.stats.acceptance_rate
    draft_model.to(torch.float64).to(torch.float32)
    for parameter in draft_model.get_decoder().layers[1].parameters():
        parameter.data = parameter.data.clone().zero_()
    with watched(spec):
        assert_lossless(spec, batch(11))
    assert spec.stats.acceptance_rate < before


def test_lockstep_decoding_does_not_draft() -> None:
    class Own(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores * 1.5

    given = batch(13, 7)
    assert torch.equal(
        speculator().generate(**given, logits_processor=LogitsProcessorList([Own()])), llamas()[0].generate(**given)
    )
    assert speculator().stats.drafted == 0


# --- Positions ---


@pytest.mark.parametrize("lookup", [False, True])
def test_beyond_its_positions_it_drafts_nothing(lookup: bool) -> None:
    model, draft_model = llamas()[0], copy.deepcopy(llamas()[1])
    draft_model.config.max_position_embeddings = 24
    spec = wrap(model, of_gamma(3, prompt_lookup=LOOKUP if lookup else None), draft_model=draft_model)
    given = repetitive(3)
    with watched(spec):
        assert_lossless(spec, given)
    pads = (given["attention_mask"] == 0).sum(dim=1).tolist()
    ends, seen = [17 - pad for pad in pads], set()
    for step in spec.stats.history:
        for row, drafted, accepted in step:
            if not lookup:
                assert drafted <= max(0, 24 + 1 - ends[row])
            seen.add((ends[row] > 24, drafted > 0))
            ends[row] += accepted + 1
    assert {(False, True), (True, False)} <= seen
    assert "none" in spec.stats.choices or lookup


def test_a_prompt_beyond_its_positions_is_decoded_plainly() -> None:
    model, draft_model = llamas()[0], copy.deepcopy(llamas()[1])
    draft_model.config.max_position_embeddings = 10
    spec = wrap(model, of_gamma(3), draft_model=draft_model)
    assert_lossless(spec, batch(13))
    assert spec.stats.drafted == 0


# --- Stats and benchmarks ---


def test_stats_hold_the_policy_and_the_bytes_of_the_draft_model() -> None:
    model, draft_model = llamas()
    spec = wrap(model, of_gamma(3), draft_model=draft_model)
    spec.generate(**batch(5))
    assert spec.stats.policy == "fixed: a draft model's costs are not in the plan"
    weights = sum(parameter.nbytes for parameter in draft_model.parameters())
    assert spec.draft_runtime is not None
    cache_bytes = spec.draft_runtime.cache.nbytes
    assert weights + cache_bytes <= spec.stats.draft_bytes <= 1.01 * weights + cache_bytes
    spec = wrap(model, of_gamma(3), draft_model=model)
    spec.generate(**batch(5))
    assert spec.stats.draft_bytes == cache_bytes


def test_a_benchmark_compares_it_with_a_plan_for_layers() -> None:
    model, draft_model = llamas()
    rows = [row[mask.bool()] for row, mask in zip(*prompts(11, 5), strict=True)]
    lined_up = line_up(
        model, Plan(skip_set=FIRST_DROPPED, gamma=2), rows, 7, peers=False, draft_model=draft_model, draft_gamma=5
    )
    classic, ours = lined_up.contenders[-2:]
    assert (classic.name, ours.name) == (DRAFT_MODEL, OURS)
    assert classic.settings["gamma"] == 5
    assert torch.equal(classic.decode(rows[0], 7), ours.decode(rows[0], 7))
    assert classic.stats is not None
    assert list(classic.stats.choices) == ["draft model 5"]


# --- Refused ---


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (Plan(skip_set=ENDS_SKIPPED, gamma=3), "drafts with the model's own layers"),
        (
            Plan(skip_set=SkipSet(), gamma=3, quantised=Quantised.everything(Format("int8"), LAYERS)),
            "drafts with the model's own layers",
        ),
        (Plan.none(), "gamma is 0, so a draft model would never draft"),
    ],
)
def test_a_plan_that_leaves_it_nothing_to_do_is_refused(plan: Plan, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        wrap(llamas()[0], plan, draft_model=llamas()[1])
    assert "Plan(skip_set=SkipSet(), gamma=4)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_draft_model_that_does_not_fit_the_model_is_refused() -> None:
    model = llamas()[0]
    with pytest.raises(UnsupportedModelError, match="the draft model cannot be used: model type 'gpt2'"):
        wrap(model, of_gamma(3), draft_model=GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8)))
    with pytest.raises(UnsupportedModelError, match=r"draft model cannot be used: .* but str was given"):
        wrap(model, of_gamma(3), draft_model="a name")
    with pytest.raises(UnsupportedModelError, match=r"the draft model cannot be used: .*meta"):
        wrap(model, of_gamma(3), draft_model=copy.deepcopy(llamas()[1]).to("meta"))
    with pytest.raises(InputError, match="draft_memory limits the draft weights"):
        wrap(model, of_gamma(3), draft_model=llamas()[1], draft_memory="1G")


def test_a_draft_model_on_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, draft_model = llamas()[0], copy.deepcopy(llamas()[1])
    monkeypatch.setattr(
        type(draft_model), "device", property(lambda m: torch.device("cpu" if m is model else "cuda:1"))
    )
    with pytest.raises(InputError, match=r"on cuda:1, but the model is on cpu; move it there: draft_model.to\('cpu'\)"):
        wrap(model, of_gamma(3), draft_model=draft_model)
