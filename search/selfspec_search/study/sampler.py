"""Sampler: one of Optuna's, on a study in memory: it proposes draft specs, and learns what came of them and of
others."""

from __future__ import annotations

from collections.abc import Mapping

import optuna
from optuna.trial import TrialState

from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.space import Space


class Sampler:
    """Proposes draft specs.

    Args:
        name: `tpe`, `gp` or `random`.
        seed: of its choices.
        space: what there is to choose from.
    """

    def __init__(self, name: str, seed: int, space: Space) -> None:
        self.space = space
        self._study = optuna.create_study(direction="maximize", sampler=_make(name, seed))
        self._asked: dict[DraftSpec, optuna.Trial] = {}

    def propose(self) -> DraftSpec:
        """One that looks promising; `tell` or `decline` answers."""
        trial = self._study.ask()
        draft_spec = self.space.suggest(trial)
        self.decline(draft_spec)  # proposed before, and never answered
        self._asked[draft_spec] = trial
        return draft_spec

    def decline(self, draft_spec: DraftSpec) -> None:
        """Leave a proposal without a result, as where it is known already."""
        if (asked := self._asked.pop(draft_spec, None)) is not None:
            self._study.tell(asked, state=TrialState.FAIL)

    def tell(
        self, draft_spec: DraftSpec, value: float | None, *, estimate: float, constraints: Mapping[str, float]
    ) -> None:
        """What came of a draft spec, proposed here or not.

        Args:
            value: the objective; None if the trial was ended early.
            estimate: what its first depth promised.
            constraints: feasible if at most 0.
        """
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
        if (asked := self._asked.pop(draft_spec, None)) is None:
            trial = optuna.create_trial(
                params=self.space.to_params(draft_spec),
                distributions={**self.space.distributions},
                state=state,
                value=value,
                intermediate_values={0: estimate},
                system_attrs={f"constraints:{name}": excess for name, excess in constraints.items()},
            )
            self._study.add_trial(trial)
            return
        asked.report(estimate, step=0)
        for name, excess in constraints.items():
            asked.set_constraint(name, excess)
        self._study.tell(asked, value, state=state)


def _make(name: str, seed: int) -> optuna.samplers.BaseSampler:
    kinds = {
        "tpe": optuna.samplers.TPESampler,
        "gp": optuna.samplers.GPSampler,
        "random": optuna.samplers.RandomSampler,
    }
    sampler: optuna.samplers.BaseSampler = kinds[name](seed=seed)
    return sampler
