"""repicking: the best plan of a study's trials, priced for another device or another number of rows."""

from __future__ import annotations

from base64 import b64decode
from dataclasses import replace

from transformers import PreTrainedModel

from selfspec.errors import InputError
from selfspec.plan.draft_spec import Format
from selfspec_search.confirm.plan_writer import Finish, Phases, Trials, check_memory, measure_for
from selfspec_search.confirm.result import SearchResult
from selfspec_search.profile.profile import Profile
from selfspec_search.replay import text_cache
from selfspec_search.replay.sampling_settings import Sampling
from selfspec_search.replay.table import Table
from selfspec_search.replay.text_cache import TEXTS, model_fingerprint
from selfspec_search.settings import OnProgress, SearchSettings
from selfspec_search.storage.study_store import StoredStudy, StoredTrial
from selfspec_search.study.build_space import slower
from selfspec_search.study.constraints import limits_of
from selfspec_search.study.objective import Prices, best, ranked


def repick(
    model: PreTrainedModel,
    study: StoredStudy,
    settings: SearchSettings | None = None,
    on_progress: OnProgress | None = None,
) -> SearchResult:
    """Pick the best plan of a study for this device, and for `settings.rows` rows, without any new trial.

    Every trial keeps what its draft got accepted; a profile measured here prices it anew, and the best few are
    confirmed by decoding here. Depths that were not replayed, because the trial was ended early or longer drafts did
    not look worth it where the study was made, are estimated from the first one.

    Args:
        model: the one that the study is about.
        study: see `load_study`.
        settings: `rows`, `other_rows`, `compile`, `backend`, `lookup`, `max_draft_cost`, `draft_memory` and those of
            the confirmation count; texts, sampling and the longest drafts are the study's.

    Raises:
        InputError: the study is about another model, or holds no finished trial.
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
    texts, calibration = text_cache.from_bytes(study.blobs[TEXTS]), int(made_with["calibration"])
    check_memory(model, texts, calibration, settings)
    with phases.phase("profile"):
        formats = [Format.parse(code) for code in study.space.formats]
        profile = measure_for(model, texts, settings, phases, formats)
    with phases.phase("trials"):
        prices = Prices.of(profile, texts[:calibration], lookup=settings.lookup).with_lookups(texts[:calibration])
        # Sets that were too expensive to be tried at all have no table.
        priced = [trial for trial in study.trials if "table" in trial.record]
        # A draft spec that was tried twice counts once.
        tables, limits = {trial.draft_spec: trial for trial in priced}, limits_of(model, settings)
        found = [
            best(table_of(trial, settings.gamma_max), prices, draft_spec)
            for draft_spec, trial in tables.items()
            if limits.check(draft_spec, prices).is_feasible
        ]
    if not found:
        raise InputError(f"no trial of study '{study.name}' can be used here: {_why_none(settings, profile)}")
    whole = sum(trial.value is not None for trial in study.trials)
    trials = Trials(
        study=study.name,
        ranking=ranked(found),
        lookup=prices.best_lookup(texts[:calibration]),
        complete=whole,
        pruned=len(study.trials) - whole,
    )
    finish = Finish(model=model, settings=settings, profile=profile, phases=phases)
    return finish.run(trials, texts[:calibration], texts[calibration:])


def _why_none(settings: SearchSettings, profile: Profile) -> str:
    """Why all trials of a study were turned away, and what to do."""
    given = [name for name in ("max_draft_cost", "draft_memory") if getattr(settings, name) is not None]
    if given:
        return f"none is within {' and '.join(given)}; raise the limit"
    return f"their formats are no faster ({slower(profile)}); search on this device"


def table_of(trial: StoredTrial, depths: int) -> Table:
    """What a trial's draft got accepted, and beyond the depths that were replayed an estimate from the first one."""
    return Table.from_bytes(b64decode(trial.record["table"])).extended(depths)


def _check(model: PreTrainedModel, study: StoredStudy) -> None:
    if study.identity.get("weights") != model_fingerprint(model):
        raise InputError(
            f"study '{study.name}' is about another model than the one given (its weights, config or dtype differ); "
            "give the model and dtype that it was made with"
        )
    if TEXTS not in study.blobs or not any("table" in trial.record for trial in study.trials):
        raise InputError(f"study '{study.name}' holds no finished trial; run 'selfspec search' on it first")
