"""Confirm: the best few plans decode held-out prompts for real, in turn with the plain model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, cycle, islice
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.decoding.drafter import Drafter, NoDrafter
from selfspec.decoding.stats import Stats
from selfspec.drafters.build import drafter_of
from selfspec.models.draft_weights import DraftWeights, draft_weight_bytes
from selfspec.plan import Figures, PassLengths
from selfspec.plan.draft_spec import DraftSpec
from selfspec.runtime.runtime import Runtime
from selfspec.utils.statistics import Ratio, interleaved, speed_ratio, wait_for
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.rounds import Drafting, agreement, walk
from selfspec_search.replay.table import Table
from selfspec_search.replay.texts import Text, decode_batch
from selfspec_search.settings import SearchSettings
from selfspec_search.study.objective import Prediction, Prices, predict

LEAST_BATCHES = 4
"""With fewer, an interval from drawing among them says little."""


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """One plan's figures side by side: predicted on both sets of texts, and measured on the held-out ones.

    `expected_here` is predicted for the texts that were decoded, and nothing else. `rounds_equal` says whether replay
    and greedy decoding draft and accept alike in every round of every one of them; None when sampling, where each run
    differs.
    `drafted_replayed` and `drafted_decoded` are tokens drafted per round. `differing_texts` counts decoded texts that
    are not, token for token, the plain model's (0 when sampling). `is_faster`: than the plain model, beyond doubt.
    `draft_bytes`: what the draft's own layers take. `samples`: whether texts were sampled, each time others.
    `by_layers`: its agreement by position, were it to draft always.
    """

    prediction: Prediction
    predicted_on_held_out: Figures
    expected_here: Figures
    measured: Figures
    drafted_replayed: float
    drafted_decoded: float
    rounds: int
    rounds_equal: bool | None
    differing_texts: int
    is_faster: bool
    draft_bytes: int = 0
    samples: bool = False
    by_layers: list[float] = field(default_factory=list)

    @property
    def tokens_per_round_replayed(self) -> float:
        """On the texts that were decoded."""
        return self.expected_here.tokens_per_round

    @property
    def tokens_per_round_decoded(self) -> float:
        """On the same texts."""
        return self.measured.tokens_per_round

    @property
    def rank(self) -> tuple[float, bool, int]:
        """To sort by: the fastest first, of equals lookup alone, then the smaller draft."""
        return -round(self.measured.speedup, 2), self.prediction.drafting.gamma > 0, -len(self.prediction.skip_set)

    @property
    def errors(self) -> dict[str, float]:
        """Measured over predicted, less 1, on the texts that were decoded."""
        names = ("tokens_per_second", "speedup", "tokens_per_round")
        errors = {name: getattr(self.measured, name) / getattr(self.expected_here, name) - 1 for name in names}
        drafted = self.drafted_decoded / self.drafted_replayed - 1 if self.drafted_replayed else 0.0
        return {**errors, "drafted": drafted}


@dataclass(frozen=True)
class _Run:
    """One decoding of a batch."""

    seconds: float
    stats: Stats
    tokens: list[Tensor]
    written: list[int]  # of each row's tokens, those behind its prompt


@dataclass
class _Contender:
    """A way of decoding, and what its decodings gave so far: by batch of texts, and repeat."""

    runtime: Runtime
    drafter: Drafter
    settings: SearchSettings
    runs: dict[int, list[_Run]] = field(default_factory=dict)

    def decode(self, batch: int, texts: Sequence[Text]) -> float:
        """Seconds that decoding the batch took."""
        prompts, sampling = [text.tokens[: text.prompt] for text in texts], self.settings.sampling
        start = perf_counter()
        tokens, stats = decode_batch(self.runtime, self.drafter, prompts, texts[0].allowed, sampling)
        wait_for(tokens[0].device)
        seconds = perf_counter() - start
        written = [len(row) - len(prompt) for row, prompt in zip(tokens, prompts, strict=True)]
        self.runs.setdefault(batch, []).append(_Run(seconds, stats, tokens, written))
        return seconds

    @property
    def counted(self) -> list[_Run]:
        """Of every batch all repeats where they are samples, else one, since they are all the same."""
        last = slice(None) if self.settings.sampling.do_sample else slice(-1, None)
        return [run for runs in self.runs.values() for run in runs[last]]

    def figures(self, plain: _Contender, texts: int) -> Figures:
        """Measured figures over so many texts: each batch at the median of its repeats; samples all together."""
        ratio, every = self._against(plain), [run.stats for run in self.counted]
        tokens, drafted = sum(stats.tokens for stats in every), sum(stats.drafted for stats in every)
        reached, accepted = (
            _summed(lists) for lists in ([one.reached_at for one in every], [one.accepted_at for one in every])
        )
        written = [count for run in self.counted for count in run.written]
        per_text = sorted(count / max(1, len(rounds)) for count, rounds in zip(written, self.rounds(), strict=True))
        return Figures(
            tokens_per_round=tokens / max(1, sum(stats.rounds for stats in every)),
            acceptance_rate=sum(stats.accepted for stats in every) / drafted if drafted else 0.0,
            tokens_per_second=tokens / self._seconds,
            speedup=ratio.value,
            interval=[ratio.low, ratio.high],
            texts=texts,
            agreement=[a / r if r else 0.0 for a, r in zip(accepted, reached, strict=True)],
            spread=[per_text[0], median(per_text), per_text[-1]],
        )

    def is_faster_than(self, plain: _Contender) -> bool:
        """Whether it is beyond doubt: by the whole interval; with few batches, by every repeat, too."""
        sure = all(
            max(run.seconds for run in self.runs[batch]) < min(run.seconds for run in plain.runs[batch])
            for batch in self.runs
        )
        return self._against(plain).low > 1 and (sure or len(self.runs) >= LEAST_BATCHES)

    def _against(self, plain: _Contender) -> Ratio:
        both = [[one.runs[batch] for batch in self.runs] for one in (self, plain)]
        seconds = np.array([[[run.seconds for run in runs] for runs in one] for one in both]).transpose(0, 2, 1)
        tokens = np.array([[[float(run.stats.tokens) for run in runs] for runs in one] for one in both])
        return speed_ratio(seconds, tokens.transpose(0, 2, 1) if self.settings.sampling.do_sample else tokens[:, :, -1])

    def rounds(self) -> list[list[tuple[int, int]]]:
        """(drafted, accepted) of each round of each text, in the order in which they were decoded."""
        texts: list[list[tuple[int, int]]] = []
        for stats in (run.stats for run in self.counted):
            rows: list[list[tuple[int, int]]] = [[] for _ in range(stats.rows)]
            for step in stats.history:
                for row, drafted, accepted in step:
                    rows[row].append((drafted, accepted))
            texts += rows
        return texts

    @property
    def _seconds(self) -> float:
        """That the counted runs took."""
        seconds = [[run.seconds for run in runs] for runs in self.runs.values()]
        if self.settings.sampling.do_sample:
            return sum(map(sum, seconds))
        return sum(map(median, seconds))


def confirm(
    model: PreTrainedModel,
    predictions: Sequence[Prediction],
    replay: Replay,
    prices: Prices,
    settings: SearchSettings,
    pass_lengths: PassLengths | None = None,
    on_decoded: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Figures, list[Confirmed]]:
    """Decode held-out texts by each prediction and plainly; figures of plain decoding, and of each plan.

    Args:
        predictions: plans to confirm.
        replay: of the held-out texts, all of which count for `predicted_on_held_out`.
        prices: of the held-out texts.
        pass_lengths: of every runtime, the plain model's included.
        on_decoded: called with (batches decoded, of how many).
    """
    batches = _batches(replay.texts, settings)
    draft_weights = DraftWeights(model)
    plainly = Runtime(model, backend=settings.backend, compile=settings.compile, pass_lengths=pass_lengths)
    plain = _Contender(plainly, NoDrafter(), settings)
    contenders = [_contender(model, prediction, settings, pass_lengths, draft_weights) for prediction in predictions]
    everyone = [plain, *contenders]
    room = max(text.prompt + text.allowed for text in replay.texts) + settings.longest_draft + 1
    texts = [[replay.texts[index] for index in batch] for batch in batches]
    for contender in everyone:  # one capacity for all: it decides what a pass costs, and growing would recompile
        contender.runtime.reserve(settings.rows, room)
        contender.decode(0, texts[0])  # warm up
        contender.runs.clear()
    total, done = settings.repeats * len(batches) * len(everyone), count(1)

    def decode(contender: _Contender, place: int) -> float:
        seconds = contender.decode(place, texts[place])
        on_decoded(next(done), total)
        return seconds

    pairs = [(place, index) for place in range(len(texts)) for index in range(len(everyone))]
    tasks = {(place, index): partial(decode, everyone[index], place) for place, index in pairs}
    interleaved(tasks, repeats=settings.repeats, warmup=0, group=len(everyone))
    decoded = [index for batch in batches for index in batch]
    return plain.figures(plain, len(set(decoded))), [
        _compare(prediction, contender, plain, replay, prices, decoded)
        for prediction, contender in zip(predictions, contenders, strict=True)
    ]


def pass_lengths_of(draft_spec: DraftSpec, pass_lengths: PassLengths | None) -> PassLengths | None:
    """The padding of passes where a draft is made like this: kernels of quantised weights are best with one token."""
    if pass_lengths is None or draft_spec.quantised is None:
        return pass_lengths
    return pass_lengths.model_copy(update={"draft": 1})


def _batches(texts: Sequence[Text], settings: SearchSettings) -> list[list[int]]:
    """Texts to decode, spread over the list, in batches of as many rows as the plan is for.

    Each is in one batch, but for those that fill up the last one: the same text again would be no further evidence.
    """
    rows = settings.rows
    wanted = settings.confirm_texts or len(texts)
    count = min(wanted if rows == 1 else max(wanted, LEAST_BATCHES * rows), len(texts))
    chosen = [index * len(texts) // count for index in range(count)]
    filled = [*chosen, *islice(cycle(chosen), -count % rows)]
    return [filled[first : first + rows] for first in range(0, len(filled), rows)]


def _contender(
    model: PreTrainedModel,
    prediction: Prediction,
    settings: SearchSettings,
    pass_lengths: PassLengths | None,
    draft_weights: DraftWeights,
) -> _Contender:
    draft_spec = prediction.draft_spec if prediction.drafting.gamma else DraftSpec()
    runtime = Runtime(
        model,
        draft_spec,
        backend=settings.backend,
        compile=settings.compile,
        draft_weights=draft_weights,
        pass_lengths=pass_lengths_of(prediction.draft_spec, pass_lengths),
    )
    return _Contender(runtime, drafter_of(prediction.plan, runtime), settings)


def _compare(
    prediction: Prediction,
    contender: _Contender,
    plain: _Contender,
    replay: Replay,
    prices: Prices,
    decoded: Sequence[int],
) -> Confirmed:
    table = replay.run(prediction.draft_spec) if prediction.drafting.gamma else Table.empty(replay.texts, 1)
    assert table is not None
    here = prices.only(decoded)
    walked = walk(table.only(decoded), [prediction.drafting], here.lookup)
    rounds, greedy = contender.rounds(), not contender.settings.sampling.do_sample
    outputs = [
        (ours, theirs)
        for batch in contender.runs
        for ours, theirs in zip(contender.runs[batch][-1].tokens, plain.runs[batch][-1].tokens, strict=True)
    ]
    return Confirmed(
        prediction=prediction,
        predicted_on_held_out=_expected(prediction, table, prices),
        expected_here=_expected(prediction, table.only(decoded), here).model_copy(update={"texts": len(set(decoded))}),
        measured=contender.figures(plain, len(set(decoded))),
        drafted_replayed=float((walked.visits * walked.drafted).sum() / walked.visits.sum()),
        drafted_decoded=sum(drafted for text in rounds for drafted, _ in text) / max(1, sum(map(len, rounds))),
        rounds=sum(map(len, rounds)),
        rounds_equal=rounds == walked.rounds(0) if greedy else None,
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


def _summed(lists: Sequence[Sequence[int]]) -> list[int]:
    """Element by element, of lists of unequal length."""
    width = max(map(len, lists), default=0)
    return [sum(values[place] for values in lists if place < len(values)) for place in range(width)]
