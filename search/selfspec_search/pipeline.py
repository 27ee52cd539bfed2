"""The pipeline of a search: texts, profile, trials, confirmation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.errors import InputError
from selfspec.models.quantised_linear import device_unsupported_reason
from selfspec.models.support import check_supported
from selfspec.plan.draft_spec import Format
from selfspec.runtime.compiling import will_compile
from selfspec.runtime.runtime import Runtime
from selfspec.utils.sizes import in_words
from selfspec_search.budget import Budget
from selfspec_search.confirm.plan_writer import Phases, PlanWriter, Trials, check_memory, measure_for
from selfspec_search.confirm.repick import repick
from selfspec_search.confirm.result import SearchResult
from selfspec_search.profile.draft_costs import FORMATS
from selfspec_search.profile.profile import Profile
from selfspec_search.replay import text_cache
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.text_cache import TEXTS, TextCache, digest_of, model_fingerprint
from selfspec_search.replay.texts import Text, check_prompts, time_texts, write_texts
from selfspec_search.settings import OnProgress, SearchSettings
from selfspec_search.space import Space
from selfspec_search.storage.study_store import SPACE, Store, load_study
from selfspec_search.study.build_space import build_space, most_draft_weight_bytes
from selfspec_search.study.constraints import Limits
from selfspec_search.study.objective import Prices, ceiling
from selfspec_search.study.study import Study

NOTICE_BYTES = 2**26
"""Bytes: a notice names the memory of draft weights above this."""
LEAST_NEW_TOKENS = 24
"""Tokens: the shortest texts that a budget may lead to."""
STUDY_FORMAT = 2
"""Version of the trials' records. Studies of format 1 also tried exit thresholds; repick still reads them."""
PROFILE = "profile"
"""Key of the profile in the shared data of a study."""


def search(
    model: PreTrainedModel,
    calibration: Sequence[Tensor],
    held_out: Sequence[Tensor],
    settings: SearchSettings | None = None,
    on_progress: OnProgress | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> SearchResult:
    """Find the plan that decodes fastest on this device, and confirm the plan by decoding.

    During the trials, Ctrl-C ends the trials, and the best plans so far are confirmed. In other phases, Ctrl-C ends the
    search.

    Args:
        model: a supported causal language model, in the dtype and on the device of its later use.
        calibration: token ids of prompts, 1-D each, to compare plans. With fewer than 32 prompts, plans overfit.
        held_out: token ids of other prompts, 1-D each, to confirm the best few plans.
        settings: see `SearchSettings`.
        on_progress: called with the progress of each phase.
        on_notice: called with one line for the user, for example about a lost connection.

    Raises:
        InputError: the prompts, the settings or the storage cannot be used.
        UnsupportedModelError: the model is not supported.
    """
    check_supported(model)
    check_prompts(model, calibration, "calibration")
    check_prompts(model, held_out, "held-out")
    settings = settings or SearchSettings()
    for draft_spec in settings.start_from:
        draft_spec.validate(model.config.num_hidden_layers)
    return _Search(
        model=model,
        prompts=[*calibration, *held_out],
        calibration=len(calibration),
        settings=settings,
        phases=Phases(
            on_progress=on_progress or (lambda progress: None), budget=Budget(seconds=settings.budget or float("inf"))
        ),
        on_notice=on_notice or (lambda line: None),
    ).run()


@dataclass(frozen=True, kw_only=True)
class _Search:
    """One search, phase by phase. The first `calibration` prompts are for calibration, the others are held out."""

    model: PreTrainedModel
    prompts: Sequence[Tensor]
    calibration: int
    settings: SearchSettings
    phases: Phases
    on_notice: Callable[[str], None]

    def run(self) -> SearchResult:
        identity = self._identity()
        num_layers = self.model.config.num_hidden_layers
        storage, study = self.settings.storage, self.settings.study_name
        with Store.open(storage, study, identity, num_layers=num_layers, on_notice=self.on_notice) as store:
            shared = store.share(self._make_shared)
            texts = text_cache.from_bytes(shared[TEXTS])
            check_memory(self.model, texts, self.calibration, self.settings)
            profile = Profile.from_dict(json.loads(shared[PROFILE]))
            store.space = Space.from_bytes(shared[SPACE])
            self._check_formats(store.space)
            with self.phases.phase("trials"):
                trials = self._trials(store, profile, texts[: self.calibration])
        return self._result(trials, profile, texts)

    def _result(self, trials: Trials, profile: Profile, texts: Sequence[Text]) -> SearchResult:
        settings = self.settings
        if settings.storage is not None and not profile.is_of(self.model.device):
            # The profile is of the creator's device: this worker repicks from the same trials with its own profile.
            study = load_study(settings.storage, trials.study)
            picked = repick(self.model, study, settings, self.phases.on_progress)
            return replace(picked, interrupted=trials.interrupted)
        writer = PlanWriter(model=self.model, settings=settings, profile=profile, phases=self.phases)
        return writer.run(trials, texts[: self.calibration], texts[self.calibration :])

    def _identity(self) -> dict[str, Any]:
        """Everything that must be equal for the workers of a study to compare their trials."""
        settings = self.settings
        return {
            "format": STUDY_FORMAT,
            "model": self.model.config.model_type,
            "weights": model_fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "prompts": digest_of([prompt.tolist() for prompt in self.prompts]),
            "calibration": self.calibration,
            "gamma_max": settings.gamma_max,
            "lookup_max": settings.lookup_max,
            "new_tokens": settings.new_tokens,
            "sampling": settings.sampling.to_dict(),
            "generation config": settings.sampling.resolved(self.model),
            "release": version("selfspec"),
            "rows": settings.rows,
            "lookup": settings.lookup,
            "compiled": will_compile(settings.compile, self.model.device),
            "draft": settings.draft,
            "max_draft_cost": settings.max_draft_cost,
            "draft_memory": settings.draft_memory,
        }

    def _make_shared(self) -> Mapping[str, bytes]:
        """The texts, the profile and the space, by key: the creator makes them for all workers."""
        with self.phases.phase("texts"):
            texts = self._write()
        check_memory(self.model, texts, self.calibration, self.settings)
        formats = [] if self.settings.draft == "skip" else list(FORMATS)
        if (size := most_draft_weight_bytes(self.model, formats)) > NOTICE_BYTES:
            self.on_notice(
                f"draft weights ({', '.join(map(str, formats))}) take up to {in_words(size)} in addition to the model "
                "while the search runs; --draft skip avoids them"
            )
        with self.phases.phase("profile"):
            profile = measure_for(self.model, texts, self.settings, self.phases, formats)
        space = build_space(self.model, profile, texts[: self.calibration], self.settings.draft)
        return {
            TEXTS: text_cache.to_bytes(texts),
            PROFILE: json.dumps(profile.to_dict()).encode(),
            SPACE: space.to_bytes(),
        }

    def _check_formats(self, space: Space) -> None:
        """Raise `InputError` if this device cannot replay a format of the study."""
        for code in space.formats:
            if (unsupported_reason := device_unsupported_reason(Format.parse(code), self.model.device)) is not None:
                raise InputError(
                    f"the study tries drafts in {Format.parse(code)}, which this worker cannot replay: "
                    f"{unsupported_reason}; give another --study, or --repick its trials here"
                )

    def _write(self) -> list[Text]:
        """The target's texts, from the cache or written now."""
        settings, cache, total = self.settings, TextCache(), len(self.prompts)
        sampling = settings.sampling.resolved(self.model)
        runtime = Runtime(self.model, backend=settings.backend)
        new_tokens = self._affordable_tokens(runtime)
        made_with = {"new_tokens": new_tokens, "sampling": sampling, "backend": settings.backend}
        if settings.sampling.do_sample:
            made_with["seed"] = settings.seed
        key = cache.key(self.model, self.prompts, **made_with)
        if (kept := cache.read(key)) is not None:
            return kept
        texts = dict[int, Text]()
        self.phases.report("texts", 0, total)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            for index, text in write_texts(runtime, self.prompts, new_tokens, settings.sampling):
                texts[index] = text
                self.phases.report("texts", len(texts), total)
        written = [texts[index] for index in range(total)]
        cache.write(key, written)
        return written

    def _affordable_tokens(self, runtime: Runtime) -> int:
        """Tokens to write after each prompt: `new_tokens`, or as many as the budget allows."""
        settings, budget = self.settings, self.phases.budget
        if not budget.is_limited:
            return settings.new_tokens
        seconds = time_texts(runtime, self.prompts, settings.sampling)
        allowed = seconds.tokens_within(budget.share("texts"))
        if allowed >= settings.new_tokens:
            return settings.new_tokens
        tokens = min(settings.new_tokens, max(LEAST_NEW_TOKENS, allowed))
        budget.cut(f"texts have {tokens} new tokens instead of {settings.new_tokens}")
        return tokens

    def _trials(self, store: Store, profile: Profile, texts: Sequence[Text]) -> Trials:
        """Run the trials. Their replay is freed at the end, since the confirmation needs memory for another replay."""
        settings, prices = self.settings, Prices.of(profile, texts, lookup=self.settings.lookup).with_lookups(texts)
        if (most := ceiling(prices.costs)) <= 1:
            self.on_notice(f"no draft can win on this device: one that is free and always right reaches {most:.2f}x")
            settings = replace(settings, trials=1)
        total = settings.trials
        self.phases.report("trials", 0, total)
        study = Study(
            Replay(self.model, texts, settings.gamma_max, sampling=settings.sampling, memory=settings.memory),
            prices,
            settings,
            store,
            Limits.of(self.model, settings),
            on_trial=lambda done, best: self.phases.report("trials", min(done, total), total, best),
            on_sensitivity=lambda done, every: self.phases.report("sensitivity", done, every),
            budget=self.phases.budget,
        )
        study.run()
        if not (ranking := study.findings.ranking()):
            raise InputError(_nothing_found(study))
        return Trials(
            study=store.name,
            ranking=ranking,
            lookup=study.prices.best_lookup(texts),
            complete=study.findings.complete,
            pruned=study.findings.pruned,
            interrupted=study.interrupted,
        )


def _nothing_found(study: Study) -> str:
    settings = study.settings
    limits = {
        "max_draft_cost": f"costs at most {settings.max_draft_cost} of a step of the whole model",
        "draft_memory": f"takes at most {in_words(settings.draft_memory or 0)} of memory",
    }
    given = [name for name in limits if getattr(settings, name) is not None]
    if study.findings.trials and given:
        return (
            f"no draft that was tried {' and '.join(limits[name] for name in given)}; raise {' or '.join(given)}, "
            "or give the search more time"
        )
    return "the search ended before its first trial; give the search more time"
