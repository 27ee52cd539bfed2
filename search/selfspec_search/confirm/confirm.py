"""Confirm: the best few plans decode held-out prompts, interleaved with plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, cycle, islice
from time import perf_counter

import torch
from transformers import PreTrainedModel

from selfspec.decoding.drafter import NoDrafter
from selfspec.drafters.build import drafter_of
from selfspec.models.draft_weights import DraftWeights, draft_weight_bytes
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.provenance import Figures
from selfspec.plan.round_costs import PassLengths
from selfspec.runtime.runtime import Runtime
from selfspec.utils.statistics import interleaved
from selfspec_search.budget import Budget
from selfspec_search.confirm.contender import LEAST_BATCHES, Contender
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.rounds import Drafting, agreement, rounds_of
from selfspec_search.replay.table import Table
from selfspec_search.replay.texts import Text
from selfspec_search.settings import SearchSettings
from selfspec_search.study.objective import Prediction, Prices, predict

DECODING_SHARE = 0.6
"""Share of the time left: the replay of the held-out texts needs the rest, and later texts may be longer."""

LEAST_TURNS = 3
"""Decodings of each contender: the fewest that decide, even if they exceed the budget."""
PLAIN, PADDED = "plain decoding", "plain decoding, padded"
"""Names of the two ways to decode plainly."""


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The measured figures of plain decoding and of the best few plans, all in one run."""

    plains: dict[str, Figures]  # of plain decoding, by name; the faster, which is the baseline of all speedups, first
    pass_lengths: PassLengths | None  # of the baseline; None if the baseline is unpadded
    confirmed: list[Confirmed]  # in the order of the predictions


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """One plan's predicted and measured figures."""

    prediction: Prediction  # on the calibration texts
    predicted_on_held_out: Figures  # on all held-out texts
    expected_here: Figures  # predicted on the held-out texts that were decoded
    measured: Figures
    drafted_replayed: float  # drafted tokens per round, by replay
    drafted_decoded: float  # drafted tokens per round, by decoding
    rounds: int  # by decoding
    rounds_equal: bool | None  # whether replay and greedy decoding agree in every round; None when sampling
    differing_texts: int  # decoded texts that differ from plain decoding in any token; 0 when sampling
    is_faster: bool  # than plain decoding, beyond doubt
    draft_bytes: int = 0  # of the draft weights
    samples: bool = False  # whether texts were sampled, so that repeats differ
    by_layers: list[float] = field(default_factory=list)  # agreement by position, if layer skipping always drafts

    @property
    def tokens_per_round_replayed(self) -> float:
        """By replay, on the texts that were decoded."""
        return self.expected_here.tokens_per_round

    @property
    def tokens_per_round_decoded(self) -> float:
        """By decoding, on the same texts."""
        return self.measured.tokens_per_round

    @property
    def rank(self) -> tuple[float, bool, int]:
        """Sort key: the fastest first; of equally fast plans, lookup without layer skipping, then larger skip sets."""
        return -round(self.measured.speedup, 2), self.prediction.drafting.gamma > 0, -len(self.prediction.skip_set)

    @property
    def errors(self) -> dict[str, float]:
        """Relative errors of the prediction: measured / predicted - 1, on the texts that were decoded."""
        names = ("tokens_per_second", "speedup", "tokens_per_round")
        errors = {name: getattr(self.measured, name) / getattr(self.expected_here, name) - 1 for name in names}
        drafted = self.drafted_decoded / self.drafted_replayed - 1 if self.drafted_replayed else 0.0
        return {**errors, "drafted": drafted}


def confirm(
    model: PreTrainedModel,
    predictions: Sequence[Prediction],
    replay: Replay,
    prices: Prices,
    settings: SearchSettings,
    pass_lengths: PassLengths | None = None,
    on_decoded: Callable[[int, int], None] = lambda done, total: None,
    budget: Budget | None = None,
) -> Confirmation:
    """Decode held-out texts with the plan of each prediction and plainly, in turn.

    If `pass_lengths` pads passes over one token, plain decoding runs unpadded and padded. The faster is the baseline.

    Args:
        predictions: plans to confirm.
        replay: of all held-out texts.
        prices: of the held-out texts.
        pass_lengths: padded lengths of passes.
        on_decoded: called with (batches decoded, number of batches).
        budget: limits the number of repeats and of texts.
    """
    batches = _batches(replay.texts, settings)
    plains, contenders = _contenders(model, predictions, settings, pass_lengths)
    everyone = [*plains.values(), *contenders]
    room = max(text.prompt + text.allowed for text in replay.texts) + settings.longest_draft + 1
    texts = [[replay.texts[index] for index in batch] for batch in batches]
    start = perf_counter()
    for contender in everyone:
        # All contenders need the same capacity: capacity decides the cost of a pass, and growing would recompile.
        contender.runtime.reserve(settings.rows, room)
        contender.decode(0, texts[0])  # warm-up
        contender.runs.clear()
    repeats, some = _affordable(budget or Budget(), perf_counter() - start, settings.repeats, len(batches))
    batches, texts = batches[:some], texts[:some]
    total, done = repeats * len(batches) * len(everyone), count(1)

    def decode(contender: Contender, place: int) -> float:
        seconds = contender.decode(place, texts[place])
        on_decoded(next(done), total)
        return seconds

    pairs = [(place, index) for place in range(len(texts)) for index in range(len(everyone))]
    tasks = {(place, index): partial(decode, everyone[index], place) for place, index in pairs}
    interleaved(tasks, repeats=repeats, warmup=0, group=len(everyone))
    decoded = [index for batch in batches for index in batch]
    faster_first = sorted(plains, key=lambda name: -plains[name].tokens_per_second)
    plain, texts_decoded = plains[faster_first[0]], len(set(decoded))
    return Confirmation(
        plains={name: plains[name].figures(plain, texts_decoded) for name in faster_first},
        pass_lengths=plain.runtime.pass_lengths,
        confirmed=[
            _compare(prediction, contender, plain, replay, prices, decoded)
            for prediction, contender in zip(predictions, contenders, strict=True)
        ],
    )


def _affordable(budget: Budget, turn: float, repeats: int, batches: int) -> tuple[int, int]:
    """Repeats, and batches to decode, if all contenders together take `turn` seconds for a batch."""
    if not budget.is_limited:
        return repeats, batches
    turns = max(LEAST_TURNS, int(DECODING_SHARE * budget.left / turn))
    fewer = min(repeats, max(1, turns // min(batches, LEAST_BATCHES)))
    some = min(batches, max(1, turns // fewer))
    if (fewer, some) != (repeats, batches):
        budget.cut(f"plans decoded {some} of {batches} batches, {fewer} times instead of {repeats}")
    return fewer, some


def pass_lengths_of(draft_spec: DraftSpec, pass_lengths: PassLengths | None) -> PassLengths | None:
    """The padded lengths for a draft spec: quantised draft passes are unpadded, since one token is fastest for them."""
    if pass_lengths is None or draft_spec.quantised is None:
        return pass_lengths
    gains = {passes: gain for passes, gain in (pass_lengths.gains or {}).items() if passes != "draft"}
    return pass_lengths.model_copy(update={"draft": 1, "gains": gains or None})


def _batches(texts: Sequence[Text], settings: SearchSettings) -> list[list[int]]:
    """Indices of the texts to decode, spread over all texts, in batches of `settings.rows`.

    Each text is decoded once. Only the last batch may repeat texts, to have all its rows.
    """
    rows = settings.rows
    wanted = settings.confirm_texts or len(texts)
    count = min(wanted if rows == 1 else max(wanted, LEAST_BATCHES * rows), len(texts))
    chosen = [index * len(texts) // count for index in range(count)]
    filled = [*chosen, *islice(cycle(chosen), -count % rows)]
    return [filled[first : first + rows] for first in range(0, len(filled), rows)]


def _contenders(
    model: PreTrainedModel, predictions: Sequence[Prediction], settings: SearchSettings, lengths: PassLengths | None
) -> tuple[dict[str, Contender], list[Contender]]:
    """Plain decoding by name: unpadded, and padded if that changes its passes. Then the plan of each prediction."""
    draft_weights = DraftWeights(model)

    def runtime_of(draft_spec: DraftSpec, lengths: PassLengths | None) -> Runtime:
        return Runtime(
            model,
            draft_spec,
            backend=settings.backend,
            compile=settings.compile,
            draft_weights=draft_weights,
            pass_lengths=lengths,
        )

    ways = {PLAIN: None, **({PADDED: lengths} if lengths is not None and lengths.pads_plain else {})}
    plains = {name: Contender(runtime_of(DraftSpec(), w), NoDrafter(), settings.sampling) for name, w in ways.items()}
    found = []
    for prediction in predictions:
        draft_spec = prediction.draft_spec if prediction.drafting.gamma else DraftSpec()
        runtime = runtime_of(draft_spec, pass_lengths_of(prediction.draft_spec, lengths))
        found.append(Contender(runtime, drafter_of(prediction.plan, runtime), settings.sampling))
    return plains, found


def _compare(
    prediction: Prediction,
    contender: Contender,
    plain: Contender,
    replay: Replay,
    prices: Prices,
    decoded: Sequence[int],
) -> Confirmed:
    """Replay a prediction on the held-out texts, and compare the replay with the contender's runs."""
    table = replay.run(prediction.draft_spec) if prediction.drafting.gamma else Table.empty(replay.texts, 1)
    here, texts = prices.only(decoded), len(set(decoded))
    replayed = rounds_of(table.only(decoded), [prediction.drafting], here.lookup)
    rounds, greedy = contender.rounds(), not contender.sampling.do_sample
    outputs = [
        (ours, theirs)
        for batch in contender.runs
        for ours, theirs in zip(contender.runs[batch][-1].tokens, plain.runs[batch][-1].tokens, strict=True)
    ]
    return Confirmed(
        prediction=prediction,
        predicted_on_held_out=_expected(prediction, table, prices),
        expected_here=_expected(prediction, table.only(decoded), here).model_copy(update={"texts": texts}),
        measured=contender.figures(plain, texts),
        drafted_replayed=float((replayed.visits * replayed.drafted).sum() / replayed.visits.sum()),
        drafted_decoded=sum(drafted for text in rounds for drafted, _ in text) / max(1, sum(map(len, rounds))),
        rounds=sum(map(len, rounds)),
        rounds_equal=rounds == replayed.history(0) if greedy else None,
        differing_texts=sum(not torch.equal(ours, theirs) for ours, theirs in outputs) if greedy else 0,
        is_faster=contender.is_faster_than(plain),
        draft_bytes=draft_weight_bytes(plain.runtime.model, contender.runtime.draft_spec),
        samples=not greedy,
        by_layers=agreement(table, Drafting(table.depths)) if prediction.drafting.gamma else [],
    )


def _expected(prediction: Prediction, table: Table, prices: Prices) -> Figures:
    (expected,) = predict(table, prices, prediction.draft_spec, [prediction.drafting])
    by_position = agreement(table, prediction.drafting, prices.lookup)
    return expected.figures.model_copy(update={"agreement": by_position})
