"""Select: the drafter that serves a request, and why the policy does not adapt."""

from __future__ import annotations

from selfspec.decode_options import PolicyName
from selfspec.decoding.drafter import Drafter, NoDrafter
from selfspec.drafters.build import drafter_of
from selfspec.drafters.prompt_lookup import PromptLookupDrafter
from selfspec.plan.lookup import PromptLookup
from selfspec.plan.plan import Plan
from selfspec.plan.round_costs import MATCHES, RoundCosts
from selfspec.policy.adaptive_drafter import AdaptiveDrafter
from selfspec.policy.policy import AdaptivePolicy
from selfspec.runtime.runtime import Runtime

LOOKUPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Tokens: the draft lengths by lookup that compete."""


def longest_draft(plan: Plan) -> int:
    """The most tokens that a round may draft by this plan, under any policy."""
    return max([plan.longest_draft, *(len(costs.rounds) - 1 for costs in plan.round_costs)])


def drafter_for(
    plan: Plan, runtime: Runtime, rows: int, policy: PolicyName, draft_runtime: Runtime | None = None
) -> tuple[Drafter, str]:
    """The drafter for a request of `rows` rows, and `stats.policy`: `adaptive`, or `fixed` or `none` with the reason.

    More rows than the plan has round costs for are decoded plainly: a draft that pays for few rows may lose for many.
    """
    adapts = policy == "adaptive" and draft_runtime is None
    if adapts and (reason := too_many_rows(plan, rows)) is not None:
        return NoDrafter(), f"none: {reason}"
    reason = unsupported_reason(plan, runtime, rows) if adapts else "a draft model's costs are not in the plan"
    if policy == "fixed" or reason is not None:
        return drafter_of(plan, runtime, draft_runtime), "fixed" if policy == "fixed" else f"fixed: {reason}"
    round_costs = plan.round_costs_for(rows)
    assert round_costs is not None
    return _adaptive_drafter(plan, runtime, round_costs), "adaptive"


def too_many_rows(plan: Plan, rows: int) -> str | None:
    """Why `rows` rows are decoded plainly; None if the plan knows their round costs, or was written by hand."""
    searched_for = [plan.provenance.conditions.rows] if plan.provenance is not None else []
    known = plan.rows or searched_for
    return _unknown(known, rows) if longest_draft(plan) and known and rows > max(known) else None


def unsupported_reason(plan: Plan, runtime: Runtime, rows: int) -> str | None:
    """Why the policy cannot adapt with this plan on this device; None if it can."""
    if not longest_draft(plan):
        return "the plan never drafts"
    if not plan.round_costs:
        return "the plan has no round costs"
    if plan.exit_threshold is not None:
        return "the plan's exit threshold sets the draft length"
    if plan.prompt_lookup is not None and not all(costs.matches for costs in plan.round_costs):
        return "the plan's round costs have no agreement of prompt lookup"
    if runtime.passes.compile and runtime.model.device.type == "cpu":
        return "each draft length would need a compilation of its own"
    if plan.round_costs_for(rows) is None:
        return _unknown(plan.rows, rows)
    return plan.stale_because(**runtime.conditions)


def _unknown(known: list[int], rows: int) -> str:
    return f"the plan knows what {' and '.join(map(str, known))} row{'s' * (known != [1])} cost, not {rows}"


def _adaptive_drafter(plan: Plan, runtime: Runtime, round_costs: RoundCosts) -> AdaptiveDrafter:
    """The drafter that chooses among draft lengths. Lookup takes part if the search measured it.

    A static runtime captures or compiles each draft length, so only the plan's own and half and double gamma compete.
    """
    longest, gamma, static = len(round_costs.rounds) - 1, plan.gamma, runtime.static
    own = plan.prompt_lookup.gamma if plan.prompt_lookup else min(8, longest)
    if static:
        layers, lookups = {0, -(-gamma // 2), gamma, max(gamma, min(2 * gamma, longest))}, {own}
    else:
        layers = set(range(min(longest, max(8, gamma)) + 1))
        lookups = {n for n in (*LOOKUPS, own, longest) if n <= longest}
    policy = AdaptivePolicy(
        round_costs,
        sorted(layers) if gamma else [0],
        sorted(lookups) if round_costs.matches else [],
        [plan.prompt_lookup.min_ngram if plan.prompt_lookup else 2] if static else MATCHES,
        static,
    )
    lookup = PromptLookup(gamma=longest, min_ngram=1, max_ngram=max(MATCHES))
    return AdaptiveDrafter(runtime, policy, PromptLookupDrafter(lookup) if round_costs.matches else None)
