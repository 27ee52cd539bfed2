"""Memory grows with the text and not with the limit, in the middle of any text; memory that is not needed is freed."""

from __future__ import annotations

import copy
import resource
from typing import Any

import pytest
import torch
from captured import (
    CASCADE,
    GAMMA,
    GREEDY,
    LOOKUP,
    PLAN,
    SAMPLING,
    WARPERS,
    assert_captured,
    assert_same_draws,
    batch,
    tape_of,
    taped,
)
from models import FIRST_DROPPED, damp, prompts
from pairs import tokenizer
from tape import TapeRecorder
from torch import Tensor
from transformers import PreTrainedModel

import selfspec.decoding.request
import selfspec.runtime.kv_cache
from selfspec import DecodeOptions, Plan, SelfspecError, SelfSpeculator, SkipSet, wrap
from selfspec.decoding.round import make_room
from selfspec.plan.round_costs import PassLengths, RoundCosts
from selfspec.runtime.cache_memory import MOST_KEPT, RECENT
from selfspec.runtime.kv_cache import KVCache
from selfspec.runtime.runtime import Runtime

FIRST = 3
LONG = 67
"""New tokens, for which the first room doubles four times."""
COSTS = RoundCosts(
    rows=3,
    draft_step=0.2,
    rounds=[1.0, 1.0, 1.05, 1.1, 1.15],
    agreement=[0.9, 0.8],
    matches=[[0.5, 0.5]] * 5,
    lookup=0.0,
)


@pytest.fixture
def small_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request begins with room for `FIRST` tokens, and no slot is left over."""
    monkeypatch.setattr(selfspec.decoding.request, "MANY_TOKENS", 0)
    monkeypatch.setattr(selfspec.decoding.request, "FIRST_TOKENS", FIRST)
    monkeypatch.setattr(selfspec.decoding.request, "STATIC_TOKENS", FIRST)
    monkeypatch.setattr(selfspec.runtime.kv_cache, "SLOT_BUCKET", 1)


@pytest.fixture
def growths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The slots of every cache that grew."""
    slots: list[int] = []
    grow = KVCache.grow

    def noted(self: KVCache, to: int) -> None:
        slots.append(to)
        grow(self, to)

    monkeypatch.setattr(KVCache, "grow", noted)
    return slots


def with_draft_model(model: PreTrainedModel, plan: Plan, **settings: Any) -> SelfSpeculator:
    draft_model = copy.deepcopy(model)
    damp(draft_model, FIRST_DROPPED, 0.0)
    return SelfSpeculator(model, plan, DecodeOptions(), draft_model, **settings)


DRAFT_MODEL = Plan(skip_set=SkipSet(), gamma=GAMMA)
PLANS = {
    "layers": PLAN,
    "lookup": Plan(skip_set=SkipSet(), gamma=0, prompt_lookup=LOOKUP),
    "cascade": CASCADE,
    "adaptive": Plan(skip_set=FIRST_DROPPED, gamma=GAMMA, prompt_lookup=LOOKUP, round_costs=[COSTS]),
    "padded": Plan(
        skip_set=FIRST_DROPPED, gamma=GAMMA, pass_lengths=PassLengths(rows=3, target=[3, 3, 3, 5, 5], draft=2)
    ),
    "draft model": DRAFT_MODEL,
    "draft model after lookup": Plan(skip_set=SkipSet(), gamma=GAMMA, prompt_lookup=LOOKUP),
}


def speculator(model: PreTrainedModel, name: str, **settings: Any) -> SelfSpeculator:
    make = with_draft_model if name.startswith("draft model") else SelfSpeculator
    return make(model, PLANS[name], **settings)


def repetitive(*lengths: int) -> dict[str, Tensor]:
    given = batch(*lengths)
    return given | {"input_ids": torch.where(given["attention_mask"].bool(), given["input_ids"] % 7 + 1, 0)}


# --- In the middle of a text ---


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    "captured", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["uncaptured", "captured"]
)
def test_growth_changes_neither_the_text_nor_the_rounds(
    name: str, captured: bool, llama: PreTrainedModel, small_rooms: None, growths: list[int]
) -> None:
    given, options = repetitive(13, 7, 10), GREEDY | {"max_new_tokens": LONG}
    spec = speculator(llama, name, recorder=TapeRecorder() if captured else None)
    assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
    rounds = spec.stats.history
    assert len(set(growths)) >= 3
    growths.clear()
    assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
    assert not growths, "an equal request finds the room of the first"
    assert name == "adaptive" or spec.stats.history == rounds
    if captured:
        assert_captured(spec)
        assert tape_of(spec).played > 0


@pytest.mark.parametrize("captured", [False, True], ids=["uncaptured", "captured"])
@pytest.mark.parametrize("options", [{}, WARPERS], ids=["plain", "warpers"])
def test_growth_changes_no_draw(
    captured: bool, options: dict[str, Any], llama: PreTrainedModel, small_rooms: None, growths: list[int]
) -> None:
    def spec() -> SelfSpeculator:
        return taped(llama, CASCADE) if captured else wrap(llama, CASCADE)

    grows, has_room = spec(), spec()
    has_room.runtime.reserve(3, 200)
    assert_same_draws(grows, has_room, repetitive(13, 7, 10), **SAMPLING, **options)
    assert growths


def test_a_stream_goes_on_after_growth(llama: PreTrainedModel, small_rooms: None, growths: list[int]) -> None:
    given, options = batch(11), GREEDY | {"max_new_tokens": LONG}
    expected = llama.generate(**given, **options)[0, 11:].tolist()
    stream = wrap(llama, PLAN).stream(**given, **options)
    assert [next(stream) for _ in range(5)] == expected[:5]
    before = len(growths)
    assert list(stream) == expected[5:]
    assert len(growths) > before


def test_scores_stop_strings_and_stop_tokens_survive_growth(
    llama: PreTrainedModel, small_rooms: None, growths: list[int]
) -> None:
    given, options = batch(11, 5), GREEDY | {"max_new_tokens": LONG}
    written = llama.generate(**given, **options)[:, 11:]
    string = tokenizer().decode(written[0, 50:52])
    options |= {"return_dict_in_generate": True, "output_scores": True, "tokenizer": tokenizer()}
    options |= {"stop_strings": [string], "eos_token_id": int(written[1, 40]), "pad_token_id": 0}
    ours, theirs = wrap(llama, PLAN).generate(**given, **options), llama.generate(**given, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == len(theirs.scores)
    assert len(growths) >= 3
    ours.sequences.add_(1)  # outside inference mode


def test_every_round_has_room_for_all_that_it_writes(
    llama: PreTrainedModel, small_rooms: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms: list[int] = []

    def checked(runtime: Runtime, request: Any) -> None:
        make_room(runtime, request)
        end = max(request.known_ends)
        rooms.append(min(request.sequences.shape[1] - end, runtime.capacity - end))

    monkeypatch.setattr(selfspec.decoding.round, "make_room", checked)
    for options in ({"max_new_tokens": LONG}, {"max_new_tokens": 1}, {"max_new_tokens": FIRST + 1}):
        wrap(llama, PLAN).generate(**batch(13, 7), **GREEDY | options)
    assert min(rooms) == GAMMA + 1
    assert max(rooms) <= LONG, "room for all new tokens only after several growths"


@pytest.mark.slow
def test_layers_compiled_one_by_one_survive_growth(
    llama: PreTrainedModel, small_rooms: None, growths: list[int], compilations: list[int]
) -> None:
    spec = wrap(llama, PLAN, compile=True)
    given, options = batch(11), GREEDY | {"max_new_tokens": 9}
    assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
    assert growths
    assert spec.stats.compiled


# --- Limits ---


@pytest.mark.parametrize("name", ["max_new_tokens", "max_length"])
@pytest.mark.parametrize(
    ("limit", "lengths"),
    [(10**6, (11,)), (10**7, (11, 5)), (int(1e30), (11,)), (2**62, (11,)), (2**64, (11,))],
    ids=str,
)
def test_a_limit_takes_no_memory_by_itself(
    name: str, limit: int, lengths: tuple[int, ...], llama: PreTrainedModel
) -> None:
    given = batch(*lengths)
    written = llama.generate(**given, do_sample=False, max_new_tokens=20)[:, 11:]
    stops = {"do_sample": False, "eos_token_id": written[:, -1].tolist(), "tokenizer": tokenizer()}
    stops["stop_strings"] = ["no text holds this"]
    large, small = (wrap(llama, PLANS["draft model"], draft_model=copy.deepcopy(llama)) for _ in range(2))
    assert torch.equal(
        large.generate(**given, **stops, **{name: limit}), llama.generate(**given, **stops, **{name: limit})
    )
    small.generate(**given, max_new_tokens=64, **stops)
    for ours, theirs in ((large.runtime, small.runtime), (large.draft_runtime, small.draft_runtime)):
        assert ours is not None
        assert theirs is not None
        assert ours.cache_bytes == theirs.cache_bytes
        assert ours.row_buffers.sequences.shape == theirs.row_buffers.sequences.shape


def test_a_request_of_a_few_thousand_tokens_never_grows(llama: PreTrainedModel, growths: list[int]) -> None:
    spec, given = taped(llama), batch(11)
    stop = int(llama.generate(**given, **GREEDY)[0, -1])
    for limit in (4000, 70, 3000):
        spec.generate(**given, do_sample=False, max_new_tokens=limit, eos_token_id=stop)
        assert spec.runtime.cache.slots == KVCache.bucketed(11 + 4000 + GAMMA + 1)
    assert not growths
    assert tape_of(spec).recorded == 2, "requests of other limits keep captured rounds"


# --- Memory that is given back ---


def test_the_memory_of_a_large_request_is_freed_after_small_requests(llama: PreTrainedModel) -> None:
    spec = wrap(llama, PLAN)
    spec.runtime.reserve(1, 4000)
    large = spec.runtime.cache_bytes
    for _ in range(RECENT - 1):
        spec.generate(**batch(11), **GREEDY)
        assert spec.runtime.cache_bytes == large, "equal requests may follow"
    spec.generate(**batch(11), **GREEDY)
    assert spec.runtime.cache.slots == 128


def test_a_cache_that_a_recent_request_needed_is_kept(llama: PreTrainedModel) -> None:
    runtime, kept = Runtime(llama), set()
    for count in range(3 * RECENT):
        runtime.reserve(1, 128 * MOST_KEPT if count == 0 else 128 * (1 + count % 2))
        kept.add(runtime.cache.layer(0)[0].data_ptr())
    assert len(kept) == 1


# --- Too little memory ---


def out_of_memory(*_: Any) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory:\nbacktrace")


@pytest.mark.parametrize("method", ["__init__", "grow"])
def test_a_cache_without_memory_is_a_one_line_error_and_the_next_request_works(
    method: str, llama: PreTrainedModel, small_rooms: None
) -> None:
    spec, given = wrap(llama, PLAN), batch(11, 5)
    options = GREEDY | {"max_new_tokens": LONG}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, method, out_of_memory if method == "grow" else lambda *_, **__: out_of_memory())
        with pytest.raises(
            SelfspecError, match=r"memory does not suffice for a KV cache of 2 rows of \d+ tokens"
        ) as error:
            spec.generate(**given, **options)
    assert "\n" not in str(error.value)
    assert spec.runtime.cache_bytes == 0
    assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))


def test_other_errors_while_a_cache_grows_are_raised_unchanged(llama: PreTrainedModel, small_rooms: None) -> None:
    spec = wrap(llama, PLAN)

    def fails(*_: Any) -> None:
        raise RuntimeError("something else")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "grow", fails)
        with pytest.raises(RuntimeError, match=r"^something else$"):
            spec.generate(**batch(11), **GREEDY)


# --- Many requests ---


@pytest.mark.slow
def test_five_hundred_requests_of_random_sizes_do_not_fill_the_memory(llama: PreTrainedModel) -> None:
    spec, generator = wrap(llama, CASCADE), torch.Generator().manual_seed(0)
    sizes: list[int] = []
    for seed in range(500):
        rows, length, new = (int(torch.randint(1, most, (), generator=generator)) for most in (4, 300, 12))
        tokens, mask = prompts(*[length] * rows, seed=seed)
        limit = new if seed % 2 else 10**6
        spec.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=limit, eos_token_id=list(range(200)))
        if seed >= 100:
            sizes.append(int(resident_bytes()))
    assert max(sizes[200:]) < max(sizes[:200]) + 16 * 2**20


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
