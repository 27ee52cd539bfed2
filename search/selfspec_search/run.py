"""search: texts, profile, trials, confirmation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from time import perf_counter

import optuna
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.errors import InputError
from selfspec.plan import Conditions, Figures, ModelIdentity, Plan, Provenance
from selfspec.runtime import Runtime
from selfspec_search.confirm import Confirmed, confirm
from selfspec_search.objective import Prediction
from selfspec_search.profile import Profile, measure
from selfspec_search.replay import Replay
from selfspec_search.result import SearchResult
from selfspec_search.settings import OnProgress, Phase, Progress, SearchSettings
from selfspec_search.study import Study
from selfspec_search.texts import Text, check_prompts, write_texts


def search(
    model: PreTrainedModel,
    calibration: Sequence[Tensor],
    held_out: Sequence[Tensor],
    settings: SearchSettings | None = None,
    on_progress: OnProgress | None = None,
) -> SearchResult:
    """Find the plan that decodes fastest on this device, and confirm it by decoding.

    Ctrl-C ends the trials; the best plans found until then are still confirmed. A second one, or one in another phase,
    ends the search.

    Args:
        model: a supported causal language model, in the dtype and on the device that it will serve from.
        calibration: token ids of prompts, 1-D each, on which plans are compared; 32 or more, or the best one overfits.
        held_out: other such prompts, on which the best few plans are confirmed.
        settings: see `SearchSettings`.
        on_progress: called as the search goes on, with what a progress bar needs.

    Raises:
        InputError: prompts or settings that cannot be used.
        UnsupportedModelError: the model's family is not supported.
    """
    return _Search(model, settings or SearchSettings(), on_progress or (lambda progress: None)).run(
        calibration, held_out
    )


class _Search:
    """One search, phase by phase."""

    def __init__(self, model: PreTrainedModel, settings: SearchSettings, on_progress: OnProgress) -> None:
        self.model, self.settings, self.on_progress = model, settings, on_progress
        self.seconds: dict[str, float] = {}

    def run(self, calibration: Sequence[Tensor], held_out: Sequence[Tensor]) -> SearchResult:
        check_prompts(self.model, calibration, "calibration")
        check_prompts(self.model, held_out, "held-out")
        with self._phase("texts"):
            texts = self._write([*calibration, *held_out])
            replay = Replay(self.model, texts[: len(calibration)], self.settings.gamma_max)
            check = Replay(self.model, texts[len(calibration) :], self.settings.gamma_max)
        with self._phase("profile"):
            profile = self._measure([*calibration, *held_out])
        with self._phase("trials"):
            study = self._study(replay, profile)
        if not study.found:
            raise InputError("the search ended before it had tried one skip set; give it more time")
        ranking = study.ranking()
        with self._phase("confirm"):
            plain, confirmed = confirm(
                self.model,
                ranking[: self.settings.confirm],
                check,
                profile,
                self.settings,
                lambda done, total: self._tell("confirm", done, total, ranking[0].speedup if ranking else None),
            )
        confirmed.sort(key=lambda c: -c.measured.speedup)
        return self._result(profile, study, plain, confirmed)

    @contextmanager
    def _phase(self, name: Phase) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[name] = perf_counter() - start

    def _tell(self, phase: Phase, done: int, total: int, best: float | None = None) -> None:
        self.on_progress(Progress(phase=phase, done=done, total=total, best=best))

    def _write(self, prompts: Sequence[Tensor]) -> list[Text]:
        runtime = Runtime(self.model, backend=self.settings.backend)
        texts: dict[int, Text] = {}
        self._tell("texts", 0, len(prompts))
        for index, text in write_texts(runtime, prompts, self.settings.new_tokens):
            texts[index] = text
            self._tell("texts", len(texts), len(prompts))
        return [texts[index] for index in range(len(prompts))]

    def _measure(self, prompts: Sequence[Tensor]) -> Profile:
        return measure(
            self.model,
            prompts,
            gamma_max=self.settings.gamma_max,
            slots=max(map(len, prompts)) + self.settings.new_tokens + self.settings.gamma_max + 1,
            backend=self.settings.backend,
            compile=self.settings.compile,
            on_cycle=lambda done, total: self._tell("profile", done, total),
        )

    def _study(self, replay: Replay, profile: Profile) -> Study:
        total = self.settings.trials
        self._tell("trials", 0, total)
        study = Study(
            replay, profile, self.settings, on_trial=lambda done, best: self._tell("trials", done, total, best)
        )
        study.run()
        return study

    def _result(self, profile: Profile, study: Study, plain: Figures, confirmed: Sequence[Confirmed]) -> SearchResult:
        winner = next((c for c in confirmed[:1] if c.measured.speedup > 1), None)
        predicted = winner.prediction.figures if winner else _plain_on(study.replay, profile)
        on_held_out = winner.predicted_on_held_out if winner else plain
        provenance = Provenance(
            conditions=self._conditions(profile),
            seed=self.settings.seed,
            trials=study.trials,
            predicted=predicted,
            predicted_on_held_out=on_held_out,
            measured=winner.measured if winner else plain,
            profile=profile.to_dict(),
        )
        return SearchResult(
            plan=self._plan(winner.prediction if winner else None, provenance),
            plain=plain,
            confirmed=confirmed,
            calibration_figures=predicted,
            held_out_figures=winner.measured if winner else plain,
            profile=profile,
            trials_complete=study.complete,
            trials_pruned=study.pruned,
            interrupted=study.interrupted,
            seconds=self.seconds,
        )

    def _plan(self, winner: Prediction | None, provenance: Provenance) -> Plan:
        identity = ModelIdentity.of(self.model.config)
        if winner is None:
            return Plan.none(model=identity, provenance=provenance)
        return Plan(
            skip_set=winner.skip_set,
            gamma=winner.drafting.gamma,
            exit_threshold=winner.drafting.threshold,
            model=identity,
            provenance=provenance,
        )

    def _conditions(self, profile: Profile) -> Conditions:
        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return Conditions(
            device=name,
            dtype=str(self.model.dtype).removeprefix("torch."),
            compiled=profile.compiled,
            versions={
                "selfspec": version("selfspec"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "optuna": optuna.__version__,
            },
        )


def _plain_on(replay: Replay, profile: Profile) -> Figures:
    tokens = sum(text.written for text in replay.texts)
    seconds = tokens * profile.rounds[0] + len(replay.texts) * profile.prefill
    return Figures(
        tokens_per_round=1.0,
        acceptance_rate=0.0,
        tokens_per_second=tokens / seconds,
        speedup=1.0,
        texts=len(replay.texts),
    )
