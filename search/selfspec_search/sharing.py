"""Sharing: what all workers of a study must have alike, agreed on by all and made by one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from optuna.trial import TrialState

from selfspec.errors import InputError
from selfspec.plan.draft_spec import Recipe
from selfspec_search import blobs
from selfspec_search.ledger import Ledger
from selfspec_search.running import Running
from selfspec_search.stored import SHARED, STUDY

SETUP = "selfspec:setup"
"""Marks a trial that stands for the making of what is shared. The first trial of a study is one, and says what the
study is about: every storage gives a trial's number to one worker only, so exactly one worker is the first."""
SHARE_SECONDS = math.inf
"""So long a worker waits for what another one makes, if that one lives: how long it takes, nobody knows."""
POLL_SECONDS = 0.5


class Sharing:
    """A worker's part in making what is shared.

    Args:
        ledger: the study.
        about: what its workers must agree on: `identity`, by readable names, and `num_layers`.

    Raises:
        InputError: the study is about something else.
    """

    def __init__(self, ledger: Ledger, about: Mapping[str, Any]) -> None:
        self.created = False
        self._ledger = ledger
        self._about = about
        self._making: Running | None = None
        self._check()
        self._claim()
        self._check()  # another worker may have been the first in the meantime

    def share(self, make: Callable[[], Mapping[str, bytes]], seconds: float) -> dict[str, bytes]:
        """What `make` returned where one worker called it; waits if that is another one."""
        self._await_maker(seconds)
        if self._making is not None and self._shared() is None:
            self._publish_all(self._making, make())
        return {key: self._held(key) for key in self._shared() or ()}

    def publish(self, key: str, data: bytes) -> None:
        for name, value in blobs.to_attrs(key, data):
            self._ledger.set(name, value)

    def get(self, key: str) -> bytes | None:
        return blobs.from_attrs(key, self._ledger.attrs())

    def leave(self) -> None:
        """Let another worker make what this one did not get done."""
        if self._making is not None:
            self._making.fail()
            self._making = None

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

    def _claim(self) -> None:
        """Become the maker, unless another worker is about to, or has made all."""
        if self._shared() is not None or self._makers():
            return
        mine = self._ledger.start(Recipe(), {}, {}, attrs={SETUP: self._about}).__enter__()
        makers = self._makers()
        if self._shared() is not None or makers[:1] != [mine.number]:
            mine.fail()
            return
        self._making, self.created = mine, True
        self._ledger.set(STUDY, self._about)

    def _await_maker(self, seconds: float) -> None:
        """Wait until all is shared, or until it falls to this worker to make it."""
        deadline, told = time.monotonic() + seconds, False
        while self._making is None and self._shared() is None:
            if time.monotonic() > deadline:
                raise InputError(
                    f"{self._ledger.where}: its maker has not published texts and profile after {seconds:g} s; "
                    "see whether that worker is busy or stopped, or choose another --study"
                )
            if not told:
                self._ledger.storage.on_notice("waiting for the worker that writes texts and measures the profile")
                told = True
            time.sleep(min(POLL_SECONDS, seconds))
            self._claim()

    def _makers(self) -> list[int]:
        """Numbers of the living workers that make, or are about to: the first one does."""
        running = [t for t in self._ledger.trials() if SETUP in t.user_attrs and t.state == TrialState.RUNNING]
        return [trial.number for trial in running if not self._ledger.ends_for_dead(trial)]

    def _publish_all(self, making: Running, data: Mapping[str, bytes]) -> None:
        for key, value in data.items():
            self.publish(key, value)
        self._ledger.set(SHARED, list(data))
        making.fail()  # it was no trial of the search: nothing that a sampler or a report should count
        self._making = None

    def _shared(self) -> list[str] | None:
        """The keys of what is shared, once all of it is there."""
        keys: list[str] | None = self._ledger.attrs().get(SHARED)
        return keys

    def _held(self, key: str) -> bytes:
        data = self.get(key)
        if data is None:
            raise InputError(f"{self._ledger.where} is damaged: its {key} cannot be read; choose another --study")
        return data


def _parts(about: Mapping[str, Any]) -> dict[str, Any]:
    return {**about["identity"], "layers": about["num_layers"]}
