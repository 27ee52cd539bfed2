"""Shapes: models of real sizes with random weights, drawn on the device from a seed by the parameter's name.

Greedy text of random weights loops unless they are drawn strong enough, so they are drawn here and not by Hugging Face:
embeddings of size 1; queries, keys and what an MLP gives back somewhat stronger than what keeps variance. The head is
strong, too, so that the likeliest token has much of the probability, as in trained models: the confidence test of
`assistant_early_exit` would else end every draft at once. Greedy tokens do not depend on it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from gpu_bench.budget import LeftOutError

STRONG, USUAL, HEAD = 2.0, 1.2, 12.0
"""Standard deviations of a linear layer's weights, times the root of what it takes in."""
STRONG_LAYERS = ("q_proj", "k_proj", "down_proj")
NORM_SPREAD = 0.2
ROOM = 6 << 30
"""Bytes beside the weights: a cache of a few rows, and the work of a pass."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model by its config and dtype."""

    name: str
    config: Callable[[], PretrainedConfig]
    dtype: torch.dtype

    def build(self, device: torch.device, seed: int) -> PreTrainedModel:
        """With random weights, without a copy elsewhere.

        Raises:
            LeftOutError: the device's memory is too small.
        """
        self._check_memory(device)
        with torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config(), dtype=self.dtype)
        for name, parameter in model.named_parameters():
            draw(name, parameter, seed)
        return model.eval().requires_grad_(False)

    @property
    def bytes(self) -> int:
        """Of all parameters."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config(), dtype=self.dtype)
        return sum(parameter.nbytes for parameter in model.parameters())

    def _check_memory(self, device: torch.device) -> None:
        if device.type != "cuda":
            return
        torch.cuda.empty_cache()
        free, needed = torch.cuda.mem_get_info(device)[0], self.bytes + ROOM
        if needed > free:
            gib = 1 << 30
            raise LeftOutError(f"{self.name} needs {needed / gib:.0f} GiB, and {free / gib:.0f} GiB are free here")


@torch.no_grad()
def draw(name: str, parameter: Tensor, seed: int) -> None:
    """Fill a parameter with what this seed has for one of this name: the same at every call."""
    generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()) + seed)
    if parameter.ndim < 2:
        parameter.normal_(_middle(name), NORM_SPREAD, generator=generator)
    else:
        parameter.normal_(0.0, _spread(name, parameter.shape[1]), generator=generator)


def _middle(name: str) -> float:
    """Of what is no matrix: norms' weights and biases. A norm of queries or keys sets how strong they are."""
    return STRONG if "q_norm" in name or "k_norm" in name else 1.0 if "norm" in name else 0.0


def _spread(name: str, width: int) -> float:
    if "embed_tokens" in name:
        return 1.0
    strength = HEAD if "lm_head" in name else STRONG if any(part in name for part in STRONG_LAYERS) else USUAL
    return float(strength * width**-0.5)


def _llama_8b() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        **_PLAIN,
    )


def _qwen3_32b() -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        **_PLAIN,
    )


def _toy_llama() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=509,
        hidden_size=72,
        intermediate_size=89,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1021,
        **_PLAIN,
    )


def _toy_qwen3() -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=509,
        hidden_size=72,
        intermediate_size=89,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        max_position_embeddings=1021,
        **_PLAIN,
    )


_PLAIN = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
"""No token ends a text."""

LLAMA_8B = Shape(name="Llama-3.1-8B", config=_llama_8b, dtype=torch.bfloat16)
QWEN3_32B = Shape(name="Qwen3-32B", config=_qwen3_32b, dtype=torch.bfloat16)
TOY_LLAMA = Shape(name="toy Llama", config=_toy_llama, dtype=torch.float32)
TOY_QWEN3 = Shape(name="toy Qwen3", config=_toy_qwen3, dtype=torch.float32)
