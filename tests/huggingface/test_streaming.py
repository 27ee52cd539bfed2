"""Streamers get the same calls as from Hugging Face; a `stream` can be closed, dropped or read by another thread."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import pytest
import torch
from models import prompts
from pairs import assert_same, llama, speculator, text, tokenizer
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer
from transformers.generation.streamers import BaseStreamer

from selfspec import InputError, SelfspecError, UnsupportedOptionError, wrap

TOKENS, MASK = prompts(5, 9, 2)
WIDTH = TOKENS.shape[1]
ONE = TOKENS[1:2]
NEW = 19


def batch(**options: Any) -> dict[str, Any]:
    return {"input_ids": TOKENS, "attention_mask": MASK, "max_new_tokens": NEW, **options}


class Recorder(BaseStreamer):
    """Records each call with its argument."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.calls.append((value.dtype, value.tolist()))

    def end(self) -> None:
        self.calls.append("end")


def new_tokens(tokens: Tensor) -> list[int]:
    return tokens[0, WIDTH:].tolist()


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return llama().generate(**batch())[:, WIDTH:]


# --- Streamers ---


@pytest.mark.parametrize("case", ["one row", "batch", "stop tokens", "stop string", "run on", "lock-step", "sampled"])
def test_a_streamer_gets_the_calls_that_hugging_face_makes(plain: Tensor, case: str) -> None:
    middle = text(plain[1, 3:4])[-1] + text(plain[1, 4:5])[0]
    options: dict[str, Any] = {
        "one row": {"input_ids": ONE, "max_new_tokens": NEW},
        "batch": batch(),
        "stop tokens": batch(eos_token_id=[int(plain[0, 2]), int(plain[1, 8]), int(plain[2, 5])]),
        "stop string": {"input_ids": ONE, "max_new_tokens": NEW, "stop_strings": middle, "tokenizer": tokenizer()},
        "run on": batch(stop_strings=[middle, text(plain[0, 1:2]), text(plain[2, 6:7])], tokenizer=tokenizer()),
        "lock-step": batch(guidance_scale=1.7, eos_token_id=int(plain[0, 2])),
        "sampled": batch(do_sample=True, top_k=1),
    }[case]
    theirs, ours = Recorder(), Recorder()
    llama().generate(streamer=theirs, **options)
    speculator(4).generate(streamer=ours, **options)
    assert ours.calls == theirs.calls


def test_the_streamer_gets_a_step_as_soon_as_every_row_has_the_step() -> None:
    spec = speculator(4)
    pace: list[int] = []

    class Watches(Recorder):
        def put(self, value: Tensor) -> None:
            pace.append(spec.stats.tokens)

    spec.generate(ONE, max_new_tokens=NEW, streamer=Watches())
    committed = [accepted + 1 for ((_, _, accepted),) in spec.stats.history]
    known = [sum(committed[: i + 1]) for i, count in enumerate(committed) for _ in range(count)]
    assert pace[1:] == known, "each token is sent right after its own round"


def test_text_streamers_print_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for generate in (llama().generate, speculator().generate):
        generate(ONE, max_new_tokens=NEW, streamer=TextStreamer(tokenizer(), skip_prompt=True))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_a_streamer_that_refuses_a_batch_leaves_the_object_usable() -> None:
    with pytest.raises(ValueError, match="batch size 1"):
        speculator().generate(**batch(), streamer=TextStreamer(tokenizer()))
    assert_same(**batch())


# --- stream ---


@pytest.mark.parametrize("limit", [1, 2, 5, NEW])
def test_a_stream_yields_the_tokens_that_generate_returns(limit: int) -> None:
    got = list(speculator(4).stream(ONE, max_new_tokens=limit))
    assert got == new_tokens(llama().generate(ONE, max_new_tokens=limit))
    assert all(type(token) is int for token in got)


def test_a_stream_ends_at_a_stop_token_or_a_stop_string(plain: Tensor) -> None:
    for index in range(1, 7):
        stop = int(plain[1, index])
        got = list(speculator(5).stream(ONE, max_new_tokens=NEW, eos_token_id=stop))
        assert got == new_tokens(llama().generate(ONE, max_new_tokens=NEW, eos_token_id=stop))
        options = {"max_new_tokens": NEW, "stop_strings": text(plain[1, index : index + 1]), "tokenizer": tokenizer()}
        rounds = list(speculator(5).stream_rounds(ONE, **options))
        assert [token for r in rounds for token in r.tokens] == new_tokens(llama().generate(ONE, **options))
        assert all(r.accepted <= len(r.tokens) for r in rounds), "tokens after a stop string are not accepted"


def test_the_rounds_of_a_stream_count_drafted_and_accepted_tokens(plain: Tensor) -> None:
    rounds = list(speculator(4).stream_rounds(ONE, max_new_tokens=NEW))
    assert [token for r in rounds for token in r.tokens] == plain[1].tolist()
    assert [(r.row, r.drafted, r.accepted) for r in rounds] == [entry for (entry,) in speculator(4).stats.history]
    assert all(len(r.tokens) == r.accepted + 1 for r in rounds[:-1])
    assert [r.start for r in rounds] == [WIDTH + sum(len(r.tokens) for r in rounds[:i]) for i in range(len(rounds))]


def test_closing_a_stream_ends_the_request_and_frees_the_object() -> None:
    spec = speculator()
    stream = spec.stream(ONE, max_new_tokens=NEW)
    next(stream)
    passes = spec.stats.passes
    stream.close()
    assert list(stream) == []
    assert spec.stats.passes == passes == 1
    assert not spec.runtime.cache.lengths.any()
    assert_same(**batch())


def test_a_dropped_stream_frees_the_object() -> None:
    next(speculator().stream(ONE, max_new_tokens=NEW))
    gc.collect()
    assert_same(**batch())


def test_a_stream_that_was_not_started_holds_no_lock() -> None:
    stream = speculator().stream(ONE, max_new_tokens=NEW)
    assert_same(**batch())
    assert len(list(stream)) == NEW


def test_an_error_in_the_consumer_leaves_the_object_usable() -> None:
    def consume() -> None:
        for count, _ in enumerate(speculator().stream(ONE, max_new_tokens=NEW)):
            if count == 3:
                raise RuntimeError("the consumer's own")

    with pytest.raises(RuntimeError, match="consumer's own") as error:
        consume()
    assert_same(**batch())
    del error


class Fails(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == WIDTH + 3:
            raise RuntimeError("the model's own")
        return scores


def test_an_error_in_the_model_leaves_the_object_usable() -> None:
    stream = speculator().stream(ONE, max_new_tokens=NEW, logits_processor=LogitsProcessorList([Fails()]))
    assert [next(stream) for _ in range(3)] == new_tokens(llama().generate(ONE, max_new_tokens=3))
    with pytest.raises(RuntimeError, match="model's own"):
        next(stream)
    assert_same(**batch())


def test_a_second_call_from_the_thread_of_an_open_stream_is_refused() -> None:
    spec = speculator()
    stream = spec.stream(ONE, max_new_tokens=NEW)
    first = next(stream)
    for call in (spec.generate, lambda *args, **options: next(spec.stream(*args, **options))):
        with pytest.raises(SelfspecError, match="still open in this thread"):
            call(ONE, max_new_tokens=2)
    assert [first, *stream] == new_tokens(llama().generate(ONE, max_new_tokens=NEW)), "the stream continues"


def test_a_call_from_another_thread_waits_for_an_open_stream() -> None:
    spec = speculator()
    stream = spec.stream(ONE, max_new_tokens=NEW)
    got = [next(stream)]
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(spec.generate(**batch())))
    thread.start()
    thread.join(timeout=0.3)
    assert thread.is_alive()
    assert not results
    got += stream
    thread.join(timeout=60)
    assert got == new_tokens(llama().generate(ONE, max_new_tokens=NEW))
    assert torch.equal(results[0], llama().generate(**batch()))


def test_a_stream_belongs_to_the_thread_that_reads_it() -> None:
    spec = speculator()
    stream = spec.stream(ONE, max_new_tokens=NEW)
    next(stream)
    refusals: list[str] = []

    def read_on() -> None:
        next(stream)
        try:
            spec.generate(ONE, max_new_tokens=2)
        except SelfspecError as error:
            refusals.append(str(error))
        stream.close()

    thread = threading.Thread(target=read_on, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert len(refusals) == 1
    assert_same(**batch())


def test_the_consumer_of_a_stream_may_compute_with_gradients() -> None:
    weight = torch.ones(3, requires_grad=True)
    for _ in speculator().stream(ONE, max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()
        (weight * 2).sum().backward()
    assert weight.grad is not None


def test_a_stream_refuses_options_that_it_cannot_support() -> None:
    for options, says in (
        ({"input_ids": TOKENS}, "one row"),
        ({"streamer": Recorder()}, "streamer"),
        ({"return_dict_in_generate": True, "output_scores": True}, "tokens alone"),
        ({"num_beams": 2}, "num_beams"),
        ({"do_sample": True, "num_return_sequences": 2}, "one row"),
    ):
        with pytest.raises((InputError, UnsupportedOptionError), match=says):
            next(speculator().stream(**{"input_ids": ONE, "max_new_tokens": NEW, **options}))
    assert_same(**batch())


def test_a_stream_does_not_block_other_objects() -> None:
    other = wrap(copy.deepcopy(llama()), speculator().plan)
    stream = speculator().stream(ONE, max_new_tokens=NEW)
    next(stream)
    assert_same(**batch(), spec=other)
    stream.close()


def test_an_abandoned_stream_does_not_block_other_threads_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = wrap(llama(), speculator().plan)
    abandoned = [spec.stream(ONE, max_new_tokens=NEW)]
    reader = threading.Thread(target=lambda: next(abandoned[0]))
    reader.start()
    reader.join(timeout=60)
    spec._lock.patience = 0.01
    with pytest.raises(SelfspecError, match="nobody has read the stream"):
        spec.generate(**batch())
    abandoned[0].close()
    assert_same(**batch(), spec=spec)
