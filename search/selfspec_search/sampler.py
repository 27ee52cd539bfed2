"""Sampler: one of Optuna's, on a study in memory: it proposes skip sets, and learns what came of them and of others."""

from __future__ import annotations

from collections.abc import Mapping

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from selfspec.skip_set import SkipSet
from selfspec_search.space import suggest, to_params

POPULATION = 20
"""Of NSGA-II: a few generations must fit into a search."""


class Sampler:
    """Proposes skip sets.

    Args:
        name: `tpe`, `gp`, `nsga2` or `random`.
        seed: of its choices.
        num_layers: of the model.
    """

    def __init__(self, name: str, seed: int, num_layers: int) -> None:
        self.num_layers = num_layers
        self._study = optuna.create_study(direction="maximize", sampler=_make(name, seed))
        self._asked: dict[SkipSet, optuna.Trial] = {}

    def propose(self) -> SkipSet:
        """A set that looks promising; `tell` or `decline` answers."""
        trial = self._study.ask()
        skip_set = suggest(trial, self.num_layers)
        self.decline(skip_set)  # proposed before, and never answered
        self._asked[skip_set] = trial
        return skip_set

    def decline(self, skip_set: SkipSet) -> None:
        """Leave a proposal without a result, as where it is known already."""
        if (asked := self._asked.pop(skip_set, None)) is not None:
            self._study.tell(asked, state=TrialState.FAIL)

    def tell(
        self, skip_set: SkipSet, value: float | None, *, estimate: float, constraints: Mapping[str, float]
    ) -> None:
        """What came of a set, proposed here or not.

        Args:
            value: the objective; None if the trial was ended early.
            estimate: what its first depth promised.
            constraints: feasible if at most 0.
        """
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
        if (asked := self._asked.pop(skip_set, None)) is None:
            params = to_params(skip_set, self.num_layers)
            trial = optuna.create_trial(
                params=params,
                distributions=dict.fromkeys(params, CategoricalDistribution([False, True])),
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
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    kinds = {
        "tpe": optuna.samplers.TPESampler,
        "gp": optuna.samplers.GPSampler,
        "random": optuna.samplers.RandomSampler,
    }
    sampler: optuna.samplers.BaseSampler = kinds[name](seed=seed)
    return sampler
