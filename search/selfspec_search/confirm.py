"""Confirm: the best few plans decode held-out prompts for real, in turn with the plain model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.drafting import Drafter, LayerSkipDrafter, NoDrafter
from selfspec.plan import Figures
from selfspec.runtime import Runtime
from selfspec.stats import Stats
from selfspec_search.objective import Prediction, predict
from selfspec_search.profile import Profile
from selfspec_search.replay import Replay
from selfspec_search.settings import SearchSettings
from selfspec_search.texts import Text, decode_greedily
from selfspec_search.walk import walk


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """One plan's figures side by side: predicted on both sets of texts, and measured on the held-out ones.

    `rounds_equal` says whether replay and decoding agree in every round of every text that was decoded: accepted
    tokens always, drafted ones where there is no exit threshold (behind a wrong token, replay only expects those).
    `differing_texts` counts decoded texts that are not, token for token, the plain model's.
    """

    prediction: Prediction
    predicted_on_held_out: Figures
    measured: Figures
    tokens_per_round_replayed: float
    tokens_per_round_decoded: float
    rounds: int
    rounds_equal: bool
    differing_texts: int


@dataclass
class _Contender:
    """A way of decoding, and what its decodings gave so far: by text and repeat."""

    runtime: Runtime
    drafter: Drafter
    seconds: dict[int, list[float]] = field(default_factory=dict)
    stats: dict[int, Stats] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)

    def decode(self, index: int, text: Text) -> None:
        start = perf_counter()
        (tokens,), stats = decode_greedily(self.runtime, self.drafter, [text.tokens[: text.prompt]], text.allowed)
        if tokens.device.type == "cuda":
            torch.cuda.synchronize(tokens.device)
        self.seconds.setdefault(index, []).append(perf_counter() - start)
        self.stats[index], self.tokens[index] = stats, tokens

    def figures(self, plain: _Contender) -> Figures:
        """Measured figures over the texts, each at the median of its repeats."""
        tokens = sum(stats.tokens for stats in self.stats.values())
        drafted = sum(stats.drafted for stats in self.stats.values())
        return Figures(
            tokens_per_round=tokens / max(1, sum(stats.rounds for stats in self.stats.values())),
            acceptance_rate=sum(stats.accepted for stats in self.stats.values()) / drafted if drafted else 0.0,
            tokens_per_second=tokens / self.total,
            speedup=plain.total / self.total,
            texts=len(self.stats),
        )

    @property
    def total(self) -> float:
        return sum(median(seconds) for seconds in self.seconds.values())


def confirm(
    model: PreTrainedModel,
    predictions: Sequence[Prediction],
    replay: Replay,
    profile: Profile,
    settings: SearchSettings,
    on_decoded: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Figures, list[Confirmed]]:
    """Decode held-out texts by each prediction and plainly; figures of plain decoding, and of each plan.

    Args:
        predictions: plans to confirm.
        replay: of the held-out texts, all of which count for `predicted_on_held_out`.
        on_decoded: called with (texts decoded, of how many).
    """
    texts = replay.texts
    count = min(settings.confirm_texts or len(texts), len(texts))
    chosen = [index * len(texts) // count for index in range(count)]
    plain = _Contender(Runtime(model, backend=settings.backend, compile=settings.compile), NoDrafter())
    contenders = [_contender(model, prediction, settings) for prediction in predictions]
    everyone = [plain, *contenders]
    room = max(len(text.tokens[: text.prompt]) + text.allowed for text in texts) + settings.gamma_max + 1
    for contender in everyone:  # one capacity for all: it decides what a pass costs, and growing would recompile
        contender.runtime.reserve(1, room)
        contender.decode(chosen[0], texts[chosen[0]])  # warm up
        contender.seconds.clear()
    total = settings.repeats * count * len(everyone)
    for repeat in range(settings.repeats):
        for place, index in enumerate(chosen):
            for turn, contender in enumerate(everyone):
                contender.decode(index, texts[index])
                on_decoded((repeat * count + place) * len(everyone) + turn + 1, total)
    confirmed = [
        _compare(prediction, contender, plain, replay, profile)
        for prediction, contender in zip(predictions, contenders, strict=True)
    ]
    return plain.figures(plain), confirmed


def _contender(model: PreTrainedModel, prediction: Prediction, settings: SearchSettings) -> _Contender:
    runtime = Runtime(model, prediction.skip_set, backend=settings.backend, compile=settings.compile)
    return _Contender(runtime, LayerSkipDrafter(runtime, prediction.drafting.gamma, prediction.drafting.threshold))


def _compare(
    prediction: Prediction, contender: _Contender, plain: _Contender, replay: Replay, profile: Profile
) -> Confirmed:
    table = replay.run(prediction.skip_set)
    assert table is not None
    replayed = walk(table, [prediction.drafting]).rounds(0)
    decoded = {
        index: [(drafted, accepted) for step in stats.history for _, drafted, accepted in step]
        for index, stats in contender.stats.items()
    }
    exact = slice(0 if prediction.drafting.threshold is None else 1, 2)
    equal = all(
        [pair[exact] for pair in rounds] == [pair[exact] for pair in replayed[index]]
        for index, rounds in decoded.items()
    )
    written = sum(replay.texts[index].written for index in decoded)
    rounds = sum(map(len, decoded.values()))
    return Confirmed(
        prediction=prediction,
        predicted_on_held_out=predict(table, profile, prediction.skip_set, [prediction.drafting])[0].figures,
        measured=contender.figures(plain),
        tokens_per_round_replayed=written / max(1, sum(len(replayed[index]) for index in decoded)),
        tokens_per_round_decoded=sum(contender.stats[index].tokens for index in decoded) / max(1, rounds),
        rounds=rounds,
        rounds_equal=equal,
        differing_texts=sum(not torch.equal(contender.tokens[i], plain.tokens[i]) for i in decoded),
    )
