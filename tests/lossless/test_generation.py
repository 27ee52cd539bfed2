"""`generate`: outputs, `custom_generate`, sampling, errors, threads and longrope."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from models import ENDS_SKIPPED, PAD, prompts, tiny_model
from pairs import assert_same, llama, speculator
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, TextStreamer

from selfspec import (
    InputError,
    Plan,
    PlanWarning,
    SelfspecError,
    SelfSpeculator,
    SkipSet,
    SpeculativeOutput,
    UnsupportedOptionError,
    wrap,
)

TOKENS, MASK = prompts(5, 9, 2)
WIDTH = TOKENS.shape[1]
NEW = 17


def batch(**options: Any) -> dict[str, Any]:
    return {"input_ids": TOKENS, "attention_mask": MASK, "max_new_tokens": NEW, **options}


@pytest.fixture
def own() -> tuple[PreTrainedModel, SelfSpeculator]:
    """A model that the test may change, and a speculator of the model."""
    model = copy.deepcopy(llama())
    return model, wrap(model, speculator().plan)


# --- Outputs ---


def test_the_output_object_has_hugging_faces_fields_and_the_stats() -> None:
    options = batch(return_dict_in_generate=True)
    ours, theirs = speculator().generate(**options), llama().generate(**options)
    assert isinstance(ours, SpeculativeOutput)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours["sequences"], ours[0])
    assert ours.stats is speculator().stats
    assert (ours.scores, ours.logits) == (None, None)
    assert ours.to_tuple() == (ours.sequences, ours.stats)


@pytest.mark.parametrize("new_tokens", [1, NEW])
@pytest.mark.parametrize("eos", [False, True], ids=["no stop token", "rows stop at different times"])
def test_scores_and_logits_are_hugging_faces_up_to_each_rows_end(eos: bool, new_tokens: int) -> None:
    written = llama().generate(**batch())[:, WIDTH:]
    stops = [int(written[0, 4]), int(written[1, 7])] if eos else None
    options = batch(
        max_new_tokens=new_tokens,
        repetition_penalty=1.3,
        eos_token_id=stops,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    ours, theirs = speculator(4).generate(**options), llama().generate(**options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == len(ours.logits) == len(theirs.scores)
    finished = torch.zeros(3, dtype=torch.bool)
    for step, token in enumerate(theirs.sequences[:, WIDTH:].T):
        for mine, their in ((ours.scores[step], theirs.scores[step]), (ours.logits[step], theirs.logits[step])):
            assert (mine.shape, mine.dtype) == (their.shape, their.dtype)
            torch.testing.assert_close(mine[~finished], their[~finished], atol=1e-4, rtol=1e-4)
            assert not mine[finished].any()
        finished |= torch.isin(token, torch.tensor(stops or [-1]))
    assert finished.any() == (eos and new_tokens > 1)


def test_transition_scores_can_be_computed_from_the_output() -> None:
    options = batch(return_dict_in_generate=True, output_scores=True)
    ours, theirs = speculator().generate(**options), llama().generate(**options)
    mine, their = (llama().compute_transition_scores(o.sequences, o.scores) for o in (ours, theirs))
    torch.testing.assert_close(mine, their, atol=1e-4, rtol=1e-4)


def test_outputs_can_be_used_in_a_training_step() -> None:
    model, spec = copy.deepcopy(llama()), speculator()
    output = spec.generate(**batch(return_dict_in_generate=True, output_scores=True, output_logits=True))
    assert not any(t.is_inference() for t in (output.sequences, *output.scores, *output.logits))
    loss = model(input_ids=output.sequences, labels=output.sequences).loss
    weight = torch.ones((), requires_grad=True)
    (loss + (weight * output.scores[0]).logsumexp(dim=-1).sum()).backward()
    assert weight.grad is not None
    output.sequences.add_(1)


def test_a_speculator_works_as_custom_generate() -> None:
    spec = speculator()
    assert torch.equal(llama().generate(**batch(), custom_generate=spec), llama().generate(**batch()))
    assert spec.stats.drafted
    output = llama().generate(**batch(return_dict_in_generate=True, output_scores=True), custom_generate=spec)
    assert output.stats is spec.stats


# --- Sampling ---

SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 50, "num_return_sequences": 2}


def test_sampling_is_reproducible_under_a_seed() -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(speculator().generate(**batch(**SAMPLED)))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_num_return_sequences_gives_each_prompt_its_own_rows() -> None:
    out = speculator().generate(**batch(**SAMPLED))
    assert torch.equal(out[:, :WIDTH], TOKENS.repeat_interleave(2, dim=0))
    assert not torch.equal(out[0], out[1])


def test_sampling_with_top_k_of_one_is_greedy_decoding() -> None:
    out = speculator().generate(**batch(do_sample=True, top_k=1))
    assert torch.equal(out, llama().generate(**batch()))
    assert speculator().stats.accepted


def test_processors_change_draft_and_target_alike() -> None:
    spec = wrap(llama(), Plan(skip_set=SkipSet(), gamma=3))  # the draft is the whole model: q = p
    shaped = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 2.5, "no_repeat_ngram_size": 2}
    for options in ({"do_sample": True, **shaped}, {"repetition_penalty": 2.5, "no_repeat_ngram_size": 1}):
        spec.generate(**batch(**options))
        assert spec.stats.acceptance_rate > 0.98, "only rounding rejects tokens of an equal draft"


# --- One request after another ---


def test_requests_do_not_depend_on_earlier_requests(own: tuple[PreTrainedModel, SelfSpeculator]) -> None:
    _, spec = own
    for seed in range(3):
        tokens, mask = prompts(3, 11 - seed, 6, seed=seed)
        assert_same(tokens, attention_mask=mask, max_new_tokens=NEW, spec=spec)


# --- Errors ---


def test_nan_in_the_logits_is_a_one_line_error_and_the_speculator_recovers(
    own: tuple[PreTrainedModel, SelfSpeculator],
) -> None:
    model, spec = own
    weight = model.get_decoder().layers[3].mlp.down_proj.weight
    kept = weight.detach().clone()
    for options in ({}, {"do_sample": True}):
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(InputError, match="NaN or infinity in row 0 after 9 tokens") as error:
            spec.generate(**batch(**options))
        assert "\n" not in str(error.value)
        with torch.no_grad():
            weight.copy_(kept)
        shorter, mask = prompts(2, 3, 1)  # NaN left by the longer prompts must not spread through the mask
        assert_same(shorter, attention_mask=mask, max_new_tokens=NEW, spec=spec)


class Overflows(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 3] = float("inf")
        return scores


def test_infinite_scores_work_in_greedy_decoding_and_are_refused_in_sampling() -> None:
    options = batch(logits_processor=LogitsProcessorList([Overflows()]))
    assert_same(**options)
    with pytest.raises(RuntimeError, match="inf"):
        llama().generate(**options, do_sample=True)
    with pytest.raises(InputError, match="infinity"):
        speculator().generate(**options, do_sample=True)


class Fails(LogitsProcessor):
    """Raises at one length of the batch."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self.at:
            raise ValueError("this\nis the user's own")
        return scores


def test_an_error_in_a_users_processor_is_raised_unchanged_and_the_speculator_recovers() -> None:
    spec = speculator()
    with pytest.raises(ValueError, match="this\nis the user's own"):
        spec.generate(**batch(logits_processor=LogitsProcessorList([Fails(WIDTH + 4)])))
    assert spec.stats.tokens == 3 * 4, "the stats count the tokens before the error"
    assert not spec.runtime.cache.lengths.any()
    assert_same(**batch())


class Recurses(LogitsProcessor):
    """Calls the speculator that is calling the processor."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        speculator().generate(TOKENS[1:2], max_new_tokens=2)
        return scores


def test_a_call_inside_a_call_is_refused() -> None:
    with pytest.raises(SelfspecError, match="still open in this thread"):
        speculator().generate(**batch(logits_processor=LogitsProcessorList([Recurses()])))
    assert_same(**batch())


# --- Threads ---


def test_concurrent_calls_all_get_their_own_output() -> None:
    spec = speculator()
    texts = [prompts(2 + i, 5, seed=i) for i in range(6)]
    expected = [llama().generate(t, attention_mask=m, max_new_tokens=9) for t, m in texts]
    got: dict[int, Tensor] = {}
    start = threading.Barrier(len(texts))

    def work(index: int) -> None:
        tokens, mask = texts[index]
        start.wait()
        got[index] = spec.generate(tokens, attention_mask=mask, max_new_tokens=9)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.equal(got[index], tokens) for index, tokens in enumerate(expected))


# --- longrope ---

SWITCH = 16


@pytest.fixture(scope="module")
def phi3() -> SelfSpeculator:
    factors = {"short_factor": [1.0 + i / 3 for i in range(6)], "long_factor": [3.0 + i for i in range(6)]}
    original = {"original_max_position_embeddings": SWITCH}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **original, **factors}
    model = tiny_model("phi3", **original, rope_parameters=rope)
    return wrap(model, Plan(skip_set=ENDS_SKIPPED, gamma=3))


@pytest.mark.parametrize(
    ("lengths", "new_tokens", "falls_back"),
    [((9,), 7, False), ((9,), 8, True), ((17,), 9, False), ((16, 3), 1, True), ((6, 2), 9, False)],
)
def test_longrope_is_decoded_on_both_sides_of_the_switch_and_falls_back_across_it(
    phi3: SelfSpeculator, lengths: tuple[int, ...], new_tokens: int, falls_back: bool
) -> None:
    tokens, mask = prompts(*lengths)
    stats = assert_same(tokens, attention_mask=mask, max_new_tokens=new_tokens, spec=phi3)
    assert (stats.slower_paths != []) == falls_back
    assert (stats.passes == 0) == falls_back


def test_the_longrope_fallback_streams_and_returns_stats(phi3: SelfSpeculator) -> None:
    class Recorder(TextStreamer):
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.calls.append(value.tolist())

        def end(self) -> None:
            self.calls.append("end")

    tokens, mask = prompts(9, 4)
    options = {"attention_mask": mask, "max_new_tokens": 11, "return_dict_in_generate": True, "output_scores": True}
    theirs, ours = Recorder(), Recorder()
    expected = phi3.model.generate(tokens, streamer=theirs, **options)
    output = phi3.generate(tokens, streamer=ours, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert ours.calls == theirs.calls
    (reason,) = output.stats.slower_paths
    assert "crosses the longrope switch" in reason
    assert output.stats.seconds["total"] > 0
    with pytest.raises(UnsupportedOptionError, match="longrope"):
        next(phi3.stream(tokens[:1], max_new_tokens=11))


def test_the_longrope_fallback_counts_tokens_up_to_the_end_of_each_row(phi3: SelfSpeculator) -> None:
    tokens, mask = prompts(9, 4)
    given = {"attention_mask": mask, "max_new_tokens": 11}
    written = phi3.generate(tokens, **given)[:, 9:]
    assert (phi3.stats.tokens, phi3.stats.passes) == (2 * 11, 0)
    stop = int(written[1, 4])
    assert stop not in [*written[1, :4].tolist(), *written[0].tolist()], "choose another token"
    for pad in (PAD, stop, int(written[0, -1])):  # also the stop token, and a token that a row writes
        stats = assert_same(tokens, **given, eos_token_id=stop, pad_token_id=pad, spec=phi3)
        assert stats.tokens == 11 + 5
        assert stats.tokens_per_second == 16 / stats.seconds["total"] > 0


def test_an_interrupted_longrope_fallback_counts_the_tokens_written(phi3: SelfSpeculator) -> None:
    class Broken(TextStreamer):
        def __init__(self) -> None:
            self.left = 4  # the prompt, and three steps

        def put(self, value: Tensor) -> None:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1

    tokens, mask = prompts(9, 4)
    with pytest.raises(KeyboardInterrupt):
        phi3.generate(tokens, attention_mask=mask, max_new_tokens=11, streamer=Broken())
    assert phi3.stats.tokens in (2 * 3, 2 * 4)  # Hugging Face may check the criteria before or after streaming


def test_a_plan_from_other_conditions_warns_that_another_plan_may_be_faster() -> None:
    def plan(**changes: object) -> Plan:
        conditions = {"device": "cpu", "dtype": "float32", "compiled": False} | changes
        provenance = {"conditions": conditions, "seed": 0, "trials": 1}
        return Plan(skip_set=SkipSet(mlp={1}), gamma=2, provenance=provenance)

    wrap(llama(), plan())  # pytest turns a warning into an error
    with pytest.warns(PlanWarning, match="searched with dtype bfloat16, here float32: the output stays correct"):
        wrap(llama(), plan(dtype="bfloat16"))
    with pytest.warns(PlanWarning, match="compiled True, here False"):
        wrap(llama(), plan(compiled=True))
    greedy = wrap(llama(), plan())
    tokens = prompts(5)[0]
    greedy.generate(tokens, max_new_tokens=3, do_sample=False)
    spec = wrap(llama(), plan(sampling={"do_sample": True}))
    with pytest.warns(PlanWarning, match="do_sample True, here False"):
        spec.generate(tokens, max_new_tokens=3, do_sample=False)
    spec.generate(tokens, max_new_tokens=3, do_sample=False)  # warns once
