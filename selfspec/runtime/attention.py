"""The attention function that views call, and its backends. The only file that knows FlashAttention.

Hugging Face's attention modules look their attention function up by name. A view's config carries our name, and the
function registered under it does nothing but ask the pass it was handed: the runtime's pass appends to the KV cache
and attends to it, the probe's records shapes, the replay's attends to recorded keys.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import AttentionInterface

from selfspec.errors import InputError

if TYPE_CHECKING:
    from selfspec.runtime.kv_cache import Pass

ATTENTION_NAME = "selfspec"


class AttentionPass(Protocol):
    """What a view's attention modules ask. Query `b h t d`, key and value `b hkv t d`; returns `b t h d`."""

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor: ...


@dataclass(frozen=True)
class AttentionArgs:
    """What the model asks of attention: a window of w sees the token itself and the w - 1 before it."""

    scale: float
    window: int | None = None
    softcap: float | None = None


def dispatch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    selfspec_pass: AttentionPass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention function: hand everything to the pass."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    how = AttentionArgs(scale=scale, window=sliding_window, softcap=softcap)
    return selfspec_pass.attend(module, query, key, value, how), None


def register() -> None:
    """Make `ATTENTION_NAME` known to Hugging Face. No mask function goes with it, so that no mask is built."""
    AttentionInterface.register(ATTENTION_NAME, dispatch)


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model asks of a backend, found by the probe."""

    device: torch.device
    dtype: torch.dtype
    head_dims: frozenset[int]
    windows: frozenset[int | None] = frozenset({None})
    softcaps: frozenset[float | None] = frozenset({None})

    @property
    def has_softcap(self) -> bool:
        return bool(self.softcaps - {None})


class Backend(Protocol):
    """Appends key and value `b hkv t d` to a layer's cache `b s hkv d`; attends with query `b h t d` to `b t h d`."""

    name: str
    masks: bool
    """Whether it asks the pass for masks."""

    @staticmethod
    def obstacle(needs: AttentionNeeds) -> str | None:
        """Why this backend cannot serve, or None if it can."""

    @staticmethod
    def prepare(step: Pass) -> tuple[Tensor, ...]:
        """What it needs of the pass in every layer, beside masks."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, step: Pass, how: AttentionArgs
    ) -> Tensor: ...


class FlashAttn:
    """`flash_attn_with_kvcache` of the flash-attn package: append and attend in one kernel, lengths on the device."""

    name = "flash-attn"
    masks = False

    @staticmethod
    def obstacle(needs: AttentionNeeds) -> str | None:
        if importlib.util.find_spec("flash_attn") is None:
            return "flash-attn is not installed"
        return _flash_obstacle(needs)

    @staticmethod
    def prepare(step: Pass) -> tuple[Tensor, ...]:
        return ()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, step: Pass, how: AttentionArgs
    ) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        window = -1 if how.window is None else how.window - 1
        attended: Tensor = _flash_attn(
            query, key, value, keys, values, step.lengths, how.scale, window, how.softcap or 0.0
        )
        return attended


# An operator of our own, since `torch.compile` cannot look into the package's.
@torch.library.custom_op("selfspec::flash_attn_with_kvcache", mutates_args=("keys", "values"))
def _flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    attended: Tensor = flash_attn_with_kvcache(
        query,
        keys,
        values,
        k=key,
        v=value,
        cache_seqlens=lengths,
        softmax_scale=scale,
        causal=True,
        window_size=(window, -1 if window < 0 else 0),
        softcap=softcap,
    )
    return attended.contiguous()


@_flash_attn.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


class TorchFlash:
    """PyTorch's own FlashAttention-2 with `seqused_k`: no package needed, no soft cap."""

    name = "torch-flash"
    masks = False

    @staticmethod
    def obstacle(needs: AttentionNeeds) -> str | None:
        if needs.has_softcap:
            return "PyTorch's flash kernel has no soft cap"
        if not hasattr(torch.ops.aten, "_flash_attention_forward"):
            return "this PyTorch has no flash kernel"
        return _flash_obstacle(needs)

    @staticmethod
    def prepare(step: Pass) -> tuple[Tensor, ...]:
        """Where the rows of queries and of the cache start, and how many of the cache's slots are in use."""
        return step.starts(step.t), step.starts(step.s), step.lengths + step.t

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, step: Pass, how: AttentionArgs
    ) -> Tensor:
        step.append(keys, key)
        step.append(values, value)
        b, s = keys.shape[:2]
        query_starts, slot_starts, used = step.prepared
        attended = torch.ops.aten._flash_attention_forward(
            rearrange(query, "b h t d -> (b t) h d"),
            rearrange(keys, "b s h d -> (b s) h d"),
            rearrange(values, "b s h d -> (b s) h d"),
            query_starts,
            slot_starts,
            step.t,
            s,
            0.0,
            True,
            False,
            scale=how.scale,
            window_size_left=None if how.window is None else how.window - 1,
            window_size_right=None if how.window is None else 0,
            seqused_k=used,
        )[0]
        result: Tensor = rearrange(attended, "(b t) h d -> b t h d", b=b)
        return result


class Sdpa:
    """PyTorch's scaled dot-product attention with a mask: every device, every dtype; the reference."""

    name = "sdpa"
    masks = True

    @staticmethod
    def obstacle(needs: AttentionNeeds) -> str | None:
        return None

    @staticmethod
    def prepare(step: Pass) -> tuple[Tensor, ...]:
        return ()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, step: Pass, how: AttentionArgs
    ) -> Tensor:
        step.append(keys, key)
        step.append(values, value)
        (b, h, t, _), heads = query.shape, keys.shape[2]
        groups = h // heads
        # A key head's group of query heads is folded into the query's length, so that nothing of the cache is copied:
        # "b (h g) t d -> b h (g t) d" and back, in plain views, since einops costs as much here as attention itself.
        folded = query.reshape(b, heads, groups * t, -1)
        mask = step.mask(how.window, groups, query.dtype)
        keys, values = (cached[:, : step.s].transpose(1, 2) for cached in (keys, values))
        attended: Tensor = masked_attention(folded, keys, values, mask, how)
        return attended.reshape(b, h, t, -1).transpose(1, 2)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: AttentionArgs) -> Tensor:
    """Attention of `b h t d` over `b h s d`, with an additive mask that broadcasts to `b h t s` and the soft cap."""
    if how.softcap is None:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=how.scale)
    scores = query @ key.transpose(-1, -2) * how.scale
    scores = torch.tanh(scores / how.softcap) * how.softcap
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `visible`, minus infinity elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


def fold_mask(mask: Tensor, groups: int) -> Tensor:
    """A mask `b t s` for queries whose groups of heads were folded into their length: `b 1 (g t) s`."""
    return repeat(mask, "b t s -> b 1 (g t) s", g=groups)


BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in (FlashAttn, TorchFlash, Sdpa)}


@dataclass(frozen=True)
class BackendChoice:
    """The backend in use, and why not an earlier one."""

    backend: Backend
    reason: str


def choose_backend(needs: AttentionNeeds, name: str | None = None) -> BackendChoice:
    """The first backend, in the order of `BACKENDS`, that serves these needs; or the one that is named."""
    if name is not None:
        if name not in BACKENDS:
            raise InputError(f"no attention backend is called '{name}'; choose one of {', '.join(BACKENDS)}")
        if obstacle := BACKENDS[name].obstacle(needs):
            raise InputError(f"attention backend '{name}' cannot be used: {obstacle}; choose another or none")
        return BackendChoice(BACKENDS[name](), "asked for by name")
    passed_over: list[str] = []
    for candidate in BACKENDS.values():
        obstacle = candidate.obstacle(needs)
        if obstacle is None:
            return BackendChoice(candidate(), "; ".join(passed_over) or "first choice")
        passed_over.append(f"{candidate.name}: {obstacle}")
    raise AssertionError("the reference backend serves everything")


def _flash_obstacle(needs: AttentionNeeds) -> str | None:
    if needs.device.type != "cuda":
        return f"flash kernels need CUDA, the model is on {needs.device.type}"
    if torch.cuda.get_device_capability(needs.device) < (8, 0):
        return "flash kernels need a GPU of compute capability 8.0 (Ampere) or newer"
    if needs.dtype not in (torch.float16, torch.bfloat16):
        return f"flash kernels need float16 or bfloat16, the model is in {str(needs.dtype).removeprefix('torch.')}"
    if max(needs.head_dims) > 256 or any(d % 8 for d in needs.head_dims):
        return f"flash kernels need head sizes that are multiples of 8 up to 256, not {sorted(needs.head_dims)}"
    return None
