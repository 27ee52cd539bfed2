"""What a training leaves on disk: the model as a Hugging Face directory, and the state to go on from."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a complete Hugging Face directory in bfloat16."""
    copy: Any = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder that always holds one whole checkpoint: `model/` for users, `state.pt` for going on."""

    folder: Path

    def save(
        self,
        model: LlamaForCausalLM,
        optimizers: list[torch.optim.Optimizer],
        tokenizer: PreTrainedTokenizerBase,
        *,
        step: int,
        seconds: float,
    ) -> None:
        """Write everything under a temporary name, then rename it."""
        new = self.folder.with_name(self.folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        save_model(model, tokenizer, new / "model")
        states = [o.state_dict() for o in optimizers]
        state = {"model": model.state_dict(), "optimizers": states, "step": step, "seconds": seconds}
        torch.save(state, new / "state.pt")
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(new, self.folder)

    def resume(self, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
        """Load what was saved, if anything; the next step and the seconds spent so far."""
        file = self.folder / "state.pt"
        if not file.exists():
            return 0, 0.0
        state: dict[str, Any] = torch.load(file)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return state["step"], state["seconds"]
