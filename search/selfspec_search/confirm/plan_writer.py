"""PlanWriter: the end of every search. The best plans decode held-out texts, and the fastest becomes the plan."""

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
from selfspec.plan.draft_spec import DraftSpec, Format
from selfspec.plan.plan import Plan
from selfspec.plan.provenance import Conditions, Figures, ModelIdentity, Provenance
from selfspec.plan.round_costs import RoundCosts
from selfspec_search.budget import Budget
from selfspec_search.confirm.confirm import Confirmation, Confirmed, confirm, pass_lengths_of
from selfspec_search.confirm.result import SearchResult, table, why
from selfspec_search.profile.profile import Profile, ProfileSettings, measure, position_limit
from selfspec_search.profile.round_costs import BatchCostProbe, match_shares, strip_trailing_zeros
from selfspec_search.replay.memory import Memory
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.table import Table
from selfspec_search.replay.texts import Text
from selfspec_search.settings import OnProgress, Phase, Progress, SearchSettings
from selfspec_search.study.objective import Prediction, Prices, plain_figures


@dataclass(kw_only=True)
class Phases:
    """The seconds of each phase of a search, its budget, and its progress reports."""

    on_progress: OnProgress
    budget: Budget = field(default_factory=Budget)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[name] = perf_counter() - start

    def report(self, phase: Phase, done: int, total: int, best: float | None = None) -> None:
        left = self.budget.left if self.budget.is_limited else None
        self.on_progress(Progress(phase=phase, done=done, total=total, best=best, left=left))


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The outcome of a study's trials."""

    study: str  # the study's name
    ranking: Sequence[Prediction]  # the best first
    lookup: Prediction | None  # of prompt lookup without layer skipping; None without prompt lookup
    complete: int  # trials of all workers
    pruned: int
    interrupted: bool = False  # whether the user ended the trials


def measure_for(
    model: PreTrainedModel,
    texts: Sequence[Text],
    settings: SearchSettings,
    phases: Phases,
    formats: Sequence[Format] = (),
) -> Profile:
    """Measure a profile at the contexts of these texts, from the shortest prompt to the longest text."""
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
        budget=phases.budget,
        on_cycle=lambda done, total: phases.report("profile", done, total),
    )


def check_memory(model: PreTrainedModel, texts: Sequence[Text], calibration: int, settings: SearchSettings) -> None:
    """Raise `InputError` early if memory is too small to replay the calibration texts (the first) or the others."""
    memory = Memory(model, settings.gamma_max, settings.memory, sampled=settings.sampling.do_sample)
    for some in (texts[:calibration], texts[calibration:]):
        memory.check(some)


@dataclass(frozen=True, kw_only=True)
class PlanWriter:
    """Confirms the best plans of a study and writes the fastest plan."""

    model: PreTrainedModel
    settings: SearchSettings
    profile: Profile
    phases: Phases

    def run(self, trials: Trials, texts: Sequence[Text], held_out: Sequence[Text]) -> SearchResult:
        """Confirm the best of `trials`, which were predicted on `texts`, on the `held_out` texts."""
        chosen = list(trials.ranking[: self._affordable_plans(held_out)])
        if trials.lookup is not None and trials.lookup.speedup > 1:
            chosen.append(trials.lookup)
        with self.phases.phase("confirm"):
            confirmation = self._confirm(chosen, held_out)
        confirmed = sorted(confirmation.confirmed, key=lambda one: one.rank)
        winner = next((one for one in confirmed if one.is_faster), None)
        plain, *_ = confirmation.plains.values()
        provenance = self._provenance(winner or confirmed[0], plain, trials, texts, held_out)
        found = {"confirmation": table(confirmation.plains, confirmed), "why": why(confirmed, winner)}
        shared = {
            "model": ModelIdentity.of(self.model.config),
            "provenance": provenance.model_copy(update=found),
        }
        if winner is None:
            plan = Plan.none(**shared, pass_lengths=confirmation.pass_lengths)
        else:
            prediction = winner.prediction
            changes = {
                **shared,
                "round_costs": self._round_costs(winner, texts),
                "pass_lengths": pass_lengths_of(prediction.draft_spec, self.profile.pass_lengths),
            }
            plan = prediction.plan.model_copy(update=changes)
        return SearchResult(
            plan=plan,
            plains=confirmation.plains,
            confirmed=confirmed,
            winner=winner,
            profile=self.profile,
            trials_complete=trials.complete,
            trials_pruned=trials.pruned,
            interrupted=trials.interrupted,
            seconds=self.phases.seconds,
            cuts=self.phases.budget.cuts,
        )

    def _affordable_plans(self, held_out: Sequence[Text]) -> int:
        """How many plans can be confirmed: each, and plain decoding, decodes one text to warm up and two that count."""
        budget, wanted = self.phases.budget, self.settings.confirm
        if not budget.is_limited:
            return wanted
        costs = Prices.of(self.profile, held_out, lookup=False).costs
        longest = max(text.written for text in held_out) * costs.rounds[0] + costs.prefill
        plans = min(wanted, max(1, int(budget.left / (3 * longest)) - 1))
        if plans < wanted:
            budget.cut(f"{plans} of {wanted} plans were confirmed")
        return plans

    def _confirm(self, chosen: Sequence[Prediction], held_out: Sequence[Text]) -> Confirmation:
        settings, fastest = self.settings, max(prediction.speedup for prediction in chosen)
        return confirm(
            self.model,
            chosen,
            Replay(self.model, held_out, settings.gamma_max, sampling=settings.sampling, memory=settings.memory),
            Prices.of(self.profile, held_out, lookup=settings.lookup),
            settings,
            self.profile.pass_lengths,
            lambda done, total: self.phases.report("confirm", done, total, fastest),
            budget=self.phases.budget,
        )

    def _provenance(
        self, best: Confirmed, plain: Figures, trials: Trials, texts: Sequence[Text], held_out: Sequence[Text]
    ) -> Provenance:
        """The figures of the plan, or of plain decoding if the best plan is no faster; and how they were found."""
        predicted, on_held_out, measured = best.prediction.figures, best.predicted_on_held_out, best.measured
        if not best.is_faster:
            predicted, on_held_out = (
                plain_figures(Table.empty(some, 1), Prices.of(self.profile, some, lookup=False))
                for some in (texts, held_out)
            )
            measured = plain
        settings, profile = self.settings, self.profile
        return Provenance(
            conditions=Conditions(
                device=profile.device,
                dtype=profile.dtype,
                rows=profile.rows,
                context=round(sum(text.prompt + text.written / 2 for text in texts) / len(texts)),
                sampling=settings.sampling.to_dict(),
                compiled=profile.compiled,
                versions={**versions(), "selfspec": version("selfspec"), "optuna": optuna.__version__},
            ),
            seed=settings.seed,
            trials=trials.complete + trials.pruned,
            study=trials.study,
            settings={
                "sampler": settings.sampler,
                "gamma_max": settings.gamma_max,
                "texts": len(texts),
                **({"budget": settings.budget, "cut short": self.phases.budget.cuts} if settings.budget else {}),
            },
            predicted=predicted,
            predicted_on_held_out=on_held_out,
            measured=measured,
            errors=best.errors,  # of the best plan even if plain decoding won: then the errors are largest
        )

    def _round_costs(self, winner: Confirmed, texts: Sequence[Text]) -> list[RoundCosts]:
        """Round costs of the winner for the search's rows, then for other numbers of rows."""
        prices, profile = Prices.of(self.profile, texts, lookup=self.settings.lookup), self.profile
        costs, matches = prices.costs, list[list[float]]()
        if prices.lookup is not None:
            matches = match_shares(texts, prices.lookup, profile.gamma_max)
        own = RoundCosts(
            rows=profile.rows,
            draft_step=costs.draft_step(winner.prediction.draft_spec),
            rounds=list(costs.rounds),
            agreement=strip_trailing_zeros(winner.by_layers),
            lookup=costs.lookup if matches else 0.0,
            matches=matches,
        )
        return [own, *self._other_round_costs(winner.prediction.draft_spec, own, texts)]

    def _other_round_costs(self, draft_spec: DraftSpec, own: RoundCosts, texts: Sequence[Text]) -> Iterator[RoundCosts]:
        """Measured round costs for the other numbers of rows, as far as memory suffices."""
        others = sorted(set(self.settings.more_rows) - {self.profile.rows})
        if not others:
            return
        probe = BatchCostProbe(
            model=self.model,
            draft_spec=draft_spec,
            texts=texts,
            sampling=self.settings.sampling,
            backend=self.settings.backend,
            compile=self.settings.compile,
            pass_lengths=pass_lengths_of(draft_spec, self.profile.pass_lengths),
        )
        with self.phases.phase("rows"):
            for done, rows in enumerate(others):
                self.phases.report("rows", done, len(others))
                try:
                    yield probe.round_costs(own, rows)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):  # without memory for these rows, the plan remains valid
                        raise
                    advice = f"the plan does not serve them; give fewer than {rows} as more_rows"
                    warnings.warn(f"memory does not suffice for {rows} rows: {advice}", PlanWarning, stacklevel=2)
            self.phases.report("rows", len(others), len(others))
