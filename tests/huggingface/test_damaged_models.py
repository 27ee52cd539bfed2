"""Model directories and names that cannot be loaded: one line, at once, and nothing of them is run."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from models import tiny_model
from safetensors.torch import load_file, save_file
from saved import save_model

from selfspec import InputError, SelfspecError
from selfspec.huggingface import hub
from selfspec.huggingface.loading import load


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def complaint(name: str | Path, **options: str) -> str:
    with pytest.raises(SelfspecError) as raised:
        load(str(name), **options)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def configure(directory: Path, **values: Any) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return directory


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# --- A config and weights that do not belong together ---


def test_fewer_layers_in_the_config_than_in_the_weights_are_refused(model_dir: Path) -> None:
    assert "unexpected (model.layers.4." in complaint(configure(model_dir, num_hidden_layers=4))


def test_more_layers_in_the_config_than_in_the_weights_are_refused(model_dir: Path) -> None:
    assert "describes" in complaint(configure(model_dir, num_hidden_layers=40))
    assert "missing (model.layers.7." in complaint(configure(model_dir, num_hidden_layers=8))


def test_weights_for_which_the_config_has_no_place_are_refused(tmp_path: Path) -> None:
    biased = save_model(tmp_path / "biased", attention_bias=True)
    assert "unexpected (model.layers.0.self_attn.k_proj.bias)" in complaint(configure(biased, attention_bias=False))


def test_weights_of_another_shape_are_refused_with_the_first_one(model_dir: Path) -> None:
    assert "of another shape (lm_head.weight" in complaint(configure(model_dir, vocab_size=260))
    experts = save_model(model_dir.parent / "experts", family="mixtral")
    assert "of another shape (model.layers.0.mlp.experts" in complaint(configure(experts, num_local_experts=2))


def test_weights_beside_the_model_and_old_buffers_are_no_problem(model_dir: Path) -> None:
    frequencies, value_head = "model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.summary.weight"
    change_weights(model_dir, lambda tensors: tensors.update({frequencies: torch.ones(3), value_head: torch.ones(3)}))
    assert load(str(model_dir)).model.config.num_hidden_layers == 7


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim"]
)
def test_a_config_of_a_giant_takes_no_memory(model_dir: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfspec.huggingface.loading.AutoModelForCausalLM", None)
    for size in (10**5 * 8 if key != "num_hidden_layers" else 1000, 2**62, -1, 0, True, 3.0, "3", [3]):
        assert "config" in complaint(configure(model_dir, **{key: size}))


# --- Damaged files ---


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_run(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    content = {"model.embed_tokens.weight": RunsCode(tmp_path / "ran"), "padding": b"x" * 2_000_000}
    (model_dir / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    assert complaint(model_dir).startswith("the weights of")
    torch.save(content, model_dir / "pytorch_model.bin")
    assert complaint(model_dir).startswith("the weights of")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "model-00001-of-00002.safetensors"])
def test_a_pointer_of_git_lfs_is_recognised(model_dir: Path, name: str) -> None:
    (model_dir / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n")
    assert f"{name}' is a Git LFS pointer to a file that is not here; run 'git lfs pull'" in complaint(model_dir)


@pytest.mark.parametrize(
    "content", ["", "[1]", "null", '"x"', "{", "[" * 10**5, '{"a": ' * 50 + "1" + "}" * 50, "\xff"]
)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_a_file_that_is_no_json_object_is_named(model_dir: Path, name: str, content: str) -> None:
    (model_dir / name).write_bytes(content.encode("latin-1"))
    assert f"{name}' is not a valid JSON file of a model (" in complaint(model_dir)


def test_a_device_or_a_directory_in_a_files_place_is_refused(model_dir: Path) -> None:
    (model_dir / "generation_config.json").unlink()
    (model_dir / "generation_config.json").symlink_to("/dev/zero")
    assert "the file is a device" in complaint(model_dir)
    (model_dir / "generation_config.json").unlink()
    (model_dir / "generation_config.json").mkdir()
    assert "Is a directory" in complaint(model_dir)


@pytest.mark.parametrize("shard", ["missing", "cut", "empty"])
def test_damaged_shards_are_refused(model_dir: Path, shard: str) -> None:
    (model_dir / "model.safetensors").unlink()
    tiny_model("llama", vocab_size=257).save_pretrained(model_dir, max_shard_size="100KB")
    last = sorted(model_dir.glob("*-of-*.safetensors"))[-1]
    if shard == "missing":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:-100] if shard == "cut" else b"")
    assert complaint(model_dir).startswith("the weights of")


def test_an_index_that_lies_is_refused(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    tiny_model("llama", vocab_size=257).save_pretrained(model_dir, max_shard_size="100KB")
    index = json.loads((model_dir / "model.safetensors.index.json").read_text())
    shards = index["weight_map"]
    for changed in ({}, [], 3, dict.fromkeys(shards, 3), dict.fromkeys(shards, "../none.safetensors")):
        (model_dir / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": changed}))
        assert complaint(model_dir).startswith("the weights of")


@pytest.mark.parametrize(
    "values",
    [
        {"dtype": "banana"},
        {"dtype": 3},
        {"dtype": "int8"},
        {"dtype": "float8_e4m3fn"},
        {"dtype": "complex64"},
        {"quantization_config": "x"},
        {"hidden_act": "none such"},
        {"rope_parameters": {"rope_type": "none such"}},
        {"rope_parameters": [1]},
        {"rms_norm_eps": "small"},
        {"model_type": ["llama"]},
        {"model_type": None},
        {"max_position_embeddings": -5},
    ],
    ids=str,
)
def test_odd_values_of_a_config_are_refused(model_dir: Path, values: dict[str, Any]) -> None:
    assert complaint(configure(model_dir, **values))


def test_a_damaged_tokenizer_is_refused(model_dir: Path) -> None:
    whole = (model_dir / "tokenizer.json").read_text()
    for content in ("", "{}", "[]", whole[:-30], whole.replace('"BPE"', '"none such"'), '{"model": 3}'):
        (model_dir / "tokenizer.json").write_text(content)
        assert complaint(model_dir).startswith("the tokenizer of")


def test_names_are_escaped(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "\x1b[31m\n")
    (directory / "model.safetensors").write_bytes(b"")
    assert "\\x1b[31m\\n" in complaint(directory)


# --- The hub ---


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.usefixtures("no_cache")
def test_a_typo_of_demo_waits_for_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("dmeo", "Demo", "demos"):
        assert complaint(name).endswith("HF_HUB_OFFLINE forbids the hub; did you mean 'demo'?")
    assert "give a directory that holds the model" in complaint("meta-llama/Llama-3.2-1B")


@pytest.mark.usefixtures("no_cache")
def test_an_unreachable_hub_is_named_at_once(monkeypatch: pytest.MonkeyPatch, silent_server: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("selfspec.huggingface.loading.AutoConfig", None)  # whose client tries for half a minute
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.1)
    for endpoint, reason in (
        ("http://127.0.0.1:9", "Connection refused"),
        (silent_server, "timed out"),
        ("nonsense", "unknown url type"),
    ):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert f"the hub ({endpoint}) cannot be reached: {reason}" in complaint("some/model")


def test_a_cached_model_loads_while_the_hub_is_unreachable(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123456789abcdef"
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    snapshot.parent.mkdir()
    model_dir.rename(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load("some/model").model.config.num_hidden_layers == 7


def test_a_hub_that_answers_with_an_error_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise hub.HTTPError("http://hub", 401, "Unauthorized", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "urlopen", refuse)
    assert hub.hub_unavailable_reason() is None


def test_advice_is_right_for_the_command_line_and_for_python(model_dir: Path) -> None:
    with pytest.raises(InputError) as raised:
        load(str(model_dir), dtype="int8")
    assert "--" not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": []}, "has eos_token_id [], but tokens are expected"),
        ({"eos_token_id": [3, "x"]}, "has eos_token_id [3, 'x'], but tokens are expected"),
        ({"pad_token_id": 1.5}, "has pad_token_id 1.5, but tokens are expected"),
        ({"top_k": [20]}, "has top_k [20], but a number is expected"),
    ],
)
def test_odd_values_of_a_generation_config_are_refused(model_dir: Path, values: dict[str, Any], message: str) -> None:
    (model_dir / "generation_config.json").write_text(json.dumps(values))
    assert message in complaint(model_dir)
