"""Attention over the cache: every backend against plain attention, and the choice of the backend."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from flash_kernels import reference
from tape import TapeRecorder
from torch import Tensor

from selfspec import InputError
from selfspec.models.attention_hook import AttentionArgs, AttentionNeeds
from selfspec.runtime.attention.choose import BACKENDS, choose_backend
from selfspec.runtime.attention.flash import FlashAttn, TorchFlash
from selfspec.runtime.attention.sdpa import Sdpa
from selfspec.runtime.cuda_graphs import CudaRecorder, Graphs
from selfspec.runtime.forward_pass import Backend, Pass

SLOTS = 37
LENGTHS = [0, 19, 7]


class Case:
    """A cache with rows of unequal length and large finite numbers in unused slots, and `t` new tokens per row."""

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
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(t + 100 * seed)
        b = len(lengths or LENGTHS)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        self.t, self.slots = t, slots
        self.lengths = torch.tensor(lengths or LENGTHS, dtype=torch.int32, device=device)
        self.query = normal(b, t, kv_heads * groups, dim)
        self.key, self.value = normal(b, t, kv_heads, dim), normal(b, t, kv_heads, dim)
        self.keys, self.values = normal(b, slots, kv_heads, dim), normal(b, slots, kv_heads, dim)
        for row, length in enumerate(self.lengths.tolist()):
            self.keys[row, length:], self.values[row, length:] = 50, 1000  # as a rejected draft leaves behind

    def attend(self, backend: Backend, args: AttentionArgs) -> tuple[Tensor, Tensor, Tensor]:
        """The result, and the cache afterwards. Does not change the case."""
        keys, values = self.keys.clone(), self.values.clone()
        step = Pass(self.lengths.clone(), self.t, self.slots, backend)
        new = (
            x.transpose(1, 2) for x in (self.query, self.key, self.value)
        )  # b h t d, as Hugging Face hands them over
        return backend.attend(*new, keys, values, step, args), keys, values

    def tensors(self, other: Case) -> list[tuple[Tensor, Tensor]]:
        """Pairs of each tensor and the tensor of another case."""
        return [(own, vars(other)[name]) for name, own in vars(self).items() if isinstance(own, Tensor)]

    def expected(self, args: AttentionArgs) -> Tensor:
        """The result in float64."""
        rows = []
        for row, length in enumerate(self.lengths.tolist()):
            key = torch.cat([self.keys[row, :length], self.key[row]])
            value = torch.cat([self.values[row, :length], self.value[row]])
            rows.append(reference(self.query[row].double(), key.double(), value.double(), args))
        return torch.stack(rows)


# --- SDPA, the reference of every other backend ---


@pytest.mark.parametrize("softcap", [None, 1.7], ids=["no cap", "soft cap"])
@pytest.mark.parametrize("window", [None, 1, 5, 23])
@pytest.mark.parametrize("t", [1, 2, 5, 17])
def test_sdpa_equals_plain_attention_over_unequal_rows(t: int, window: int | None, softcap: float | None) -> None:
    case, args = Case(t), AttentionArgs(scale=0.7, window=window, softcap=softcap)
    tolerance = 1e-12 if softcap is None else 1e-6  # with a cap the softmax runs in float32, as in Hugging Face
    torch.testing.assert_close(case.attend(Sdpa(), args)[0], case.expected(args), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("kv_heads", "groups"), [(1, 1), (1, 7), (5, 1), (3, 2)])
@pytest.mark.parametrize("dim", [3, 20])
def test_sdpa_serves_grouped_queries_of_any_head_size(kv_heads: int, groups: int, dim: int) -> None:
    case, args = Case(3, kv_heads, groups, dim), AttentionArgs(scale=dim**-0.5, window=5)
    torch.testing.assert_close(case.attend(Sdpa(), args)[0], case.expected(args), rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [1, 5])
def test_a_pass_appends_keys_and_values_to_each_row_and_writes_nothing_else(t: int) -> None:
    case = Case(t)
    _, keys, values = case.attend(Sdpa(), AttentionArgs(scale=1.0))
    for row, length in enumerate(LENGTHS):
        for cached, before, new in ((keys, case.keys, case.key), (values, case.values, case.value)):
            assert torch.equal(cached[row, length : length + t], new[row])
            assert torch.equal(cached[row, :length], before[row, :length])
            assert torch.equal(cached[row, length + t :], before[row, length + t :])


def test_a_pass_may_fill_the_cache_to_its_last_slot() -> None:
    case, args = Case(5, lengths=[SLOTS - 5, 3, SLOTS - 5]), AttentionArgs(scale=1.0)
    torch.testing.assert_close(case.attend(Sdpa(), args)[0], case.expected(args), rtol=0, atol=1e-12)


def test_layers_of_one_pass_may_differ_in_window_and_groups() -> None:
    step = None
    for groups in (3, 1):
        for window in (None, 5, 2):
            case, args = Case(4, groups=groups), AttentionArgs(scale=1.0, window=window)
            step = step or Pass(case.lengths, case.t, case.slots, Sdpa())
            new = (x.transpose(1, 2) for x in (case.query, case.key, case.value))
            result = Sdpa().attend(*new, case.keys.clone(), case.values.clone(), step, args)
            torch.testing.assert_close(result, case.expected(args), rtol=0, atol=1e-12)


# --- All backends ---


SIZES = pytest.mark.parametrize(
    ("dim", "groups", "window"), [(dim, groups, w) for dim in (64, 128) for groups in (1, 4) for w in (None, 5, 64)]
)
LENGTHS_OF_QUERIES = range(1, 18)


@pytest.mark.rounding
@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sdpa_agrees_with_float64(dtype: torch.dtype, dim: int, groups: int, window: int | None) -> None:
    for t in LENGTHS_OF_QUERIES:
        assert_agrees(large_case(t, groups, dim, dtype=dtype), Sdpa(), AttentionArgs(scale=dim**-0.5, window=window))


@pytest.mark.usefixtures("flash_kernels")
@SIZES
@pytest.mark.parametrize("backend", [FlashAttn(), TorchFlash()], ids=lambda backend: backend.name)
def test_flash_kernels_get_the_right_arguments(backend: Backend, dim: int, groups: int, window: int | None) -> None:
    for t in (1, 2, 5, 17):
        case = large_case(t, groups, dim, dtype=torch.float32)
        assert_agrees(case, backend, AttentionArgs(scale=dim**-0.5, window=window))


@pytest.mark.usefixtures("flash_kernels")
def test_flash_attn_gets_the_soft_cap() -> None:
    case = large_case(5, 4, 64, dtype=torch.float32)
    assert_agrees(case, FlashAttn(), AttentionArgs(scale=0.3, window=64, softcap=3.0))


@pytest.mark.gpu
@SIZES
@pytest.mark.parametrize("name", list(BACKENDS))
def test_all_backends_agree_on_a_gpu(name: str, dim: int, groups: int, window: int | None) -> None:
    backend = backend_on_gpu(name, dim)
    for t in LENGTHS_OF_QUERIES:
        case = large_case(t, groups, dim, device="cuda")
        assert_agrees(case, backend, AttentionArgs(scale=dim**-0.5, window=window))


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 5])
def test_soft_caps_agree_on_a_gpu(t: int) -> None:
    backend = backend_on_gpu("flash-attn", 64)
    assert_agrees(large_case(t, 4, 64, device="cuda"), backend, AttentionArgs(scale=0.3, window=64, softcap=3.0))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("t", [1, 5])
@pytest.mark.parametrize(
    "name", ["sdpa", *(pytest.param(f"{name} on a GPU", marks=pytest.mark.gpu) for name in BACKENDS)]
)
def test_captured_attention_works_with_other_contents_and_lengths(name: str, t: int, window: int | None) -> None:
    name, _, gpu = name.partition(" ")
    backend = backend_on_gpu(name, 64) if gpu else Sdpa()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    held = large_case(t, 4, 64, dtype=dtype, device=device)
    recorder = CudaRecorder(torch.device(device)) if gpu else TapeRecorder()
    graphs, args = Graphs(recorder), AttentionArgs(scale=0.125, window=window)

    def work() -> Attended:
        step = Pass(held.lengths, held.t, held.slots, backend)
        new = (x.transpose(1, 2) for x in (held.query, held.key, held.value))
        return Attended(backend.attend(*new, held.keys, held.values, step, args))

    for seed, lengths in enumerate(([0, 129, 77, 256 - t], [200, 3, 256 - t, 11], [1, 0, 254 - t, 128], [5, 6, 7, 8])):
        case = large_case(t, 4, 64, dtype=dtype, device=device, lengths=lengths, seed=seed)
        for tensor, changed in held.tensors(case):
            tensor.copy_(changed)
        result = graphs.run("attend", work).result
        torch.testing.assert_close(result.double(), case.expected(args), rtol=2**-6, atol=2**-6)
        torch.testing.assert_close(held.keys, case.attend(Sdpa(), args)[1], rtol=0, atol=0)
    assert len(graphs) == 1, graphs.uncaptured_reason


@dataclass
class Attended:
    result: Tensor


def large_case(
    t: int,
    groups: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    lengths: list[int] | None = None,
    seed: int = 0,
) -> Case:
    """A case of a kernel's usual sizes, from an empty row to a row that the pass fills to the last slot."""
    lengths = lengths or [0, 129, 77, 256 - t]
    return Case(t, 3, groups, dim, dtype=dtype, device=device, slots=256, lengths=lengths, seed=seed)


def backend_on_gpu(name: str, dim: int) -> Backend:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if unsupported_reason := BACKENDS[name].unsupported_reason(needs(head_dims=frozenset({dim}))):
        pytest.skip(unsupported_reason)
    return BACKENDS[name]()


def assert_agrees(case: Case, backend: Backend, args: AttentionArgs) -> None:
    """Results agree to rounding: they are averages of values around 1, and bfloat16 rounds to 2 ** -8."""
    tolerance = 2**-6 if case.query.dtype == torch.bfloat16 else 1e-5
    ours, *cache = case.attend(backend, args)
    torch.testing.assert_close(ours.double(), case.expected(args), rtol=tolerance, atol=tolerance)
    for written, expected in zip(cache, case.attend(Sdpa(), args)[1:], strict=True):
        assert torch.equal(written, expected)


# --- Choosing ---


def needs(**changes: object) -> AttentionNeeds:
    given = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dims": frozenset({64})} | changes
    return AttentionNeeds(**given)  # type: ignore[arg-type]


@pytest.fixture
def flash_attn_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))


def test_backends_are_tried_in_order_of_speed() -> None:
    assert list(BACKENDS) == ["flash-attn", "torch-flash", "sdpa"]


@pytest.mark.usefixtures("gpu_of")
@pytest.mark.parametrize(
    ("installed", "changes", "name", "reason"),
    [
        (True, {}, "flash-attn", "first choice"),
        (True, {"softcaps": frozenset({50.0})}, "flash-attn", "first choice"),
        (False, {}, "torch-flash", "flash-attn: flash-attn is not installed"),
        (
            False,
            {"softcaps": frozenset({None, 50.0})},
            "sdpa",
            "flash-attn: flash-attn is not installed; torch-flash: PyTorch's flash kernel has no soft cap",
        ),
    ],
)
def test_the_first_backend_that_serves_the_model_is_chosen(
    installed: bool, changes: dict[str, object], name: str, reason: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("flash_attn_installed" if installed else "flash_attn_missing")
    choice = choose_backend(needs(**changes))
    assert (choice.backend.name, choice.reason) == (name, reason)


@pytest.mark.usefixtures("flash_attn_installed", "gpu_of")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"device": torch.device("cpu")}, "flash kernels need CUDA, but the model is on cpu"),
        ({"dtype": torch.float32}, "flash kernels need float16 or bfloat16, but the model is in float32"),
        ({"head_dims": frozenset({20})}, r"multiples of 8 up to 256, not \[20\]"),
        ({"head_dims": frozenset({64, 264})}, r"multiples of 8 up to 256, not \[64, 264\]"),
    ],
    ids=["CPU", "float32", "odd heads", "large heads"],
)
def test_sdpa_replaces_flash_kernels_that_cannot_serve_the_model(changes: dict[str, object], why: str) -> None:
    choice = choose_backend(needs(**changes))
    assert isinstance(choice.backend, Sdpa)
    for name in ("flash-attn", "torch-flash"):
        with pytest.raises(
            InputError, match=f"attention backend '{name}' cannot be used: .*{why}; choose another backend or"
        ):
            choose_backend(needs(**changes), name)


@pytest.mark.usefixtures("flash_attn_installed")
def test_old_gpus_get_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    choice = choose_backend(needs())
    assert isinstance(choice.backend, Sdpa)
    assert "compute capability 8.0" in choice.reason


@pytest.mark.usefixtures("flash_attn_installed", "gpu_of")
def test_a_backend_is_chosen_by_name() -> None:
    choice = choose_backend(needs(), "torch-flash")
    assert isinstance(choice.backend, TorchFlash)
    assert choice.reason == "requested by name"


def test_an_unknown_backend_is_refused_with_the_known_names() -> None:
    with pytest.raises(
        InputError, match="no attention backend is called 'xformers'; choose one of flash-attn, torch-f"
    ):
        choose_backend(needs(), "xformers")
