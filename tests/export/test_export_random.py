"""Random checkpoints: the exact layout, one generator per tensor, the built-in sizes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from folder_cases import SINGLE, WQKV
from safetensors.torch import load_file

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.layout import expected_tensors
from s2quant.codec import load_codec
from s2quant.errors import UserError
from s2quant.export.random import CONFIGS, random_tensor, s2_pro_config, tiny_config, write_random
from s2quant.prompt import Tokenizer
from s2quant.records import folder_hashes

FILES = {
    "chat_template.jinja",
    "codec.pth",
    "config.json",
    "manifest.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_the_tensors_are_those_of_the_layout(tiny_folder: Path) -> None:
    assert {path.name for path in tiny_folder.iterdir()} == FILES
    specs = expected_tensors(S2Config.from_json(tiny_config()))
    tensors = load_file(tiny_folder / SINGLE)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {name: spec.shape for name, spec in specs.items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert json.loads((tiny_folder / "config.json").read_text("utf-8")) == tiny_config()


def test_tokenizer_and_codec_agree_with_the_config(tiny_folder: Path) -> None:
    config = S2Config.load(tiny_folder)
    tokenizer = Tokenizer.load(tiny_folder, config)
    assert (tokenizer.im_end_id, tokenizer.semantic_begin_id) == (config.im_end_id, config.semantic_begin_id)
    assert load_codec(tiny_folder).num_codebooks == config.num_codebooks


def test_same_seed_same_bytes(tmp_path: Path, tiny_folder: Path) -> None:
    write_random(tiny_config(), tmp_path / "again", seed=0)
    assert folder_hashes(tmp_path / "again") == folder_hashes(tiny_folder)


def test_another_seed_changes_every_tensor(tmp_path: Path, tiny_folder: Path) -> None:
    write_random(tiny_config(), tmp_path / "other", seed=1)
    one, two = load_file(tiny_folder / SINGLE), load_file(tmp_path / "other" / SINGLE)
    assert not [name for name in one if torch.equal(one[name], two[name])]
    assert (tmp_path / "other" / "codec.pth").read_bytes() != (tiny_folder / "codec.pth").read_bytes()


def test_a_tensor_does_not_depend_on_the_others(tiny_folder: Path) -> None:
    config = S2Config.from_json(tiny_config())
    spec = expected_tensors(config)[f"{WQKV}.weight"]
    alone = random_tensor(spec, config, seed=0).to(torch.bfloat16)
    assert torch.equal(alone, load_file(tiny_folder / SINGLE)[spec.name])


def test_the_sizes_on_the_command_line() -> None:
    assert set(CONFIGS) == {"tiny", "s2-pro"}
    specs = expected_tensors(S2Config.from_json(CONFIGS["s2-pro"]()))
    assert len(specs) == 358
    assert sum(spec.numel for spec in specs.values()) == 4_561_852_416


def test_another_config(tmp_path: Path) -> None:
    raw = copy.deepcopy(tiny_config())
    raw["text_config"]["n_layer"] = 1
    raw["a_field_of_its_own"] = {"kept": [1, "\u00e9"]}
    raw["quantization_config"] = {"bits": 4}
    write_random(raw, tmp_path / "out", seed=3)
    del raw["quantization_config"]  # the weights are dense
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8")) == raw
    assert set(load_file(tmp_path / "out" / SINGLE)) == set(expected_tensors(S2Config.from_json(raw)))
    record = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))
    assert (record["stage"], record["seed"]) == ("random", 3)


def test_a_config_of_another_model_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_type is 'llama'"):
        write_random(s2_pro_config() | {"model_type": "llama"}, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []
