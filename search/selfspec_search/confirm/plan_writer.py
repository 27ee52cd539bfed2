"""Finish: what every search ends with: a profile of this device, the best plans decoded, and the plan that won."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from time import perf_counter

import optuna
from transformers import PreTrainedModel

from selfspec.errors import PlanWarning, is_out_of_memory
from selfspec.huggingface.loading import versions
from selfspec.plan import Conditions, Figures, ModelIdentity, Plan, Provenance, RoundCosts
from selfspec.plan.draft_spec import Format
from selfspec_search.confirm.confirm import Confirmed, confirm, pass_lengths_of
from selfspec_search.confirm.result import SearchResult
from selfspec_search.profile.profile import Profile, ProfileSettings, measure, position_limit
from selfspec_search.profile.round_costs import Scene, match_shares, seen
from selfspec_search.replay.memory import Memory
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.table import Table
from selfspec_search.replay.texts import Text
from selfspec_search.settings import OnProgress, Phase, Progress, SearchSettings
from selfspec_search.study.objective import Prediction, Prices, plain_figures


@dataclass(kw_only=True)
class Phases:
    """Where the time goes, and what is told on the way."""

    on_progress: OnProgress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[name] = perf_counter() - start

    def tell(self, phase: Phase, done: int, total: int, best: float | None = None) -> None:
        self.on_progress(Progress(phase=phase, done=done, total=total, best=best))


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What there is to choose from.

    Attributes:
        study: its name.
        ranking: predictions, best first.
        lookup: prompt lookup alone, where it takes part.
        complete: trials that ran whole, by any worker.
        pruned: trials that were ended early.
        interrupted: whether the user ended them.
    """

    study: str
    ranking: Sequence[Prediction]
    lookup: Prediction | None
    complete: int
    pruned: int
    interrupted: bool = False


def measure_for(
    model: PreTrainedModel,
    texts: Sequence[Text],
    settings: SearchSettings,
    phases: Phases,
    formats: Sequence[Format] = (),
) -> Profile:
    """A profile at the contexts that decoding these texts passes through, shortest prompt to longest end."""
    prompts = [text.tokens[: text.prompt].to(model.device) for text in texts]
    middle = sorted(text.prompt + text.written // 2 for text in texts)[len(texts) // 2]
    contexts = {min(text.prompt for text in texts), middle, max(map(len, texts))}
    most = max(1, (position_limit(model) or 2**31) - settings.longest_draft - 2)
    return measure(
        model,
        prompts,
        ProfileSettings(
            rows=settings.rows,
            slots=max(text.prompt + text.allowed for text in texts) + settings.longest_draft + 1,
            sampling=settings.sampling,
            backend=settings.backend,
            compile=settings.compile,
            formats=formats,
        ),
        gamma_max=settings.longest_draft,
        contexts=sorted({min(context, most) for context in contexts}),
        on_cycle=lambda done, total: phases.tell("profile", done, total),
    )


def check_memory(model: PreTrainedModel, texts: Sequence[Text], calibration: int, settings: SearchSettings) -> None:
    """Raise `InputError` where a replay of the first so many texts, or of the others, would not fit: before hours, not
    after."""
    memory = Memory(model, settings.gamma_max, settings.memory, sampled=settings.sampling.do_sample)
    for some in (texts[:calibration], texts[calibration:]):
        memory.check(some)


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Decodes the best plans, and writes down what came of it."""

    model: PreTrainedModel
    settings: SearchSettings
    profile: Profile
    phases: Phases

    def run(self, trials: Trials, texts: Sequence[Text], held_out: Sequence[Text]) -> SearchResult:
        """Confirm the best of `trials`, which were predicted on `texts`, on `held_out` ones."""
        chosen = list(trials.ranking[: self.settings.confirm])
        if trials.lookup is not None and trials.lookup.speedup > 1:
            chosen.append(trials.lookup)
        with self.phases.phase("confirm"):
            plain, confirmed = self._confirm(chosen, held_out)
        confirmed.sort(key=lambda one: one.rank)
        winner = next((one for one in confirmed if one.is_faster), None)
        identity = ModelIdentity.of(self.model.config)
        provenance = self._provenance(winner, plain, trials, texts, held_out)
        # Also where plain decoding won: then the prediction was most wrong.
        provenance = provenance.model_copy(update={"errors": (winner or confirmed[0]).errors})
        plan = Plan.none(model=identity, provenance=provenance, pass_lengths=self.profile.pass_lengths)
        if winner is not None:
            own = self._round_costs(winner, texts)
            changes = {
                "model": identity,
                "provenance": provenance,
                "round_costs": [own, *self._round_costs_of_other_rows(winner.prediction, own, texts)],
                "pass_lengths": pass_lengths_of(winner.prediction.draft_spec, self.profile.pass_lengths),
            }
            plan = winner.prediction.plan.model_copy(update=changes)
        return SearchResult(
            plan=plan,
            plain=plain,
            confirmed=confirmed,
            winner=winner,
            profile=self.profile,
            trials_complete=trials.complete,
            trials_pruned=trials.pruned,
            interrupted=trials.interrupted,
            seconds=self.phases.seconds,
        )

    def _confirm(self, chosen: Sequence[Prediction], held_out: Sequence[Text]) -> tuple[Figures, list[Confirmed]]:
        settings, fastest = self.settings, max(prediction.speedup for prediction in chosen)
        return confirm(
            self.model,
            chosen,
            Replay(self.model, held_out, settings.gamma_max, sampling=settings.sampling, memory=settings.memory),
            Prices.of(self.profile, held_out, lookup=settings.lookup),
            settings,
            self.profile.pass_lengths,
            lambda done, total: self.phases.tell("confirm", done, total, fastest),
        )

    def _provenance(
        self,
        winner: Confirmed | None,
        plain: Figures,
        trials: Trials,
        texts: Sequence[Text],
        held_out: Sequence[Text],
    ) -> Provenance:
        plainly, plainly_held_out = (
            plain_figures(Table.empty(some, 1), Prices.of(self.profile, some, lookup=False))
            for some in (texts, held_out)
        )
        return Provenance(
            conditions=self._conditions(texts),
            seed=self.settings.seed,
            trials=trials.complete + trials.pruned,
            study=trials.study,
            settings={"sampler": self.settings.sampler, "gamma_max": self.settings.gamma_max, "texts": len(texts)},
            predicted=winner.prediction.figures if winner else plainly,
            predicted_on_held_out=winner.predicted_on_held_out if winner else plainly_held_out,
            measured=winner.measured if winner else plain,
        )

    def _round_costs(self, winner: Confirmed, texts: Sequence[Text]) -> RoundCosts:
        """What a policy needs to know."""
        prices = Prices.of(self.profile, texts, lookup=self.settings.lookup)
        costs = prices.costs
        matches = [] if prices.lookup is None else match_shares(texts, prices.lookup, self.profile.gamma_max)
        return RoundCosts(
            rows=self.profile.rows,
            draft_step=costs.draft_step(winner.prediction.draft_spec),
            rounds=list(costs.rounds),
            agreement=seen(winner.by_layers),
            lookup=costs.lookup if matches else 0.0,
            matches=matches,
        )

    def _round_costs_of_other_rows(
        self, prediction: Prediction, own: RoundCosts, texts: Sequence[Text]
    ) -> list[RoundCosts]:
        """The same for the other numbers of rows that the plan is to serve."""
        others = sorted(set(self.settings.other_rows) - {self.profile.rows})
        if not others:
            return []
        scene = Scene(
            model=self.model,
            draft_spec=prediction.draft_spec,
            texts=texts,
            sampling=self.settings.sampling,
            backend=self.settings.backend,
            compile=self.settings.compile,
            pass_lengths=pass_lengths_of(prediction.draft_spec, self.profile.pass_lengths),
        )
        found: list[RoundCosts] = []
        with self.phases.phase("rows"):
            for done, rows in enumerate(others):
                self.phases.tell("rows", done, len(others))
                try:
                    found.append(scene.round_costs(own, rows))
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):  # else what was found so far must not be lost
                        raise
                    advice = f"the plan does not serve them; give fewer than {rows} as other rows"
                    warnings.warn(f"memory does not suffice for {rows} rows: {advice}", PlanWarning, stacklevel=2)
            self.phases.tell("rows", len(others), len(others))
        return found

    def _conditions(self, texts: Sequence[Text]) -> Conditions:
        return Conditions(
            device=self.profile.device,
            dtype=self.profile.dtype,
            rows=self.profile.rows,
            context=round(sum(text.prompt + text.written / 2 for text in texts) / len(texts)),
            sampling=self.settings.sampling.to_dict(),
            compiled=self.profile.compiled,
            versions={**versions(), "selfspec": version("selfspec"), "optuna": optuna.__version__},
        )
