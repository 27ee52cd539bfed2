"""The embedded demonstration model: where its files are. Importing this imports nothing heavy."""

from importlib.resources import files
from pathlib import Path

__all__ = ["calibration_prompts", "held_out_prompts", "model_dir"]


def model_dir() -> Path:
    """The model's directory, for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`."""
    return _resource("model")


def calibration_prompts() -> Path:
    """The JSON-lines file of the prompts that a search may use; key `prompt`."""
    return _resource("prompts/calibration.jsonl")


def held_out_prompts() -> Path:
    """The JSON-lines file of the prompts that confirm what a search found; taken from other files; key `prompt`."""
    return _resource("prompts/held_out.jsonl")


def _resource(name: str) -> Path:
    return Path(str(files(__name__))) / name
