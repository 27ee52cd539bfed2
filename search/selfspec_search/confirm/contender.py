"""Contender: one way of decoding, and the timings and stats of its runs over the held-out texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import median
from time import perf_counter

import numpy as np
from torch import Tensor

from selfspec.decoding.drafter import Drafter
from selfspec.decoding.stats import Stats
from selfspec.plan.provenance import Figures
from selfspec.runtime.runtime import Runtime
from selfspec.utils.statistics import Ratio, speed_ratio, wait_for
from selfspec_search.replay.sampling_settings import Sampling
from selfspec_search.replay.texts import Text, decode_batch

LEAST_BATCHES = 4
"""Batches: with fewer, a bootstrap interval over batches says little."""


@dataclass(frozen=True)
class Run:
    """One decoding of a batch."""

    seconds: float
    stats: Stats
    tokens: list[Tensor]  # of each row, the prompt and the continuation
    written: list[int]  # of each row, the tokens after the prompt


@dataclass
class Contender:
    """A way of decoding, and its runs by batch, one for each repeat."""

    runtime: Runtime
    drafter: Drafter
    sampling: Sampling
    runs: dict[int, list[Run]] = field(default_factory=dict)

    def decode(self, batch: int, texts: Sequence[Text]) -> float:
        """Decode the prompts of a batch of texts; return the seconds."""
        prompts = [text.tokens[: text.prompt] for text in texts]
        start = perf_counter()
        tokens, stats = decode_batch(self.runtime, self.drafter, prompts, texts[0].allowed, self.sampling)
        wait_for(tokens[0].device)
        seconds = perf_counter() - start
        written = [len(row) - len(prompt) for row, prompt in zip(tokens, prompts, strict=True)]
        self.runs.setdefault(batch, []).append(Run(seconds, stats, tokens, written))
        return seconds

    @property
    def counted(self) -> list[Run]:
        """The runs whose stats count: all repeats when sampling, else the last, since greedy repeats are equal."""
        last = slice(None) if self.sampling.do_sample else slice(-1, None)
        return [run for runs in self.runs.values() for run in runs[last]]

    @property
    def tokens_per_second(self) -> float:
        """Greedy batches count with their median seconds, samples with the seconds of all runs."""
        tokens = sum(run.stats.tokens for run in self.counted)
        seconds = [[run.seconds for run in runs] for runs in self.runs.values()]
        return tokens / sum(map(sum if self.sampling.do_sample else median, seconds))

    def figures(self, plain: Contender, texts: int) -> Figures:
        """Measured figures over `texts` texts, with the speedup over `plain`."""
        ratio, every = self._speed_ratio(plain), [run.stats for run in self.counted]
        tokens, drafted = sum(stats.tokens for stats in every), sum(stats.drafted for stats in every)
        reached = [sum(counts) for counts in zip_longest(*(stats.reached_at for stats in every), fillvalue=0)]
        accepted = [sum(counts) for counts in zip_longest(*(stats.accepted_at for stats in every), fillvalue=0)]
        written = [count for run in self.counted for count in run.written]
        per_text = sorted(count / max(1, len(rounds)) for count, rounds in zip(written, self.rounds(), strict=True))
        return Figures(
            tokens_per_round=tokens / max(1, sum(stats.rounds for stats in every)),
            acceptance_rate=sum(stats.accepted for stats in every) / drafted if drafted else 0.0,
            tokens_per_second=self.tokens_per_second,
            speedup=ratio.value,
            interval=[ratio.low, ratio.high],
            texts=texts,
            agreement=[a / r if r else 0.0 for a, r in zip(accepted, reached, strict=True)],
            spread=[per_text[0], median(per_text), per_text[-1]],
        )

    def is_faster_than(self, plain: Contender) -> bool:
        """Whether the whole interval of the speedup is above 1; with few batches, every repeat must be faster too."""
        every_repeat = all(
            max(run.seconds for run in self.runs[batch]) < min(run.seconds for run in plain.runs[batch])
            for batch in self.runs
        )
        return self._speed_ratio(plain).low > 1 and (every_repeat or len(self.runs) >= LEAST_BATCHES)

    def _speed_ratio(self, plain: Contender) -> Ratio:
        runs = [[one.runs[batch] for batch in self.runs] for one in (self, plain)]
        pairs = np.array([[[(run.seconds, run.stats.tokens) for run in batch] for batch in one] for one in runs])
        seconds, tokens = pairs.transpose(3, 0, 2, 1)  # 2 repeats prompts, each
        return speed_ratio(seconds, tokens if self.sampling.do_sample else tokens[:, -1])

    def rounds(self) -> list[list[tuple[int, int]]]:
        """(drafted, accepted) of each round of each decoded text, in the order of decoding."""
        texts: list[list[tuple[int, int]]] = []
        for stats in (run.stats for run in self.counted):
            rows: list[list[tuple[int, int]]] = [[] for _ in range(stats.rows)]
            for step in stats.history:
                for row, drafted, accepted in step:
                    rows[row].append((drafted, accepted))
            texts += rows
        return texts
