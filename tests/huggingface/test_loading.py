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
from selfspec.huggingface.loading import check_dtype, load


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def complaint(name: str | Path, **options: str) -> str:
    with pytest.raises(SelfspecError) as raised:
        load(str(name), **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_model_comes_with_its_tokenizer_and_context_and_in_the_dtype_that_was_asked_for(model_dir: Path) -> None:
    loaded = load(str(model_dir))
    assert (loaded.model.dtype, loaded.context, loaded.model.training) == (torch.float32, CONTEXT, False)
    assert loaded.tokenizer("é")["input_ids"] == byte_tokenizer()("é")["input_ids"]
    assert load(str(model_dir), dtype="bfloat16", device="cpu").dtype_name == "bfloat16"


def test_auto_is_the_checkpoints_own_dtype(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.bfloat16, vocab_size=257).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load(str(tmp_path)).dtype_name == "bfloat16"


def test_directories_that_are_missing_or_incomplete_are_told_apart(tmp_path: Path, model_dir: Path) -> None:
    assert complaint(tmp_path / "none").startswith("there is no model directory at")
    assert "has no config.json" in complaint(tmp_path)
    assert "is a file" in complaint(model_dir / "config.json")
    (model_dir / "model.safetensors").unlink()
    assert "has no weights" in complaint(model_dir)


def test_damaged_files_are_told_apart(model_dir: Path) -> None:
    weights = (model_dir / "model.safetensors").read_bytes()
    (model_dir / "model.safetensors").write_bytes(weights[:-100])
    assert "the weights of" in complaint(model_dir)
    (model_dir / "tokenizer.json").unlink()
    (model_dir / "tokenizer_config.json").unlink()
    assert "the tokenizer of" in complaint(model_dir)
    (model_dir / "config.json").write_text("{")
    assert "is not a valid JSON file" in complaint(model_dir)


def test_a_config_that_contradicts_itself_takes_one_line(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "many"}))
    assert "num_hidden_layers" in complaint(model_dir) or "config" in complaint(model_dir)


def test_names_that_no_file_system_takes_are_no_directories() -> None:
    assert "there is no model directory" in complaint("/" + "x" * 300)
    assert "there is no model directory" in complaint("~nobody-of-this-name/model")


def test_missing_weights_are_never_filled_at_random(model_dir: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    assert "not whole: 1 missing (model.layers.3.mlp.up_proj.weight)" in complaint(model_dir)


def test_families_are_refused_by_their_config_before_any_weight_is_read(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfspec.huggingface.loading.AutoModelForCausalLM", None)
    T5Config().save_pretrained(model_dir)
    with pytest.raises(UnsupportedModelError, match="'t5' is an encoder-decoder model"):
        load(str(model_dir))
    AutoConfig.for_model("gpt_neox").save_pretrained(model_dir)
    with pytest.raises(UnsupportedModelError, match="model type 'gpt_neox' is not supported; supported are apertus"):
        load(str(model_dir))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_and_one_with_fewer_is_not(tmp_path: Path) -> None:
    few, many = (save_model(tmp_path / str(size), vocab_size=size) for size in (211, 307))
    assert "the tokenizer has tokens up to 256, but the model's vocabulary is 0..210" in complaint(few)
    load(str(many))


def test_devices_and_dtypes_that_cannot_be_used_are_named(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaint(model_dir, device="frob").startswith("device 'frob' cannot be used")
    assert complaint(model_dir, device="meta").startswith("device 'meta' cannot be used")
    assert complaint(model_dir, dtype="int8").startswith("dtype 'int8' is unknown; choose one of auto, float32")

    def no_half(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    check_dtype(torch.float32, torch.device("cpu"))
    monkeypatch.setattr(torch.nn.functional, "linear", no_half)
    assert "cpu cannot compute in float16" in complaint(model_dir, dtype="float16")


def test_a_hub_model_that_is_out_of_reach_takes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert complaint("nobody/no-such-model").startswith("model 'nobody/no-such-model' cannot be loaded: ")
    assert complaint("no such:model").startswith("model 'no such:model' cannot be loaded: ")
    assert "the model's name is empty" in complaint("")


def test_a_model_without_its_type_in_the_config_is_refused(model_dir: Path) -> None:
    (model_dir / "config.json").write_text(json.dumps({"hidden_size": 5}))
    with pytest.raises(InputError, match="Unrecognized model"):
        load(str(model_dir))
