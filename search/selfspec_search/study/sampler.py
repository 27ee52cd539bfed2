"""Sampler: an Optuna sampler on a study in memory. It proposes draft specs and learns the results of all trials."""

from __future__ import annotations

from collections.abc import Mapping

import optuna
from optuna.trial import TrialState

from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.space import Space

_SAMPLERS = {
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
    "random": optuna.samplers.RandomSampler,
}


class Sampler:
    """Proposes draft specs.

    Args:
        name: `tpe`, `gp` or `random`.
        seed: of the sampler.
        space: the choices.
    """

    def __init__(self, name: str, seed: int, space: Space) -> None:
        self.space = space
        self._study = optuna.create_study(direction="maximize", sampler=_SAMPLERS[name](seed=seed))
        self._asked: dict[DraftSpec, optuna.Trial] = {}

    def propose(self) -> DraftSpec:
        """A promising draft spec; `learn` or `decline` must follow."""
        trial = self._study.ask()
        draft_spec = self.space.suggest(trial)
        self.decline(draft_spec)  # an earlier proposal of the same draft spec has no result yet
        self._asked[draft_spec] = trial
        return draft_spec

    def decline(self, draft_spec: DraftSpec) -> None:
        """End a proposal without a result."""
        if (asked := self._asked.pop(draft_spec, None)) is not None:
            self._study.tell(asked, state=TrialState.FAIL)

    def learn(
        self, draft_spec: DraftSpec, value: float | None, *, estimate: float, constraints: Mapping[str, float]
    ) -> None:
        """Learn the result of a draft spec, whoever proposed the draft spec.

        Args:
            value: the objective; None if the trial was pruned.
            estimate: the objective as estimated from the first depth.
            constraints: by name, the excess; feasible if at most 0.
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
