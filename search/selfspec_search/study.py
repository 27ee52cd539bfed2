"""Study: Optuna over the sub-layers, each trial a replay, ended after its first depth where that looks hopeless."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.trial import TrialState

from selfspec.errors import InputError
from selfspec.plan import config_fingerprint
from selfspec.skip_set import SkipSet
from selfspec_search.objective import Prediction, best, depths_worth_replaying, predict, ways_to_draft
from selfspec_search.profile import Profile
from selfspec_search.replay import Replay
from selfspec_search.settings import SearchSettings
from selfspec_search.space import flips, from_params, nested, seeds, skip_set_of, sublayers, suggest, to_params
from selfspec_search.table import Table

SEED_SHARE = 0.5
"""At most this share of the trials goes to sets that are known to be good."""
FULL_TRIALS_FIRST = 5
"""So many trials run whole before any is ended early: they show how far the first depth may be off."""
SENSITIVITY_TEXTS = 8
"""How many texts tell how much each sub-layer matters."""
PARENTS = 3
"""The best so many sets are refined."""


@dataclass
class Study:
    """Trials of one search. Every other trial refines one of the best sets by a flip; the others are the sampler's."""

    replay: Replay
    profile: Profile
    settings: SearchSettings
    on_trial: Callable[[int, float | None], None] = lambda done, best: None
    found: dict[SkipSet, Prediction] = field(default_factory=dict)
    estimated: dict[SkipSet, float] = field(default_factory=dict)
    complete: int = 0
    pruned: int = 0
    interrupted: bool = False
    largest_gap: float = 0.0

    def __post_init__(self) -> None:
        self.num_layers = self.profile.num_layers
        self._random = random.Random(self.settings.seed)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # The sampler works in memory and finished trials are copied to the storage, each at once: a database would
        # otherwise be written to for every sub-layer of every trial, which takes longer than the replay.
        self.optuna = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=self.settings.seed)
        )
        self._stored = _open(self.settings, self.num_layers, self.replay) if self.settings.storage else None
        if self._stored is not None:
            self.optuna.add_trials(self._stored.trials)
        for trial in self.optuna.get_trials(states=(TrialState.COMPLETE,)):
            skip_set = from_params(trial.params, self.num_layers)
            self.found[skip_set] = Prediction.from_dict(skip_set, trial.user_attrs)

    @property
    def trials(self) -> int:
        """Trials of this search, pruned ones included."""
        return self.complete + self.pruned

    def ranking(self) -> list[Prediction]:
        """Predictions of complete trials, best first; of equals the smaller draft."""
        return sorted(self.found.values(), key=lambda p: (-round(p.speedup, 3), -len(p.skip_set)))

    def run(self) -> None:
        """Run trials until there were enough, time is up, or the user interrupts; what was found until then stays."""
        deadline = time.monotonic() + (float("inf") if self.settings.timeout is None else self.settings.timeout)
        try:
            for skip_set in self._proposals():
                if self.trials >= self.settings.trials or time.monotonic() > deadline:
                    break
                self._try(skip_set)
                self.on_trial(self.trials, max((p.speedup for p in self.found.values()), default=None))
        except KeyboardInterrupt:
            self.interrupted = True

    def _proposals(self) -> Iterator[SkipSet | None]:
        """Skip sets to try next; None lets the sampler choose."""
        known = [*nested(self.by_sensitivity()), *seeds(self.num_layers)]
        yield from known[: max(1, int(SEED_SHARE * self.settings.trials))]
        while True:
            yield self._refined()
            yield None

    def by_sensitivity(self) -> list[tuple[str, int]]:
        """All sub-layers, first those whose absence costs the least agreement for the time it saves."""
        texts = sorted(range(len(self.replay.texts)), key=lambda index: len(self.replay.texts[index]))
        few = self.replay.only(texts[:: -(-len(texts) // SENSITIVITY_TEXTS)])

        def lost(sublayer: tuple[str, int]) -> float:
            agreement = few.first_depth(skip_set_of([sublayer])).agreement
            return (1 - agreement) / max(self.profile.saved(sublayer[0]), 1e-12)

        return sorted(sublayers(self.num_layers), key=lost)

    def _refined(self) -> SkipSet | None:
        """One of the best sets with one sub-layer flipped, that was not tried yet."""
        for parent in self.ranking()[:PARENTS]:
            untried = [s for s in flips(parent.skip_set, self.num_layers) if s not in self.found | self.estimated]
            if untried:
                return self._random.choice(untried)
        return None

    def _try(self, skip_set: SkipSet | None) -> None:
        if skip_set is not None:
            self.optuna.enqueue_trial(to_params(skip_set, self.num_layers))
        trial = self.optuna.ask()
        skip_set = suggest(trial, self.num_layers)
        estimate = 0.0

        def how_deep(first: Table) -> int:
            nonlocal estimate
            estimates = predict(first, self.profile, skip_set, ways_to_draft(first, self.profile))
            estimate = self.estimated[skip_set] = max(way.speedup for way in estimates)
            trial.report(estimate, step=0)
            return 0 if self._is_hopeless(estimate) else depths_worth_replaying(estimates)

        try:
            prediction = self.found.get(skip_set)
            table = None if prediction else self.replay.run(skip_set, how_deep)
        except BaseException:
            self.optuna.tell(trial, state=TrialState.FAIL)
            raise
        if table is not None:
            prediction = best(table, self.profile, skip_set)
            self.largest_gap = max(self.largest_gap, prediction.speedup / estimate - 1)
        if prediction is None:
            self.pruned += 1
            self._tell(trial, None)
            return
        self.complete += 1
        self.found[skip_set] = prediction
        for key, value in prediction.to_dict().items():
            trial.set_user_attr(key, value)
        self._tell(trial, prediction.speedup)

    def _tell(self, trial: optuna.Trial, value: float | None) -> None:
        """End a trial: complete with its value, or pruned."""
        finished = self.optuna.tell(trial, value, state=TrialState.PRUNED if value is None else None)
        if self._stored is not None:
            self._stored.add_trial(finished)

    def _is_hopeless(self, estimate: float) -> bool:
        """Whether even the largest gap seen between estimate and truth would leave a trial behind the best."""
        if len(self.found) < FULL_TRIALS_FIRST:
            return False
        return estimate * (1 + self.largest_gap) < max(p.speedup for p in self.found.values())


def _open(settings: SearchSettings, num_layers: int, replay: Replay) -> optuna.Study:
    """The study in the storage, which may be a file for SQLite; earlier trials of a search of the same kind count."""
    storage, kind = settings.storage or "", _kind_of(settings, replay)
    study = optuna.create_study(
        direction="maximize",
        storage=storage if "://" in storage else f"sqlite:///{Path(storage).absolute()}",
        study_name=settings.study_name or f"selfspec-{kind}",
        load_if_exists=True,
    )
    names = set(to_params(SkipSet(), num_layers))
    alien = any(set(trial.params) != names for trial in study.get_trials(states=(TrialState.COMPLETE,)))
    if alien or study.user_attrs.get("kind", kind) != kind:
        raise InputError(
            f"study '{study.study_name}' in {storage} is about another model, other prompts or other settings; "
            "choose another study name"
        )
    study.set_user_attr("kind", kind)
    return study


def _kind_of(settings: SearchSettings, replay: Replay) -> str:
    """A digest of all that two searches must share for their trials to be compared."""
    model = replay.model
    parts = [config_fingerprint(model.config), model.dtype, model.device.type, settings.compile, settings.backend]
    parts += [settings.gamma_max, settings.new_tokens, [text.tokens.tolist() for text in replay.texts]]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
