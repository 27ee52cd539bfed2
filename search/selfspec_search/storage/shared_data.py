"""Shared data: texts, profile and space, which all workers of a study share and the study's creator makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from optuna.trial import TrialState

from selfspec.errors import InputError
from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.storage.ledger import Ledger, blobs_of
from selfspec_search.storage.trial import Running

STUDY = "selfspec"
"""The attribute that marks a study of a search, and holds its identity and number of layers."""
SHARED = "shared"
"""The attribute with the keys of the shared blobs, written after all of them."""
SETUP = "selfspec:setup"
"""The attribute of setup trials, which run while a creator makes the shared data. It has the same value as `STUDY`.

A study's first trial is a setup trial. Storages give each trial number to one worker, so one worker is the first."""
POLL_SECONDS = 0.5
"""Seconds: pause between two looks for shared data."""


class SharedData:
    """A worker's access to shared data; `InputError` if the study has another identity or number of layers."""

    def __init__(self, ledger: Ledger, about: Mapping[str, Any]) -> None:
        self.created = False
        self._ledger = ledger
        self._about = about
        self._setup: Running | None = None
        self._check()
        self._become_creator()
        self._check()  # another worker may have begun the first trial in the meantime

    def share(self, make: Callable[[], Mapping[str, bytes]]) -> dict[str, bytes]:
        """The result of `make` in the worker that is the creator, for which other workers wait."""
        self._await_creator()
        if self._setup is not None:
            data = make()
            if self._keys() is None:  # else this worker was wrongly failed, and another one was faster
                for key, value in data.items():
                    self._ledger.set_blob(key, value)
                self._ledger.set(SHARED, list(data))
            self.leave()  # this was no trial of the search, which a sampler or a report should count
        attrs = self._ledger.attrs()
        blobs = blobs_of(attrs)
        return {key: blobs[key] for key in attrs[SHARED]}

    def leave(self) -> None:
        """Let another worker make what is still missing."""
        if self._setup is not None:
            self._setup.fail()
            self._setup = None

    def _check(self) -> None:
        first = next(iter(self._ledger.trials()), None)
        if first is None:
            return
        if SETUP not in first.user_attrs:
            raise InputError(f"{self._ledger.where} was not made by this search; choose another --study")
        theirs, ours = _parts(first.user_attrs[SETUP]), _parts(self._about)
        differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if differing:
            self.leave()
            parts = ", ".join(f"{key} {theirs.get(key, 'unset')} (here {ours.get(key, 'unset')})" for key in differing)
            raise InputError(f"{self._ledger.where} was made with {parts}; choose another --study")

    def _become_creator(self) -> None:
        """Become the creator, unless all is shared or another creator is alive."""
        if self._keys() is not None or self._creators():
            return
        setup = self._ledger.start(DraftSpec(), {}, {}, attrs={SETUP: self._about}).__enter__()
        creators = self._creators()
        if self._keys() is not None or creators[:1] != [setup.number]:
            setup.fail()
            return
        self._setup, self.created = setup, True
        self._ledger.set(STUDY, self._about)

    def _await_creator(self) -> None:
        """Wait until all is shared, or until this worker is the creator."""
        reported = False
        while self._setup is None and self._keys() is None:
            if not reported:
                self._ledger.storage.on_notice("waiting for the worker that writes texts and measures the profile")
                reported = True
            time.sleep(POLL_SECONDS)
            self._become_creator()

    def _creators(self) -> list[int]:
        """Numbers of the running setup trials; the first one's worker is the creator."""
        self._ledger.fail_stale()
        trials = self._ledger.trials()
        return [trial.number for trial in trials if SETUP in trial.user_attrs and trial.state == TrialState.RUNNING]

    def _keys(self) -> list[str] | None:
        """Keys of the shared blobs; None until all are there."""
        return self._ledger.attrs().get(SHARED)


def _parts(about: Mapping[str, Any]) -> dict[str, Any]:
    return {**about["identity"], "layers": about["num_layers"]}
