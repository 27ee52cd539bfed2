"""Attention over the cache: backends against a plain reference, and how one is chosen."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch import Tensor

from selfspec import InputError
from selfspec.attention import (
    BACKENDS,
    AttentionArgs,
    AttentionNeeds,
    Backend,
    FlashAttn,
    Sdpa,
    TorchFlash,
    choose_backend,
)
from selfspec.kv_cache import Pass

SLOTS = 37
LENGTHS = [0, 19, 7]


def reference(query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
    """One row, the plain way: the last `t` of `n` tokens attend to those up to themselves. `t h d`, `n hkv d`."""
    t, heads, _ = query.shape
    n, kv_heads, _ = key.shape
    out = query.new_zeros(t, heads, value.shape[-1])
    for i in range(t):
        end = n - t + i + 1
        start = 0 if how.window is None else max(0, end - how.window)
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            scores = key[start:end, kv_head] @ query[i, head] * how.scale
            if how.softcap is not None:
                scores = how.softcap * torch.tanh(scores / how.softcap)
            out[i, head] = scores.softmax(0) @ value[start:end, kv_head]
    return out


class Case:
    """Ragged rows of a cache whose free slots hold large finite numbers, and `t` new tokens for each row."""

    def __init__(
        self,
        t: int,
        kv_heads: int = 2,
        groups: int = 3,
        dim: int = 8,
        *,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        slots: int = SLOTS,
        lengths: list[int] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(t)
        b = len(lengths or LENGTHS)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        self.t, self.slots = t, slots
        self.lengths = torch.tensor(lengths or LENGTHS, dtype=torch.int32, device=device)
        self.query = normal(b, t, kv_heads * groups, dim)
        self.key, self.value = normal(b, t, kv_heads, dim), normal(b, t, kv_heads, dim)
        self.keys, self.values = normal(b, slots, kv_heads, dim), normal(b, slots, kv_heads, dim)
        for row, length in enumerate(self.lengths.tolist()):
            self.keys[row, length:], self.values[row, length:] = 50, 1000  # left behind by a rejected draft, say

    def attend(self, backend: Backend, how: AttentionArgs) -> tuple[Tensor, Tensor, Tensor]:
        """The result and the cache after it; this case stays as it is."""
        keys, values = self.keys.clone(), self.values.clone()
        step = Pass(self.lengths.clone(), self.t, self.slots, backend)
        new = (
            x.transpose(1, 2) for x in (self.query, self.key, self.value)
        )  # b h t d, as Hugging Face hands them over
        return backend.attend(*new, keys, values, step, how), keys, values

    def expected(self, how: AttentionArgs) -> Tensor:
        rows = []
        for row, length in enumerate(self.lengths.tolist()):
            key = torch.cat([self.keys[row, :length], self.key[row]])
            value = torch.cat([self.values[row, :length], self.value[row]])
            rows.append(reference(self.query[row], key, value, how))
        return torch.stack(rows)


# --- SDPA, the reference of every other backend ---


@pytest.mark.parametrize("softcap", [None, 1.7], ids=["no cap", "soft cap"])
@pytest.mark.parametrize("window", [None, 1, 5, 23])
@pytest.mark.parametrize("t", [1, 2, 5, 17])
def test_sdpa_equals_a_plain_reference_over_ragged_rows(t: int, window: int | None, softcap: float | None) -> None:
    case, how = Case(t), AttentionArgs(scale=0.7, window=window, softcap=softcap)
    tolerance = 1e-12 if softcap is None else 1e-6  # with a cap the softmax is taken in float32, as Hugging Face does
    torch.testing.assert_close(case.attend(Sdpa(), how)[0], case.expected(how), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("kv_heads", "groups"), [(1, 1), (1, 7), (5, 1), (3, 2)])
@pytest.mark.parametrize("dim", [3, 20])
def test_sdpa_serves_grouped_queries_of_any_head_size(kv_heads: int, groups: int, dim: int) -> None:
    case, how = Case(3, kv_heads, groups, dim), AttentionArgs(scale=dim**-0.5, window=5)
    torch.testing.assert_close(case.attend(Sdpa(), how)[0], case.expected(how), rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [1, 5])
def test_new_keys_and_values_are_appended_behind_each_row_and_nothing_else_is_written(t: int) -> None:
    case = Case(t)
    _, keys, values = case.attend(Sdpa(), AttentionArgs(scale=1.0))
    for row, length in enumerate(LENGTHS):
        for cached, before, new in ((keys, case.keys, case.key), (values, case.values, case.value)):
            assert torch.equal(cached[row, length : length + t], new[row])
            assert torch.equal(cached[row, :length], before[row, :length])
            assert torch.equal(cached[row, length + t :], before[row, length + t :])


def test_a_pass_may_fill_the_cache_to_its_last_slot() -> None:
    case, how = Case(5, lengths=[SLOTS - 5, 3, SLOTS - 5]), AttentionArgs(scale=1.0)
    torch.testing.assert_close(case.attend(Sdpa(), how)[0], case.expected(how), rtol=0, atol=1e-12)


def test_layers_of_one_pass_may_differ_in_window_and_groups() -> None:
    step = None
    for groups in (3, 1):
        for window in (None, 5, 2):
            case, how = Case(4, groups=groups), AttentionArgs(scale=1.0, window=window)
            step = step or Pass(case.lengths, case.t, case.slots, Sdpa())
            new = (x.transpose(1, 2) for x in (case.query, case.key, case.value))
            result = Sdpa().attend(*new, case.keys.clone(), case.values.clone(), step, how)
            torch.testing.assert_close(result, case.expected(how), rtol=0, atol=1e-12)


# --- Choosing ---


def needs(**changes: object) -> AttentionNeeds:
    given = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dims": frozenset({64})} | changes
    return AttentionNeeds(**given)  # type: ignore[arg-type]


@pytest.fixture
def flash_attn_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.fixture
def flash_attn_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))


def test_backends_are_tried_in_order_of_speed() -> None:
    assert list(BACKENDS) == ["flash-attn", "torch-flash", "sdpa"]


@pytest.mark.usefixtures("flash_attn_installed", "gpu_of")
def test_flash_attn_comes_first_where_it_is_installed() -> None:
    choice = choose_backend(needs())
    assert isinstance(choice.backend, FlashAttn)
    assert choice.reason == "first choice"


@pytest.mark.usefixtures("flash_attn_missing", "gpu_of")
def test_pytorchs_flash_kernel_comes_next_and_says_why() -> None:
    choice = choose_backend(needs())
    assert isinstance(choice.backend, TorchFlash)
    assert choice.reason == "flash-attn: flash-attn is not installed"


@pytest.mark.usefixtures("flash_attn_missing", "gpu_of")
def test_a_soft_cap_without_flash_attn_falls_back_to_sdpa() -> None:
    choice = choose_backend(needs(softcaps=frozenset({None, 50.0})))
    assert isinstance(choice.backend, Sdpa)
    assert "torch-flash: PyTorch's flash kernel has no soft cap" in choice.reason


@pytest.mark.usefixtures("flash_attn_installed", "gpu_of")
def test_flash_attn_serves_soft_caps_and_windows() -> None:
    choice = choose_backend(needs(softcaps=frozenset({50.0}), windows=frozenset({None, 4096})))
    assert isinstance(choice.backend, FlashAttn)


@pytest.mark.usefixtures("flash_attn_installed", "gpu_of")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"device": torch.device("cpu")}, "flash kernels need CUDA, the model is on cpu"),
        ({"dtype": torch.float32}, "flash kernels need float16 or bfloat16, the model is in float32"),
        ({"head_dims": frozenset({20})}, r"multiples of 8 up to 256, not \[20\]"),
        ({"head_dims": frozenset({64, 264})}, r"multiples of 8 up to 256, not \[64, 264\]"),
    ],
    ids=["CPU", "float32", "odd heads", "large heads"],
)
def test_sdpa_serves_what_flash_kernels_cannot_and_says_why(changes: dict[str, object], why: str) -> None:
    choice = choose_backend(needs(**changes))
    assert isinstance(choice.backend, Sdpa)
    for name in ("flash-attn", "torch-flash"):
        with pytest.raises(InputError, match=f"attention backend '{name}' cannot be used: .*{why}; choose another or"):
            choose_backend(needs(**changes), name)


@pytest.mark.usefixtures("flash_attn_installed")
def test_old_gpus_get_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    choice = choose_backend(needs())
    assert isinstance(choice.backend, Sdpa)
    assert "compute capability 8.0" in choice.reason


@pytest.mark.usefixtures("flash_attn_installed", "gpu_of")
def test_a_backend_may_be_asked_for_by_name() -> None:
    choice = choose_backend(needs(), "torch-flash")
    assert isinstance(choice.backend, TorchFlash)
    assert choice.reason == "asked for by name"


def test_an_unknown_backend_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(
        InputError, match="no attention backend is called 'xformers'; choose one of flash-attn, torch-f"
    ):
        choose_backend(needs(), "xformers")


# --- On a GPU: every backend against SDPA ---


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5, 64])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("t", [1, 2, 5, 17])
@pytest.mark.parametrize("name", ["flash-attn", "torch-flash"])
def test_flash_kernels_agree_with_sdpa(name: str, t: int, dim: int, groups: int, window: int | None) -> None:
    case = gpu_case(name, t, groups, dim)
    assert_agrees(case, BACKENDS[name](), AttentionArgs(scale=dim**-0.5, window=window))


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 5])
def test_flash_attn_agrees_with_sdpa_on_soft_caps(t: int) -> None:
    case = gpu_case("flash-attn", t, 4, 64)
    assert_agrees(case, FlashAttn(), AttentionArgs(scale=0.3, window=64, softcap=3.0))


def gpu_case(name: str, t: int, groups: int, dim: int) -> Case:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    case = Case(t, 3, groups, dim, dtype=torch.bfloat16, device="cuda", slots=256, lengths=[0, 129, 77, 256 - t])
    if obstacle := BACKENDS[name].obstacle(needs(device=case.query.device, head_dims=frozenset({dim}))):
        pytest.skip(obstacle)
    return case


def assert_agrees(case: Case, backend: Backend, how: AttentionArgs) -> None:
    """To bfloat16's rounding: results are averages of values around 1, which it holds to 2 ** -8."""
    ours, *cache = case.attend(backend, how)
    theirs, *expected_cache = case.attend(Sdpa(), how)
    exact = case.expected(how) if math.prod(case.query.shape) < 20_000 else theirs
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(ours, exact, rtol=2**-6, atol=2**-6)
    for written, expected in zip(cache, expected_cache, strict=True):
        assert torch.equal(written, expected)
