"""Sampling: how the target chooses tokens in a search, and later in `generate`; greedily by default.

The command line reads `SearchSettings` before any command runs, so this module imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of `generate` that the search supports; None leaves an option to the model's generation config."""

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The options that were set, as keyword arguments of `generate`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def resolved(self, model: PreTrainedModel) -> dict[str, Any]:
        """The options that were set, and the processors and stop tokens that the model's generation config adds."""
        config = model.generation_config
        processors = {
            type(processor).__name__: {name: _plain(value) for name, value in vars(processor).items()}
            for processor in self.processors(model)
        }
        stops = config.eos_token_id if config is not None else None
        return {**self.to_dict(), "processors": processors, "stops": _plain(stops)}

    def processors(self, model: PreTrainedModel) -> LogitsProcessorList:
        """The processors that `model.generate` would apply, with those of the model's generation config.

        Raises:
            InputError: Hugging Face refuses a value, or a processor cannot be replayed.
        """
        from selfspec_search.replay.processing import processors_of

        return processors_of(self.to_dict(), model)


def _plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, (bool, int, float, list)) or value is None else str(value)
