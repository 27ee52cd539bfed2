"""RoPE that depends on the text length: the RoPE types of a model, and how a view pins longrope."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def rope_types(model: PreTrainedModel) -> set[str]:
    """The RoPE types of all layers."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(entry.get("rope_type", "default")) for entry in (nested or [parameters])}


def longrope_switch(model: PreTrainedModel) -> int | None:
    """Tokens: the text length above which longrope (Phi-3) uses its long factors; None for every other RoPE type."""
    if "longrope" not in rope_types(model):
        return None
    config = model.config.get_text_config()
    length = config.rope_parameters.get("original_max_position_embeddings")
    return int(length or config.original_max_position_embeddings)


def pin_longrope(view: PreTrainedModel, *, long: bool) -> None:
    """Fix a view to the long or the short factors of longrope.

    Hugging Face chooses by the largest position of each pass, and would choose wrongly in a chunk of a prompt or in a
    draft. The frequencies are new tensors on the view: the user's model keeps its own frequencies.
    """
    for module in view.modules():
        if getattr(module, "rope_type", None) not in ("longrope", "pinned longrope"):
            continue
        switch = longrope_switch(view)
        assert switch is not None
        length = switch + 1 if long else switch
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, module.inv_freq.device, seq_len=length)  # type: ignore
        object.__setattr__(module, "rope_type", "pinned longrope")
        module.register_buffer("inv_freq", frequencies, persistent=False)
