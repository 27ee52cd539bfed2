"""Cells of drafts that skip: one shape, number of rows, context and agreement. *Time real, agreement set.*"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.timing import Decode, decode_seconds
from torch import Tensor

from selfspec import SelfSpeculator, SkipSet
from selfspec.benchmark.lossless import compare
from selfspec.utils.devices import dtype_name
from shapes.agreement import distinct_share, drafted_agreement, find_scale, write
from shapes.ceilings import Ceilings
from shapes.dial import Dial
from shapes.effort import Effort
from shapes.limits import PassTimes, bandwidth_limit, best_gamma, ideal_speedup
from shapes.passes import round_passes
from shapes.subject import Subject

BASIS = "time real, agreement set"
FIRST_GUESS = 0.03
"""Scale of the skipped sub-layers before any cell has found a scale."""
PROBING = 3
"""Tokens: the draft length with which the cost of a draft step is measured, before the draft length is chosen."""
LONG = 16384
"""Tokens: the most in the prompts of a cell with several batches."""
JUDGED = 4096
"""Tokens: the longest context at which differing tokens are judged, which decodes the row twice more."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The settings of a cell."""

    shape: str
    rows: int
    context: int
    agreement: float

    def __str__(self) -> str:
        return f"{self.shape}, {self.rows} x {self.context}, agreement {self.agreement:g}"


@dataclass
class Totals:
    """Counts of a decoder's latest decoding of all batches."""

    spec: SelfSpeculator
    batches: Sequence[Tensor]

    def decode(self, new_tokens: int) -> None:
        """Decode all batches, and count."""
        self.tokens = self.passes = self.accepted = self.reached = 0
        self.written: list[Tensor] = []
        self.slower: set[str] = set()
        for prompts in self.batches:
            self.written.append(write(self.spec, prompts, new_tokens))
            stats = self.spec.stats
            self.tokens += stats.tokens
            self.passes += stats.passes * prompts.shape[0]
            self.accepted += sum(stats.accepted_at)
            self.reached += sum(stats.reached_at)
            self.slower.update(stats.slower_paths)

    @property
    def tokens_per_round(self) -> float:
        """Tokens of a row's average pass; rows that wait for the last row of their batch count too."""
        return self.tokens / self.passes

    @property
    def agreement(self) -> float:
        return self.accepted / self.reached if self.reached else 0.0

    @property
    def rows(self) -> list[Tensor]:
        return [row for written in self.written for row in written]


class CellBench:
    """Measures one cell."""

    def __init__(self, subject: Subject, cell: Cell, effort: Effort) -> None:
        self.subject, self.cell, self.effort = subject, cell, effort
        self.dial = Dial(subject)
        count = max(1, min(effort.prompts // cell.rows, LONG // (cell.rows * cell.context)))
        self.batches = subject.prompts(count, cell.rows, cell.context)

    def measure(self, ceilings: Ceilings) -> dict[str, Any]:
        """All figures of the cell."""
        gamma = self.choose_gamma()
        spec = self.subject.drafting(self.subject.skip_set, gamma)
        scale, _ = self.set_agreement(spec)
        plain, ours = Totals(self.subject.plain(), self.batches), Totals(spec, self.batches)
        seconds = self.seconds_per_token({"plain": plain.decode, "ours": ours.decode})
        plain.decode(self.effort.new_tokens)  # for counts and comparison: the last timed decoding was the short one
        ours.decode(self.effort.new_tokens)
        passes = self.passes(spec)
        speedup, ideal = seconds["plain"] / seconds["ours"], ideal_speedup(ours.tokens_per_round, gamma, passes)
        return {
            **self._set(gamma, scale),
            **self._speeds(seconds, ceilings),
            "timed_batches": len(self.batches),
            "agreement": ours.agreement,
            "tokens_per_round": ours.tokens_per_round,
            "pass_seconds": asdict(passes),
            "draft_cost": passes.draft_cost,
            "speedup": speedup,
            "ideal_speedup": ideal,
            "efficiency": speedup / ideal,
            **self._texts(plain, ours, gamma),
            "slower_paths": sorted(plain.slower | ours.slower),
        }

    def seconds_per_token(self, decoders: Mapping[str, Decode]) -> dict[str, float]:
        """Seconds for one token in every row of a batch, by decoder."""
        effort = self.effort
        seconds = decode_seconds(decoders, self.subject.device, new_tokens=effort.new_tokens, repeats=effort.repeats)
        return {name: value / len(self.batches) for name, value in seconds.items()}

    def choose_gamma(self) -> int:
        """The best draft length for the agreement and the cost of a draft step."""
        probing = self.subject.drafting(self.subject.skip_set, PROBING)
        write(probing, self.batches[0], self.effort.new_tokens)  # fills the cache
        return best_gamma(self.cell.agreement, self.passes(probing).draft_cost)

    def set_agreement(self, spec: SelfSpeculator) -> tuple[float, float]:
        """Set the cell's agreement; returns the scale and the measured agreement."""
        skip_set: SkipSet = spec.plan.skip_set
        known = (skip_set, self.cell.agreement)

        def agreement_at(scale: float) -> float:
            self.dial.turn(skip_set=skip_set, skipped_scale=scale)
            return drafted_agreement(spec, self.batches, self.effort.new_tokens)

        scale, agreement = find_scale(
            agreement_at,
            self.cell.agreement,
            guess=self.subject.scales.get(known, FIRST_GUESS),
            tolerance=self.effort.tolerance,
            steps=self.effort.steps,
        )
        self.subject.scales[known] = scale
        self.dial.turn(skip_set=skip_set, skipped_scale=scale)
        return scale, agreement

    def passes(self, spec: SelfSpeculator) -> PassTimes:
        """Times of a round's passes, in the decoding runtime, at the average context."""
        return round_passes(spec.runtime, self.batches[0], spec.plan.gamma, int(self._context), self.effort)

    @property
    def _context(self) -> float:
        """Tokens in the cache, averaged over a decoding."""
        return self.cell.context + self.effort.new_tokens / 2

    def _set(self, gamma: int, scale: float) -> dict[str, Any]:
        skip_set = self.subject.skip_set
        return {
            "shape": self.cell.shape,
            "basis": BASIS,
            "dtype": dtype_name(self.subject.model.dtype),
            "rows": self.cell.rows,
            "context": self.cell.context,
            "agreement_wanted": self.cell.agreement,
            "scale": scale,
            "skipped_attention": len(skip_set.attn),
            "skipped_mlp": len(skip_set.mlp),
            "layers": self.subject.num_layers,
            "gamma": gamma,
        }

    def _speeds(self, seconds: Mapping[str, float], ceilings: Ceilings) -> dict[str, float]:
        rows, bandwidth = self.cell.rows, ceilings.copy_bytes_per_second
        limit = bandwidth_limit(self.subject.model, rows, self._context, bandwidth)
        return {
            "plain_tokens_per_second": rows / seconds["plain"],
            "ours_tokens_per_second": rows / seconds["ours"],
            "limit_tokens_per_second": limit,
            "share_of_limit": rows / seconds["plain"] / limit,
        }

    def _texts(self, plain: Totals, ours: Totals, gamma: int) -> dict[str, Any]:
        """Tokens that differ from plain decoding, judged as near-ties or errors where judging is cheap."""
        prompts = [row for batch in self.batches for row in batch]
        triples = [*zip(prompts, plain.rows, ours.rows, strict=True)]
        judged = self.cell.rows == 1 and self.cell.context <= JUDGED
        verdict = compare(ours.spec.runtime, triples, gamma=gamma) if judged else None
        return {
            "distinct_tokens": distinct_share(plain.rows),
            "differing_tokens": sum(int((one != other).sum()) for _, one, other in triples),
            "near_ties": verdict.near_ties if verdict else None,
            "errors": verdict.errors if verdict else None,
        }
