"""Sampling: how the target chooses its tokens, in the search as later in `generate`; greedy by default.

The command line reads `SearchSettings` before any command runs, so this module imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of `generate` that the search honours; None leaves a setting to the model's own generation config."""

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """What was set, as keyword arguments of `generate`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def resolved(self, model: PreTrainedModel) -> dict[str, Any]:
        """What is in force: what was set, the processors that this model's generation config adds, and its stops."""
        config = model.generation_config
        processors = {
            type(processor).__name__: {name: _plain(value) for name, value in vars(processor).items()}
            for processor in self.processors(model)
        }
        stops = config.eos_token_id if config is not None else None
        return {**self.to_dict(), "processors": processors, "stops": _plain(stops)}

    def processors(self, model: PreTrainedModel) -> LogitsProcessorList:
        """The processors that `model.generate` would apply, those of the model's own generation config included.

        Raises:
            InputError: values that Hugging Face refuses, or a processor that cannot be replayed.
        """
        from selfspec_search.replay.processing import processors_of

        return processors_of(self.to_dict(), model)


def _plain(value: Any) -> Any:
    """For JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, (bool, int, float, list)) or value is None else str(value)
