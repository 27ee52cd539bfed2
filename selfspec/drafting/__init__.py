"""Drafters: who guesses the next tokens."""

from selfspec.drafting.cascade import LookupFirstDrafter
from selfspec.drafting.draft_model import DraftModelDrafter
from selfspec.drafting.drafter import Drafter, NoDrafter, Origin
from selfspec.drafting.layers import LayerSkipDrafter, StepwiseDrafter
from selfspec.drafting.lookup import PromptLookupDrafter, latest_match
from selfspec.drafting.of_plan import drafter_of

__all__ = [
    "DraftModelDrafter",
    "Drafter",
    "LayerSkipDrafter",
    "LookupFirstDrafter",
    "NoDrafter",
    "Origin",
    "PromptLookupDrafter",
    "StepwiseDrafter",
    "drafter_of",
    "latest_match",
]
