"""Whom a policy serves: which plans can adapt, and to whom the others are left."""

from __future__ import annotations

from selfspec.decode_options import PolicyName
from selfspec.decoding.drafter import Drafter, NoDrafter
from selfspec.drafters.build import drafter_of
from selfspec.drafters.prompt_lookup import PromptLookupDrafter
from selfspec.plan import Outlook, Plan, PromptLookup
from selfspec.policy.adaptive import AdaptivePolicy
from selfspec.policy.choice import Choice, Choices
from selfspec.policy.drafter import AdaptiveDrafter
from selfspec.policy.estimates import MATCHES
from selfspec.runtime.runtime import Runtime, device_name

MATCH = max(MATCHES)
"""The longest match that is told from shorter ones."""
LOOKUPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Draft lengths by lookup; where each must be compiled and captured, one serves: the plan's, or 8."""


def longest_draft(plan: Plan) -> int:
    """The most tokens that a round may draft by this plan, whatever the policy."""
    outlooks = [plan.outlook, *plan.other_rows] if plan.outlook is not None else []
    return max(plan.longest_draft, *(len(outlook.rounds) - 1 for outlook in outlooks if outlook is not None), 0)


def drafter_for(
    plan: Plan, runtime: Runtime, rows: int, policy: PolicyName, draft_runtime: Runtime | None = None
) -> tuple[Drafter, str]:
    """The drafter that serves a request of so many rows, which adapts where it can and should; and, in words, the
    policy. More rows than have a price are decoded plainly: what pays for few may lose for many."""
    if policy == "adaptive" and draft_runtime is None and (reason := too_many_rows(plan, rows)) is not None:
        return NoDrafter(), f"none: {reason}"
    unsupported_reason = reason_not_to_adapt(plan, runtime, rows)
    if draft_runtime is not None:
        unsupported_reason = "a draft model's costs are not in the plan"
    if policy == "fixed" or unsupported_reason is not None:
        return drafter_of(
            plan, runtime, draft_runtime
        ), "fixed" if policy == "fixed" else f"fixed: {unsupported_reason}"
    outlook = plan.outlook_for(rows)
    assert outlook is not None
    return adaptive_drafter(plan, runtime, outlook), "adaptive"


def too_many_rows(plan: Plan, rows: int) -> str | None:
    """Why nobody knows whether drafts pay for so many rows; None where they were searched for as many, or by hand."""
    searched_for = [plan.provenance.conditions.rows] if plan.provenance is not None else []
    known = plan.rows or searched_for
    if not longest_draft(plan) or not known or rows <= max(known):
        return None
    return f"the plan knows what {_listed(known)} cost, not {rows}"


def adaptive_drafter(plan: Plan, runtime: Runtime, outlook: Outlook) -> AdaptiveDrafter:
    """One that chooses among all that the plan and its outlook know of."""
    longest, few = len(outlook.rounds) - 1, runtime.static
    lookup = lookup_of(plan, outlook)
    lookups = lookup_lengths(plan, longest, few=few) if lookup is not None else [0]
    leasts = [plan.prompt_lookup.min_ngram if plan.prompt_lookup else 2] if few else MATCHES
    layers = draft_lengths(plan.gamma, longest, few=few) if plan.gamma else [0]
    choices = Choices(outlook, layers, lookups, static=few, leasts=leasts)
    policy = AdaptivePolicy(choices, Choice(plan.gamma))
    return AdaptiveDrafter(runtime, policy, lookup)


def lookup_of(plan: Plan, outlook: Outlook) -> PromptLookupDrafter | None:
    """Prompt lookup as far as there are prices; None where the search left it out."""
    if not outlook.matches:
        return None
    longest = len(outlook.rounds) - 1
    return PromptLookupDrafter(PromptLookup(gamma=longest, min_ngram=1, max_ngram=MATCH))


def reason_not_to_adapt(plan: Plan, runtime: Runtime, rows: int) -> str | None:
    """Why this plan drafts as it says, or None if it may adapt."""
    device = runtime.model.device
    if not longest_draft(plan):
        return "the plan never drafts"
    if plan.outlook is None:
        return "the plan does not say what drafts of other lengths cost"
    if plan.exit_threshold is not None:
        return "an exit threshold adapts by itself"
    if plan.prompt_lookup is not None and not plan.outlook.matches:
        return "the plan does not say what to expect of prompt lookup"
    if runtime.compile and device.type == "cpu":
        return "every other draft length would have to be compiled"
    if plan.outlook_for(rows) is None:
        return f"the plan knows what {_listed(plan.rows)} cost, not {rows}"
    return plan.stale_because(
        device=device_name(device), dtype=str(runtime.model.dtype).removeprefix("torch."), compiled=runtime.compile
    )


def _listed(rows: list[int]) -> str:
    return " and ".join(map(str, rows)) + (" rows" if rows != [1] else " row")


def draft_lengths(gamma: int, longest: int, *, few: bool) -> list[int]:
    """What to choose among: none and all up to the longest that has a price; or `few`, where each must be captured."""
    if not few:
        return list(range(min(longest, max(8, gamma)) + 1))
    return sorted({0, -(-gamma // 2), gamma, max(gamma, min(2 * gamma, longest))})


def lookup_lengths(plan: Plan, longest: int, *, few: bool) -> list[int]:
    """The same, of looked-up drafts."""
    own = plan.prompt_lookup.gamma if plan.prompt_lookup else min(8, longest)
    return [0, *sorted({own} if few else {n for n in (*LOOKUPS, own, longest) if n <= longest})]
