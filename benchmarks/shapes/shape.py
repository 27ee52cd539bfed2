"""Shape: a model of real size with random weights, drawn on the device from the seed and the parameter's name.

Greedy text of weak random weights loops, so this module draws stronger weights than Hugging Face does. A strong head
gives the likeliest token much of the probability, as in trained models. With a weak head, the confidence test of
`assistant_early_exit` would end every draft at once. Greedy tokens do not depend on the strength of the head.
"""

from __future__ import annotations

import zlib
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from common.budget import LeftOutError
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from selfspec.utils.sizes import in_words

STRONG, USUAL, HEAD = 2.0, 1.2, 12.0
"""Standard deviations of a linear layer's weights, times the root of its input size."""
STRONG_LAYERS = ("q_proj", "k_proj", "down_proj")
NORM_SPREAD = 0.2
ROOM = 6 << 30
"""Bytes in addition to the weights, for a cache of a few rows and the tensors of a pass."""
UNTIED: dict[str, Any] = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
"""No token ends a text. The head is drawn separately from the embedding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """A model by the sizes of its config and its dtype."""

    name: str
    family: type[PretrainedConfig]
    sizes: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16

    def build(self, device: torch.device, seed: int) -> PreTrainedModel:
        """The model with random weights, drawn in place.

        Raises:
            LeftOutError: the device's memory is too small.
        """
        self._check_memory(device)
        model = self._model(device)
        for name, parameter in model.named_parameters():
            draw(name, parameter, seed)
        return model.eval().requires_grad_(False)

    @property
    def bytes(self) -> int:
        """Of all parameters."""
        return sum(parameter.nbytes for parameter in self._model(torch.device("meta")).parameters())

    def _model(self, device: torch.device) -> PreTrainedModel:
        config = self.family(**deepcopy(self.sizes), **UNTIED)
        with torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        return model

    def _check_memory(self, device: torch.device) -> None:
        if device.type != "cuda":
            return
        torch.cuda.empty_cache()
        free, needed = torch.cuda.mem_get_info(device)[0], self.bytes + ROOM
        if needed > free:
            raise LeftOutError(f"{self.name} needs {in_words(needed)}, but only {in_words(free)} are free")


@torch.no_grad()
def draw(name: str, parameter: Tensor, seed: int) -> None:
    """Fill a parameter with values that depend on the seed and the name only."""
    generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()) + seed)
    if parameter.ndim < 2:
        parameter.normal_(_middle(name), NORM_SPREAD, generator=generator)
    else:
        parameter.normal_(0.0, _spread(name, parameter.shape[1]), generator=generator)


def _middle(name: str) -> float:
    """The mean of a vector parameter. A norm of queries or keys sets their strength."""
    return STRONG if "q_norm" in name or "k_norm" in name else 1.0 if "norm" in name else 0.0


def _spread(name: str, width: int) -> float:
    if "embed_tokens" in name:
        return 1.0
    strength = HEAD if "lm_head" in name else STRONG if any(part in name for part in STRONG_LAYERS) else USUAL
    return float(strength * width**-0.5)


def _llama(name: str, rope_factor: float, **sizes: Any) -> Shape:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": rope_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    alike = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
    sizes |= alike | {"max_position_embeddings": 131072, "rope_parameters": rope}
    return Shape(name=name, family=LlamaConfig, sizes=sizes)


LLAMA_1B = _llama("Llama-3.2-1B", 32.0, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64)
LLAMA_8B = _llama("Llama-3.1-8B", 8.0, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
QWEN3_32B = Shape(
    name="Qwen3-32B",
    family=Qwen3Config,
    sizes={
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
)
_TOY = {
    "vocab_size": 528,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1021,
}
"""Sizes that the kernels of quantised layers support."""
TOY_LLAMA = Shape(name="toy Llama", family=LlamaConfig, sizes=_TOY | {"num_hidden_layers": 7})
TOY_QWEN3 = Shape(name="toy Qwen3", family=Qwen3Config, sizes=_TOY | {"num_hidden_layers": 5, "head_dim": 24})


def in_float32(shape: Shape) -> Shape:
    """The shape in float32, in which decoding is exact."""
    return replace(shape, dtype=torch.float32)
