"""The drafter that a plan asks for."""

from __future__ import annotations

from selfspec.drafting.cascade import LookupFirstDrafter
from selfspec.drafting.drafter import Drafter, NoDrafter
from selfspec.drafting.layers import LayerSkipDrafter
from selfspec.drafting.lookup import PromptLookupDrafter
from selfspec.drafting.tree import TreeDrafter
from selfspec.plan import Plan
from selfspec.runtime import Runtime


def drafter_of(plan: Plan, runtime: Runtime) -> Drafter:
    """The drafter that a plan asks for; the runtime skips the plan's skip set already."""
    layers = layers_of(plan, runtime)
    if plan.prompt_lookup is None:
        return layers if plan.gamma else NoDrafter()
    lookup = PromptLookupDrafter(plan.prompt_lookup)
    return LookupFirstDrafter(lookup, layers) if plan.gamma else lookup


def layers_of(plan: Plan, runtime: Runtime) -> LayerSkipDrafter:
    """The part of it that skips layers."""
    if plan.tree is None:
        return LayerSkipDrafter(runtime, plan.gamma, plan.exit_threshold)
    return TreeDrafter(runtime, plan.gamma, plan.tree, plan.exit_threshold)
