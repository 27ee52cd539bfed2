from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file, save_file
from saved import CONTEXT, byte_tokenizer, save_model
from transformers import AutoConfig, T5Config

from selfspec import InputError, SelfspecError, UnsupportedModelError
from selfspec.huggingface.loading import check_dtype, load, load_draft_model


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def complaint(name: str | Path, **options: str) -> str:
    with pytest.raises(SelfspecError) as raised:
        load(str(name), **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_load_returns_the_model_the_tokenizer_the_context_and_the_requested_dtype(model_dir: Path) -> None:
    loaded = load(str(model_dir))
    assert (loaded.model.dtype, loaded.context, loaded.model.training) == (torch.float32, CONTEXT, False)
    assert loaded.tokenizer("é")["input_ids"] == byte_tokenizer()("é")["input_ids"]
    assert load(str(model_dir), dtype="bfloat16", device="cpu").dtype_name == "bfloat16"


def test_auto_selects_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.bfloat16, vocab_size=257).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load(str(tmp_path)).dtype_name == "bfloat16"


def test_each_missing_or_incomplete_directory_has_its_own_error(tmp_path: Path, model_dir: Path) -> None:
    assert complaint(tmp_path / "none").startswith("there is no model directory at")
    assert "has no config.json" in complaint(tmp_path)
    assert "is a file" in complaint(model_dir / "config.json")
    (model_dir / "model.safetensors").unlink()
    assert "has no weights" in complaint(model_dir)


def test_each_damaged_file_has_its_own_error(model_dir: Path) -> None:
    weights = (model_dir / "model.safetensors").read_bytes()
    (model_dir / "model.safetensors").write_bytes(weights[:-100])
    assert "the weights of" in complaint(model_dir)
    (model_dir / "tokenizer.json").unlink()
    (model_dir / "tokenizer_config.json").unlink()
    assert "the tokenizer of" in complaint(model_dir)
    (model_dir / "config.json").write_text("{")
    assert "is not a valid JSON file" in complaint(model_dir)


def test_an_invalid_config_is_refused_in_one_line(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "many"}))
    assert "num_hidden_layers" in complaint(model_dir) or "config" in complaint(model_dir)


@pytest.mark.parametrize("name", ["/" + "x" * 300, "~nobody-of-this-name/model"], ids=["long", "user"])
def test_an_impossible_path_is_a_missing_directory(name: str) -> None:
    assert "there is no model directory" in complaint(name)


def test_missing_weights_are_refused(model_dir: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    assert "not whole: 1 missing (model.layers.3.mlp.up_proj.weight)" in complaint(model_dir)


def test_an_unsupported_config_is_refused_before_any_weights_are_read(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfspec.huggingface.loading.AutoModelForCausalLM", None)
    for config, message in (
        (T5Config(), "'t5' is an encoder-decoder model"),
        (AutoConfig.for_model("gpt_neox"), "model type 'gpt_neox' is not supported; supported are apertus"),
    ):
        config.save_pretrained(model_dir)
        with pytest.raises(UnsupportedModelError, match=message):
            load(str(model_dir))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    few, many = (save_model(tmp_path / str(size), vocab_size=size) for size in (211, 307))
    assert "the tokenizer has tokens up to 256, but the model's vocabulary is 0..210" in complaint(few)
    load(str(many))


def test_tokens_added_beyond_the_models_vocabulary_are_accepted_in_either_tokenizer(tmp_path: Path) -> None:
    size = len(byte_tokenizer())
    plain, padded = (save_model(tmp_path / name, vocab_size=size) for name in ("plain", "padded"))
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<a>", "<b>"]})
    tokenizer.save_pretrained(padded)
    target, other = load(str(padded)), load(str(plain))
    assert target.vocabulary == size < len(target.tokenizer)
    load_draft_model(str(plain), target)
    load_draft_model(str(padded), other)
    tokenizer.add_tokens(["<c>"])
    other.tokenizer.add_tokens(["<c>"])
    tokenizer.save_pretrained(padded)
    with pytest.raises(InputError, match=f"token '<c>' is {size + 3} there and {size} here"):
        load_draft_model(str(padded), other)


def test_errors_name_unusable_devices_and_dtypes(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("frob", "meta"):
        assert complaint(model_dir, device=device).startswith(f"device '{device}' cannot be used")
    assert complaint(model_dir, dtype="int8").startswith("dtype 'int8' is unknown; choose one of auto, float32")

    def no_half(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    check_dtype(torch.float32, torch.device("cpu"))
    monkeypatch.setattr(torch.nn.functional, "linear", no_half)
    assert "cpu cannot compute in float16" in complaint(model_dir, dtype="float16")


def test_an_unreachable_hub_model_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-model", "no such:model"):
        assert complaint(name).startswith(f"model '{name}' cannot be loaded: ")
    assert "the model's name is empty" in complaint("")


def test_a_model_without_its_type_in_the_config_is_refused(model_dir: Path) -> None:
    (model_dir / "config.json").write_text(json.dumps({"hidden_size": 5}))
    with pytest.raises(InputError, match="Unrecognized model"):
        load(str(model_dir))
