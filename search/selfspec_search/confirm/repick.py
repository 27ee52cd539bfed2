"""Repick: the best plan of a study's trials at the costs of another device or another number of rows."""

from __future__ import annotations

from base64 import b64decode
from dataclasses import replace

from transformers import PreTrainedModel

from selfspec.errors import InputError
from selfspec.plan.draft_spec import Format
from selfspec_search.confirm.plan_writer import Phases, PlanWriter, Trials, check_memory, measure_for
from selfspec_search.confirm.result import SearchResult
from selfspec_search.profile.profile import Profile
from selfspec_search.replay import text_cache
from selfspec_search.replay.sampling_settings import Sampling
from selfspec_search.replay.table import Table
from selfspec_search.replay.text_cache import TEXTS, model_fingerprint
from selfspec_search.settings import OnProgress, SearchSettings
from selfspec_search.storage.study_store import StoredStudy
from selfspec_search.study.build_space import slower
from selfspec_search.study.constraints import Limits
from selfspec_search.study.objective import Prices, best, ranked


def repick(
    model: PreTrainedModel,
    study: StoredStudy,
    settings: SearchSettings | None = None,
    on_progress: OnProgress | None = None,
) -> SearchResult:
    """Pick the best plan of a study for this device and `settings.rows` rows, without new trials.

    Every trial stores its acceptance table. A profile measured here turns the tables into speedups, and the best few
    plans are confirmed by decoding. Depths that the study did not replay are estimated from the first depth.

    Args:
        model: the model of the study.
        study: see `load_study`.
        settings: `rows`, `more_rows`, `compile`, `backend`, `lookup`, `max_draft_cost`, `draft_memory` and the
            settings of the confirmation are used. Texts, sampling and the longest drafts are the study's.
        on_progress: called with the progress of each phase.

    Raises:
        InputError: the study is about another model, or holds no usable trial.
    """
    _check(model, study)
    made_with, settings = study.identity, settings or SearchSettings()
    looked_up = settings.lookup and made_with.get("lookup", False)
    settings = replace(
        settings,
        gamma_max=made_with["gamma_max"],
        lookup_max=made_with.get("lookup_max") if looked_up else None,
        new_tokens=made_with["new_tokens"],
        sampling=Sampling(**made_with["sampling"]),
    )
    phases = Phases(on_progress=on_progress or (lambda progress: None))
    all_texts, calibration = text_cache.from_bytes(study.blobs[TEXTS]), int(made_with["calibration"])
    texts, held_out = all_texts[:calibration], all_texts[calibration:]
    check_memory(model, all_texts, calibration, settings)
    with phases.phase("profile"):
        formats = [Format.parse(code) for code in study.space.formats]
        profile = measure_for(model, all_texts, settings, phases, formats)
    with phases.phase("trials"):
        prices = Prices.of(profile, texts, lookup=settings.lookup).with_lookups(texts)
        # Trials that were refused as too expensive have no table. A draft spec that was tried twice counts once.
        stored = {trial.draft_spec: trial.record["table"] for trial in study.trials if "table" in trial.record}
        limits = Limits.of(model, settings)
        found = [
            best(Table.from_bytes(b64decode(table)).extended(settings.gamma_max), prices, draft_spec)
            for draft_spec, table in stored.items()
            if limits.check(draft_spec, prices).is_feasible
        ]
    if not found:
        raise InputError(f"no trial of study '{study.name}' can be used here: {_why_none(settings, profile)}")
    complete = sum(trial.value is not None for trial in study.trials)
    trials = Trials(
        study=study.name,
        ranking=ranked(found),
        lookup=prices.best_lookup(texts),
        complete=complete,
        pruned=len(study.trials) - complete,
    )
    return PlanWriter(model=model, settings=settings, profile=profile, phases=phases).run(trials, texts, held_out)


def _why_none(settings: SearchSettings, profile: Profile) -> str:
    """Why no trial can be used, and what to do."""
    given = [name for name in ("max_draft_cost", "draft_memory") if getattr(settings, name) is not None]
    if given:
        return f"none is within {' and '.join(given)}; raise the limit"
    return f"their formats are no faster ({slower(profile)}); search on this device"


def _check(model: PreTrainedModel, study: StoredStudy) -> None:
    if study.identity.get("weights") != model_fingerprint(model):
        raise InputError(
            f"study '{study.name}' is about another model than the one given (its weights, config or dtype differ); "
            "give the model and dtype of the study"
        )
    if TEXTS not in study.blobs or not any("table" in trial.record for trial in study.trials):
        raise InputError(f"study '{study.name}' holds no finished trial; run 'selfspec search' on it first")
