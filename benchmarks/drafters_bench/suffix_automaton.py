"""SuffixAutomaton: all substrings of a growing text, and where the longest suffix that occurred before ended last."""

from __future__ import annotations

from collections.abc import Iterable


class SuffixAutomaton:
    """Online construction (Blumer et al. 1985), one token at a time, on the host.

    `match` is the longest suffix of the text that also ends earlier, and the latest place where it does: what prompt
    lookup asks for, whatever the length of the match.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._latest = [-1], [0], [0]
        self._last, self._size = 0, 0
        self.match = (0, 0)
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token; `match` is then (length, the place behind the earlier occurrence)."""
        self._size += 1
        state, new = self._last, self._state({}, self._length[self._last] + 1)
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        self._link[new] = 0 if state < 0 else self._joined(state, token)
        self._last = new
        self._note()

    def _joined(self, state: int, token: int) -> int:
        """The state that a new one's suffix link leads to, split off where it holds longer strings, too."""
        target = self._next[state][token]
        if self._length[state] + 1 == self._length[target]:
            return target
        clone = self._state(dict(self._next[target]), self._length[state] + 1)
        self._link[clone], self._latest[clone] = self._link[target], self._latest[target]
        self._link[target] = clone
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _note(self) -> None:
        """Remember that every suffix ends here, once the longest that ended earlier is known."""
        state = self._link[self._last]
        self.match = (self._length[state], self._latest[state]) if state > 0 else (0, 0)
        state = self._last
        while state > 0:
            self._latest[state] = self._size
            state = self._link[state]

    def _state(self, following: dict[int, int], length: int) -> int:
        self._next.append(following)
        self._link.append(-1)
        self._length.append(length)
        self._latest.append(0)
        return len(self._link) - 1
