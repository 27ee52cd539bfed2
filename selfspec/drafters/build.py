"""Builds the drafter of a plan."""

from __future__ import annotations

from selfspec.decoding.drafter import Drafter, NoDrafter
from selfspec.drafters.cascade import LookupFirstDrafter
from selfspec.drafters.draft_model import DraftModelDrafter
from selfspec.drafters.layer_skip import LayerSkipDrafter, StepwiseDrafter
from selfspec.drafters.prompt_lookup import PromptLookupDrafter
from selfspec.plan.plan import Plan
from selfspec.runtime.runtime import Runtime


def drafter_of(plan: Plan, runtime: Runtime, draft_runtime: Runtime | None = None) -> Drafter:
    """The plan's drafter. The runtime's draft view already skips the plan's skip set.

    With a `draft_runtime`, its draft model drafts in place of the model's own layers.
    """
    stepwise: StepwiseDrafter = LayerSkipDrafter(runtime, plan.gamma, plan.exit_threshold)
    if draft_runtime is not None:
        stepwise = DraftModelDrafter(draft_runtime, plan.gamma, plan.exit_threshold, target=runtime.model)
        stepwise.unsafe_tokens = runtime.unsafe_tokens  # the target's passes verify the draft
    if plan.prompt_lookup is None:
        return stepwise if plan.gamma else NoDrafter()
    lookup = PromptLookupDrafter(plan.prompt_lookup)
    return LookupFirstDrafter(lookup, stepwise) if plan.gamma else lookup
