"""ReportData: everything that a report shows. Values from files and databases are checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from selfspec.errors import InputError, PlanError
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.lookup import PromptLookup
from selfspec.plan.plan import Plan
from selfspec.plan.provenance import Figures
from selfspec.plan.sublayers import SkipSet
from selfspec_search.report.words import in_words, lookup_in_words
from selfspec_search.space import Sublayer

if TYPE_CHECKING:
    from selfspec_search.storage.study_store import StoredTrial

DEFAULT_GAMMA_MAX = 8
"""Tokens: the largest draft length of a study that recorded none."""
Point = tuple[float, float]
"""(draft cost, agreement), both finite. Low cost and high agreement are better."""


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
    def of(cls, stored: StoredTrial) -> Trial:
        record = _mapping(stored.record)
        prediction = _mapping(record.get("prediction"))
        gamma, lookup, worker = number(prediction, "gamma"), prediction.get("lookup"), record.get("worker")
        return cls(
            number=stored.number,
            draft_spec=stored.draft_spec,
            speedup=_finite(stored.value),
            estimate=number(record, "estimate") or None,  # 0: the draft spec was refused before any replay
            gamma=None if gamma is None else int(gamma),
            lookup=None if lookup is None else _lookup_in_words(lookup),
            worker=None if worker is None else str(worker),
            **{name: number(record, name) for name in ("draft_cost", "agreement", "seconds")},
            **{name: number(prediction, name) for name in ("tokens_per_round", "acceptance_rate", "tokens_per_second")},
        )

    @property
    def skip_set(self) -> SkipSet:
        return self.draft_spec.skip_set

    @property
    def is_pruned(self) -> bool:
        return self.speedup is None

    @property
    def speedup_or_estimate(self) -> float | None:
        """The predicted speedup: from all depths if they were replayed; otherwise from the first depth."""
        return self.estimate if self.speedup is None else self.speedup

    @property
    def point(self) -> Point | None:
        """None unless draft cost and agreement are both known."""
        return None if self.draft_cost is None or self.agreement is None else (self.draft_cost, self.agreement)


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """A study, read from a storage.

    Attributes:
        identity: what the study is about, by readable names.
        sensitivity: agreement at the first depth if only that sub-layer is skipped; empty if not recorded.
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
        """The complete trials of highest predicted speedup, without the whole model as its own draft, as in the search.

        Of equal trials, the smaller draft comes first.
        """
        drafts = [trial for trial in self.complete if trial.draft_spec != DraftSpec()]
        ranked = sorted(drafts, key=lambda t: (-round(t.speedup or 0.0, 3), -len(t.skip_set), t.number))
        unique: dict[DraftSpec, Trial] = {}
        for trial in ranked:
            unique.setdefault(trial.draft_spec, trial)
        return list(unique.values())[:count]

    def front(self) -> list[Trial]:
        """Trials on the Pareto front of draft cost and agreement, by rising cost."""
        known = self.placed
        return [known[index][0] for index in pareto_front([point for _, point in known])]

    @property
    def placed(self) -> list[tuple[Trial, Point]]:
        """Trials whose draft cost and agreement are known."""
        return [(trial, trial.point) for trial in self.trials if trial.point is not None]

    def trial_of(self, draft_spec: DraftSpec) -> Trial | None:
        """The trial of this draft spec, rather a complete trial than a pruned one; None without a trial."""
        same = [trial for trial in self.trials if trial.draft_spec == draft_spec]
        return min(same, key=lambda trial: (trial.is_pruned, trial.number), default=None)


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """A plan, a study, or both, of one model. `source` is the user's argument.

    Raises:
        InputError: plan and study are of models with different numbers of layers.
        PlanError: the plan names a layer that the study's model does not have.
    """

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
        """The model's number of layers; if unknown, the smallest number that the draft spec allows."""
        if self.study is not None:
            return self.study.num_layers
        if self.plan is not None and self.plan.model is not None:
            return self.plan.model.num_layers
        draft_spec = self.draft_spec or DraftSpec()
        named = [*draft_spec.skip_set, *(draft_spec.quantised.sublayers if draft_spec.quantised else ())]
        return max((layer for _, layer in named), default=-1) + 1

    @property
    def figures(self) -> dict[str, Figures]:
        """The plan's figures by source; only 'measured' comes from decoding."""
        provenance = self.plan.provenance if self.plan else None
        if provenance is None:
            return {}
        named = {
            "predicted, calibration": provenance.predicted,
            "predicted, held-out": provenance.predicted_on_held_out,
            "measured": provenance.measured,
        }
        return {source: figures for source, figures in named.items() if figures is not None}

    @property
    def best_trial(self) -> Trial | None:
        return next(iter(self.study.best(1)), None) if self.study else None

    @property
    def chosen_trial(self) -> Trial | None:
        """The trial of the plan's draft spec; without a plan, the best trial. None if the plan's gamma is 0."""
        if self.plan is None:
            return self.best_trial
        return self.study.trial_of(self.plan.draft_spec) if self.study and self.plan.gamma else None

    @property
    def draft_spec(self) -> DraftSpec | None:
        """The plan's draft spec; without a plan, the best trial's."""
        if self.plan is not None:
            return self.plan.draft_spec
        return self.best_trial.draft_spec if self.best_trial else None

    @property
    def drafted_with(self) -> DraftSpec | None:
        """The draft spec; None if the plan runs no draft of the model's layers."""
        return None if self.plan is not None and not self.plan.gamma else self.draft_spec


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of the Pareto front, by rising cost.

    Point A dominates point B if A costs no more, agrees no less, and differs from B. Equal points are all on the front
    or all not, in the order given.

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
        return lookup_in_words(PromptLookup(**lookup))
    except (PlanError, TypeError):
        return in_words(lookup)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def number(record: Mapping[str, Any], key: str) -> float | None:
    """A finite number from a record; None for any other value."""
    return _finite(record.get(key))


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
