"""Policy: how far to draft in each round, or not at all, decided once a round for the whole batch.

The plan's outlook says what a round costs at every draft length; how many tokens it brings is estimated as it goes.
What decides is the text so far, never a clock, so the same request is decoded the same way every time, and sampled text
keeps the model's distribution: a round's length is settled before anything in it is drawn.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from selfspec.drafting import Drafter, LayerSkipDrafter, NoDrafter, drafter_of
from selfspec.plan import Outlook, Plan
from selfspec.request import Committed, Request
from selfspec.runtime import Runtime, device_name
from selfspec.sampling import Draft

PolicyName = Literal["adaptive", "fixed"]

MEMORY = 32
"""About so many drafted tokens, at each depth, make up the running estimate."""
PRIOR = 8
"""So many drafted tokens the plan's own figures count for."""
HYSTERESIS = 0.02
"""Another draft length must promise so much more, relatively."""
FIRST_PROBE, LAST_PROBE = 8, 256
"""Plain rounds before a probe whether drafting pays again: at first, and after many that found that it does not."""


class AgreementEstimate:
    """A running estimate of agreement by depth: what was seen of late, beside what the plan expects.

    Depths share one level, the ratio of what was accepted to what the plan expected of it, so that depths which are
    not drafted now follow those that are.

    Args:
        expected: the plan's agreement at depths 0, 1, ...; deeper ones are like the last.
    """

    def __init__(self, expected: Sequence[float]) -> None:
        self._expected = list(expected)
        self._reached = [0.0] * len(expected)
        self._accepted = [0.0] * len(expected)

    def __getitem__(self, depth: int) -> float:
        at = min(depth, len(self._expected) - 1)
        prior = min(1.0, self._level() * self._expected[at])
        return (PRIOR * prior + self._accepted[at]) / (PRIOR + self._reached[at])

    def observe(self, reached: int, accepted: int) -> None:
        """A row reached this many depths (that is, all before them were accepted), and accepted at so many."""
        for depth in range(min(reached, len(self._expected))):
            self._reached[depth] += 1 - self._reached[depth] / MEMORY
            self._accepted[depth] += (depth < accepted) - self._accepted[depth] / MEMORY

    def tokens_per_round(self, gamma: int) -> float:
        """Expected of a round that drafts `gamma` tokens: 1 + a0 + a0 a1 + ... (Leviathan et al. 2023, eq. 1)."""
        tokens, all_accepted = 1.0, 1.0
        for depth in range(gamma):
            all_accepted *= self[depth]
            tokens += all_accepted
        return tokens

    def _level(self) -> float:
        expected = sum(r * e for r, e in zip(self._reached, self._expected, strict=True))
        return (PRIOR + sum(self._accepted)) / (PRIOR + expected)


@dataclass
class AdaptivePolicy:
    """The draft length that promises the most tokens a second; 0 where plain decoding does.

    While it decodes plainly it learns nothing, so it probes now and then, the more seldom the more often in vain, and
    goes on probing while that succeeds.

    Args:
        outlook: what drafts cost and how often they are right, as the search found.
        gamma: the draft length to begin with.
        lengths: draft lengths to choose among, 0 for none.
    """

    outlook: Outlook
    gamma: int
    lengths: Sequence[int]

    def __post_init__(self) -> None:
        self.agreement = AgreementEstimate(self.outlook.agreement)
        self._begin()

    def _begin(self) -> None:
        self._plain_rounds, self._wait, self._probing, self._again = 0, float(FIRST_PROBE), False, False

    def choose(self) -> int:
        """The draft length of the next round."""
        best = max(self.lengths, key=self.tokens_per_second)
        if self.tokens_per_second(best) > self.tokens_per_second(self.gamma) * (1 + HYSTERESIS):
            self.gamma = best
        if self.gamma:
            self._begin()
            return self.gamma
        self._probing = self._again or self._plain_rounds >= self._wait
        return self._probe if self._probing else 0

    def observe(self, rounds: Sequence[tuple[int, int, int]]) -> None:
        """A round of all rows: (drafted, accepted, committed) of each that was unfinished."""
        for drafted, accepted, committed in rounds:
            # Behind a stop token nothing was right or wrong, and behind a wrong one nothing counts.
            self.agreement.observe(min(drafted, accepted + 1, committed), accepted)
        if self._probing:
            self._judge(rounds)
            self._plain_rounds = -1
        self._plain_rounds += 1

    @property
    def _probe(self) -> int:
        return min(filter(None, self.lengths))

    def _judge(self, probe: Sequence[tuple[int, int, int]]) -> None:
        """Set the wait for the next probe: twice as long after one in vain, and shorter on average only where probes
        bring more than they cost; else text on which they are right often, but not often enough, would be probed for
        ever. One that was right is followed by another at once."""
        drafted, accepted = (sum(row[which] for row in probe) for which in (0, 1))
        seconds = self._probe * self.outlook.draft_step + self.outlook.rounds[self._probe]
        needed = max(1e-6, seconds / self.outlook.rounds[0] - 1)  # accepted in each row, to keep up with plain decoding
        self._wait = min(LAST_PROBE, max(0.5, self._wait * 2 ** (1 - accepted / max(1, len(probe)) / needed)))
        self._again = 2 * accepted >= drafted > 0

    def tokens_per_second(self, gamma: int) -> float:
        """What a round that drafts so many promises, of each row."""
        seconds = gamma * self.outlook.draft_step + self.outlook.rounds[gamma]
        return self.agreement.tokens_per_round(gamma) / seconds


class AdaptiveDrafter(Drafter):
    """Layer skipping, as far as the policy says."""

    def __init__(self, runtime: Runtime, policy: AdaptivePolicy) -> None:
        self.policy, self.gamma = policy, max(policy.lengths)
        self._drafters: dict[int, Drafter] = {
            gamma: LayerSkipDrafter(runtime, gamma) if gamma else NoDrafter() for gamma in policy.lengths
        }

    @property
    def key(self) -> Hashable:
        return "adaptive"

    def choose(self, request: Request) -> tuple[Drafter, int]:
        return self._drafters[self.policy.choose()].choose(request)

    def draft(self, request: Request, n: int) -> Draft:
        raise AssertionError("the chosen drafter drafts")

    def observe(self, committed: Sequence[Committed]) -> None:
        self.policy.observe([(row.drafted, row.accepted, len(row.tokens)) for row in committed])


def longest_draft(plan: Plan) -> int:
    """The most tokens that a round may draft by this plan, whatever the policy."""
    return max(plan.longest_draft, len(plan.outlook.rounds) - 1 if plan.outlook is not None else 0)


def drafter_for(
    plan: Plan, runtime: Runtime, rows: int, policy: PolicyName, draft_runtime: Runtime | None = None
) -> tuple[Drafter, str]:
    """The drafter that serves a request of so many rows, which adapts where it can and should; and, in words, the
    policy."""
    obstacle = obstacle_to_adapting(plan, runtime, rows)
    if draft_runtime is not None:
        obstacle = "a draft model's costs are not in the plan"
    if policy == "fixed" or obstacle is not None:
        return drafter_of(plan, runtime, draft_runtime), "fixed" if policy == "fixed" else f"fixed: {obstacle}"
    assert plan.outlook is not None
    lengths = draft_lengths(plan.gamma, len(plan.outlook.rounds) - 1, few=runtime.static)
    return AdaptiveDrafter(runtime, AdaptivePolicy(plan.outlook, plan.gamma, lengths)), "adaptive"


def obstacle_to_adapting(plan: Plan, runtime: Runtime, rows: int) -> str | None:
    """Why this plan's draft length stays as it is, or None if it may adapt."""
    device = runtime.model.device
    if plan.outlook is None or not plan.gamma:
        return "the plan does not say what drafts of other lengths cost"
    if plan.exit_threshold is not None or plan.prompt_lookup is not None:
        return "an exit threshold or prompt lookup adapts by itself"
    if runtime.compile and device.type == "cpu":
        return "every other draft length would have to be compiled"
    if plan.outlook.rows != rows:
        return f"the plan knows what {plan.outlook.rows} rows cost, not {rows}"
    return plan.stale_because(
        device=device_name(device), dtype=str(runtime.model.dtype).removeprefix("torch."), compiled=runtime.compile
    )


def draft_lengths(gamma: int, longest: int, *, few: bool) -> list[int]:
    """What to choose among: none and all up to the longest that has a price; or `few`, where each must be captured."""
    if not few:
        return list(range(longest + 1))
    return sorted({0, -(-gamma // 2), gamma, max(gamma, min(2 * gamma, longest))})
