"""config.json: what is taken from it, and that every fault is listed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.layout import expected_tensors, linears
from s2quant.errors import UserError
from s2quant.export.random import s2_pro_config, tiny_config


def test_the_builtin_config_is_the_public_one() -> None:
    """Facts of the public config.json of fishaudio/s2-pro."""
    raw = s2_pro_config()
    assert {key: value for key, value in raw.items() if not isinstance(value, dict)} == {
        "audio_pad_token_id": 151677,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "model_type": "fish_qwen3_omni",
        "pad_token_id": 151669,
        "semantic_end_token_id": 155773,
        "semantic_start_token_id": 151678,
    }
    text, audio = raw["text_config"], raw["audio_decoder_config"]
    assert (len(text), len(audio)) == (27, 29)
    assert list(text) == sorted(text)
    assert list(audio) == sorted(audio)
    shared = {"dim": 2560, "n_head": 32, "n_local_heads": 8, "head_dim": 128, "intermediate_size": 9728}
    shared |= {"rope_base": 1000000, "norm_eps": 1e-6, "attention_qkv_bias": False, "attention_o_bias": False}
    assert text.items() >= (shared | {"n_layer": 36, "vocab_size": 155776, "max_seq_len": 32768}).items()
    assert text.items() >= {"attention_qk_norm": True, "tie_word_embeddings": True, "model_type": "fish_qwen3"}.items()
    assert audio.items() >= (shared | {"n_layer": 4, "vocab_size": 4096, "max_seq_len": 11, "text_dim": 2560}).items()
    assert audio.items() >= {"attention_qk_norm": False, "num_codebooks": 10}.items()
    assert audio["initializer_range"] == 0.01976423537605237


def test_what_the_model_takes_from_it() -> None:
    raw = s2_pro_config()
    raw["audio_decoder_config"] |= {"rope_base": 10, "norm_eps": 0.5}
    config = S2Config.from_json(raw)
    assert (config.slow.dim, config.slow.n_layer, config.slow.qkv_dim) == (2560, 36, 6144)
    assert (config.fast.rope_base, config.fast.norm_eps, config.fast.max_seq_len) == (1000000, 1e-6, 10)
    assert (config.semantic_begin_id, config.semantic_end_id, config.im_end_id) == (151678, 155773, 151645)
    assert (config.codebook_size, config.num_codebooks) == (4096, 10)
    assert config.raw == raw


def test_layout_at_the_real_size() -> None:
    specs = expected_tensors(S2Config.from_json(s2_pro_config()))
    assert len(specs) == 358
    assert sum(spec.numel for spec in specs.values()) == 4_561_852_416
    slow = sum(spec.numel for name, spec in specs.items() if name.startswith("text_model."))
    assert slow == 4_032_298_496
    shapes = {name: spec.shape for name, spec in specs.items()}
    assert shapes["text_model.model.embeddings.weight"] == (155776, 2560)
    assert shapes["text_model.model.layers.35.attention.wqkv.weight"] == (6144, 2560)
    assert shapes["text_model.model.layers.0.attention.wo.weight"] == (2560, 4096)
    assert shapes["text_model.model.layers.0.feed_forward.w2.weight"] == (2560, 9728)
    assert shapes["text_model.model.layers.0.attention.q_norm.weight"] == (128,)
    assert shapes["audio_decoder.codebook_embeddings.weight"] == (40960, 2560)
    assert shapes["audio_decoder.output.weight"] == (4096, 2560)
    assert "audio_decoder.layers.0.attention.q_norm.weight" not in specs
    assert not any("project_in" in name or "lm_head" in name for name in specs)
    assert len(linears(S2Config.from_json(s2_pro_config()))) == 180 + 20 + 1


def test_another_width_of_the_fast_ar_has_a_projection() -> None:
    raw = tiny_config()
    raw["audio_decoder_config"] |= {"dim": 64, "head_dim": 16, "text_dim": 128}
    specs = expected_tensors(S2Config.from_json(raw))
    assert specs["audio_decoder.project_in.weight"].shape == (64, 128)
    assert specs["audio_decoder.project_in.bias"].shape == (64,)
    assert specs["audio_decoder.codebook_embeddings.weight"].shape == (40960, 128)


def test_all_faults_are_in_one_message() -> None:
    raw = copy.deepcopy(tiny_config())
    raw["model_type"] = "llama"
    del raw["eos_token_id"]
    del raw["text_config"]["n_head"]
    raw["text_config"]["dim"] = "128"
    raw["text_config"]["attention_qk_norm"] = 1
    raw["text_config"]["use_moe"] = True
    raw["audio_decoder_config"]["n_layer"] = True
    raw["audio_decoder_config"]["vocab_size"] = -1
    raw["audio_decoder_config"]["num_codebooks"] = 10.0
    raw["audio_decoder_config"]["norm_eps"] = float("nan")
    with pytest.raises(UserError) as error:
        S2Config.from_json(raw, "here.json")
    for fragment in (
        "here.json:",
        "model_type is 'llama', not 'fish_qwen3_omni'",
        "eos_token_id is None, not a number",
        "text_config.n_head is None, not a number",
        "text_config.dim is '128', not a number",
        "text_config.attention_qk_norm is 1, not true or false",
        "text_config.use_moe is true",
        "audio_decoder_config.n_layer is True, not a number",
        "audio_decoder_config.vocab_size is -1, not positive",
        "audio_decoder_config.num_codebooks is 10.0, not a number",
        "audio_decoder_config.norm_eps is nan, not positive",
    ):
        assert fragment in error.value.got


@pytest.mark.parametrize(
    ("section", "changes", "fragment"),
    [
        ("text_config", {"n_local_heads": 3}, "n_local_heads 3 does not divide n_head 4"),
        ("audio_decoder_config", {"head_dim": 31}, "audio_decoder_config: head_dim 31 is odd"),
        ("text_config", {"tie_word_embeddings": False}, "tie_word_embeddings is not true"),
        ("audio_decoder_config", {"text_dim": 64}, "text_dim 64 is not text_config.dim 128"),
        ("audio_decoder_config", {"vocab_size": 100}, "4096 semantic token ids, but 100 codes"),
        ("text_config", {"vocab_size": 10}, "is outside the vocabulary of 10"),
        ("", {"semantic_end_token_id": 1}, "semantic token ids, but 4096 codes"),
        ("", {"text_config": None}, "text_config is missing"),
        ("", {"audio_decoder_config": [1]}, "audio_decoder_config is missing"),
    ],
)
def test_contradictions(section: str, changes: dict[str, Any], fragment: str) -> None:
    raw = copy.deepcopy(tiny_config())
    (raw[section] if section else raw).update(changes)
    with pytest.raises(UserError) as error:
        S2Config.from_json(raw)
    assert fragment in error.value.got


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"{", "Expecting property name"),
        (b"[1]", "a JSON list"),
        (b"\xff\xfe{}", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "recursion"),
        (b"", "Expecting value"),
    ],
)
def test_files_that_are_no_json_object(tmp_path: Path, content: bytes, fragment: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=fragment) as error:
        S2Config.load(tmp_path)
    assert str(tmp_path / "config.json") in error.value.got


def test_a_folder_or_its_file(tiny_folder: Path) -> None:
    assert S2Config.load(tiny_folder) == S2Config.load(tiny_folder / "config.json")
    assert S2Config.load(tiny_folder).raw == json.loads((tiny_folder / "config.json").read_text("utf-8"))
