"""ReportData: everything that a report shows. Values from files and databases are checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from selfspec.errors import InputError, PlanError
from selfspec.plan import Plan, PromptLookup
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.sublayers import SkipSet
from selfspec_search.report.words import in_words, lookup_in_words

Sublayer = tuple[str, int]
DEFAULT_GAMMA_MAX = 8
Point = tuple[float, float]
"""(draft cost, agreement), both finite. Low cost and high agreement are better."""


class Stored(Protocol):
    """A finished trial in a storage. `value` is the predicted speedup; None if pruned."""

    @property
    def number(self) -> int: ...
    @property
    def draft_spec(self) -> DraftSpec: ...
    @property
    def value(self) -> float | None: ...
    @property
    def record(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A finished trial. All figures are predicted; None if not recorded, or if the trial was pruned."""

    number: int
    draft_spec: DraftSpec
    speedup: float | None = None
    estimate: float | None = None
    draft_cost: float | None = None
    agreement: float | None = None
    gamma: int | None = None
    lookup: str | None = None
    tokens_per_round: float | None = None
    acceptance_rate: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    worker: str | None = None

    @classmethod
    def of(cls, stored: Stored) -> Trial:
        record = stored.record if isinstance(stored.record, Mapping) else {}
        prediction = record.get("prediction")
        prediction = prediction if isinstance(prediction, Mapping) else {}
        estimate = number(record, "estimate")
        gamma, lookup, worker = number(prediction, "gamma"), prediction.get("lookup"), record.get("worker")
        return cls(
            number=stored.number,
            draft_spec=stored.draft_spec,
            speedup=_finite(stored.value),
            estimate=estimate if estimate else None,  # 0 stands for a set that was refused unreplayed
            gamma=None if gamma is None else int(gamma),
            lookup=None if lookup is None else _lookup_in_words(lookup),
            worker=None if worker is None else str(worker),
            **{name: number(record, name) for name in ("draft_cost", "agreement", "seconds")},
            **{name: number(prediction, name) for name in _PREDICTED},
        )

    @property
    def skip_set(self) -> SkipSet:
        return self.draft_spec.skip_set

    @property
    def is_pruned(self) -> bool:
        return self.speedup is None

    @property
    def speedup_or_estimate(self) -> float | None:
        """The predicted speedup: from all depths if they were replayed, else from the first depth."""
        return self.estimate if self.speedup is None else self.speedup

    @property
    def point(self) -> tuple[float, float] | None:
        """(draft cost, agreement); None unless both are known."""
        return None if self.draft_cost is None or self.agreement is None else (self.draft_cost, self.agreement)


_PREDICTED = ("tokens_per_round", "acceptance_rate", "tokens_per_second")


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """A study: its trials, its subject, and the sensitivity of each sub-layer if recorded.

    `sensitivity` is the first depth's agreement when that one sub-layer alone is skipped.
    """

    name: str
    trials: Sequence[Trial]
    num_layers: int
    identity: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: Mapping[Sublayer, float] = field(default_factory=dict)

    @property
    def complete(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.is_pruned]

    @property
    def workers(self) -> list[str]:
        return sorted({trial.worker for trial in self.trials if trial.worker is not None})

    @property
    def gamma_max(self) -> int:
        given = number(self.identity, "gamma_max")
        return int(given) if given is not None and given >= 1 else DEFAULT_GAMMA_MAX

    def best(self, count: int) -> list[Trial]:
        """The complete trials of highest predicted speedup; the smaller draft first among equals."""
        ranked = sorted(self.complete, key=lambda t: (-round(t.speedup or 0.0, 3), -len(t.skip_set), t.number))
        unique: dict[DraftSpec, Trial] = {}
        for trial in ranked:
            unique.setdefault(trial.draft_spec, trial)
        return list(unique.values())[:count]

    def front(self) -> list[Trial]:
        """Trials on the Pareto front of draft cost and agreement, by rising cost."""
        placed = [(trial, trial.point) for trial in self.trials]
        known = [(trial, point) for trial, point in placed if point is not None]
        return [known[index][0] for index in pareto_front([point for _, point in known])]

    def trial_of(self, draft_spec: DraftSpec) -> Trial | None:
        """The trial of this draft spec, complete rather than pruned; None without a trial."""
        same = [trial for trial in self.trials if trial.draft_spec == draft_spec]
        return min(same, key=lambda trial: (trial.is_pruned, trial.number), default=None)


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """A plan, a study, or both, of one model. `source` is the user's argument."""

    source: str
    plan: Plan | None = None
    study: StudyData | None = None

    def __post_init__(self) -> None:
        if self.plan is None or self.study is None:
            return
        named = self.plan.model.num_layers if self.plan.model else None
        if named is not None and named != self.study.num_layers:
            raise InputError(
                f"the plan is for a model of {named} layers, but study '{self.study.name}' searched one of "
                f"{self.study.num_layers}; give a plan and a study of the same model"
            )
        self.plan.draft_spec.validate(self.study.num_layers)

    @property
    def num_layers(self) -> int:
        """The model's number of layers; if unknown, as many as the draft spec names."""
        if self.study is not None:
            return self.study.num_layers
        if self.plan is not None and self.plan.model is not None:
            return self.plan.model.num_layers
        draft_spec = self.draft_spec or DraftSpec()
        named = [*draft_spec.skip_set, *(draft_spec.quantised.sublayers if draft_spec.quantised else ())]
        return max((layer for _, layer in named), default=-1) + 1

    @property
    def best_trial(self) -> Trial | None:
        return next(iter(self.study.best(1)), None) if self.study else None

    @property
    def chosen_trial(self) -> Trial | None:
        """The trial of the plan's draft spec; without a plan the best trial; None if layers do not draft."""
        if self.plan is None:
            return self.best_trial
        return self.study.trial_of(self.plan.draft_spec) if self.study and self.plan.gamma else None

    @property
    def draft_spec(self) -> DraftSpec | None:
        """The draft length of the plan; without a plan, of the best trial."""
        if self.plan is not None:
            return self.plan.draft_spec
        return self.best_trial.draft_spec if self.best_trial else None

    @property
    def drafted_with(self) -> DraftSpec | None:
        """The draft spec; None if layers do not draft."""
        return None if self.plan is not None and not self.plan.gamma else self.draft_spec


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of the Pareto front, by rising cost.

    One point dominates another if it costs no more, agrees no less, and is not equal to it; so of equal points on the
    front, all are on it, in the order given.

    >>> pareto_front([(0.5, 0.9), (0.4, 0.7), (0.6, 0.8)])
    [1, 0]
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def _lookup_in_words(lookup: Any) -> str:
    try:
        given = PromptLookup(**lookup)
    except (PlanError, TypeError):
        return in_words(lookup)
    return lookup_in_words(given)


def number(record: Mapping[str, Any], key: str) -> float | None:
    """A finite number from a record; None for any other value."""
    return _finite(record.get(key))


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
