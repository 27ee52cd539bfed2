"""Select: the drafter that serves a request, and why a plan is not adaptive."""

from __future__ import annotations

from selfspec.decode_options import PolicyName
from selfspec.decoding.drafter import Drafter, NoDrafter
from selfspec.drafters.build import drafter_of
from selfspec.drafters.prompt_lookup import PromptLookupDrafter
from selfspec.plan import MATCHES, Plan, PromptLookup, RoundCosts
from selfspec.policy.adaptive_drafter import AdaptiveDrafter
from selfspec.policy.policy import AdaptivePolicy
from selfspec.runtime.runtime import Runtime

LOOKUPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Draft lengths by lookup."""


def longest_draft(plan: Plan) -> int:
    """The most tokens that a round may draft by this plan, whatever the policy."""
    return max([plan.longest_draft, *(len(costs.rounds) - 1 for costs in plan.round_costs)])


def drafter_for(
    plan: Plan, runtime: Runtime, rows: int, policy: PolicyName, draft_runtime: Runtime | None = None
) -> tuple[Drafter, str]:
    """The drafter for a request of `rows` rows, and the policy in words.

    Rows beyond the plan's round costs are decoded plainly: what pays for few rows may lose for many.
    """
    if policy == "adaptive" and draft_runtime is None and (reason := too_many_rows(plan, rows)) is not None:
        return NoDrafter(), f"none: {reason}"
    unsupported = unsupported_reason(plan, runtime, rows)
    if draft_runtime is not None:
        unsupported = "a draft model's costs are not in the plan"
    if policy == "fixed" or unsupported is not None:
        return drafter_of(plan, runtime, draft_runtime), "fixed" if policy == "fixed" else f"fixed: {unsupported}"
    round_costs = plan.round_costs_for(rows)
    assert round_costs is not None
    return adaptive_drafter(plan, runtime, round_costs), "adaptive"


def too_many_rows(plan: Plan, rows: int) -> str | None:
    """Why `rows` rows are decoded plainly; None if the plan knows their round costs, or was written by hand."""
    searched_for = [plan.provenance.conditions.rows] if plan.provenance is not None else []
    known = plan.rows or searched_for
    if not longest_draft(plan) or not known or rows <= max(known):
        return None
    return f"the plan knows what {_listed(known)} cost, not {rows}"


def unsupported_reason(plan: Plan, runtime: Runtime, rows: int) -> str | None:
    """Why this plan cannot adapt here; None if it can."""
    device = runtime.model.device
    if not longest_draft(plan):
        return "the plan never drafts"
    if not plan.round_costs:
        return "the plan does not say what drafts of other lengths cost"
    if plan.exit_threshold is not None:
        return "an exit threshold adapts by itself"
    if plan.prompt_lookup is not None and not all(costs.matches for costs in plan.round_costs):
        return "the plan does not say what to expect of prompt lookup"
    if runtime.passes.compile and device.type == "cpu":
        return "every other draft length would have to be compiled"
    if plan.round_costs_for(rows) is None:
        return f"the plan knows what {_listed(plan.rows)} cost, not {rows}"
    return plan.stale_because(**runtime.conditions)


def adaptive_drafter(plan: Plan, runtime: Runtime, round_costs: RoundCosts) -> AdaptiveDrafter:
    """The drafter that chooses among draft lengths with round costs. Lookup takes part where the search measured it.

    Where each draft length must be captured, few compete: the plan's own, and half and double of gamma."""
    longest, gamma, few = len(round_costs.rounds) - 1, plan.gamma, runtime.static
    own = plan.prompt_lookup.gamma if plan.prompt_lookup else min(8, longest)
    if few:
        layers, lookups = {0, -(-gamma // 2), gamma, max(gamma, min(2 * gamma, longest))}, {own}
    else:
        layers = set(range(min(longest, max(8, gamma)) + 1))
        lookups = {n for n in (*LOOKUPS, own, longest) if n <= longest}
    policy = AdaptivePolicy(
        round_costs,
        sorted(layers) if gamma else [0],
        sorted(lookups) if round_costs.matches else [],
        leasts=[plan.prompt_lookup.min_ngram if plan.prompt_lookup else 2] if few else MATCHES,
        static=few,
    )
    lookup = PromptLookup(gamma=longest, min_ngram=1, max_ngram=max(MATCHES))
    return AdaptiveDrafter(runtime, policy, PromptLookupDrafter(lookup) if round_costs.matches else None)


def _listed(rows: list[int]) -> str:
    return " and ".join(map(str, rows)) + (" rows" if rows != [1] else " row")
