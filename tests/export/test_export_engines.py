"""Folders for vllm-omni and sglang-omni, held to what these engines' own loaders did with them (golden/export)."""

import hashlib
import json
import re
from pathlib import Path

import engine_cases as cases
import pytest
import torch
from folder_cases import REPOSITORY, SINGLE, WQKV
from safetensors.torch import load_file

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.reader import open_checkpoint
from s2quant.errors import UserError, VerificationError
from s2quant.export import profiles
from s2quant.export.engines import engine_config
from s2quant.export.profiles import export_checkpoint
from s2quant.export.random import s2_pro_config
from s2quant.files import read_json
from s2quant.packing import unpack

GOLDEN = json.loads((REPOSITORY / "tests/golden/export/engines.json").read_text("utf-8"))
RELEASES = {"vllm-omni": "vllm and vllm-omni 0.28.0", "sglang-omni": "sglang-omni #150"}
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("w1", "w3"),
    "o_proj": ("wo",),
    "down_proj": ("w2",),
}
DISK = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj"}
DISK |= {"w1": "feed_forward.w1", "w3": "feed_forward.w3", "w2": "feed_forward.w2", "wo": "attention.wo"}


def loaded(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Put together the run-time parameter `name` from a folder's tensors, by the engines' rules."""
    match = re.search(r"layers\.(\d+)\.(?:\w+\.)?(\w+_proj)\.(\w+)$", name)
    assert match is not None
    layer, linear, part = match.groups()
    whole = f"{cases.L}.{layer}.attention.wqkv.{part}"
    parts = [f"{cases.L}.{layer}.{DISK[one]}.{part}" for one in FUSED[linear]]
    found = [tensors[whole]] if linear == "qkv_proj" and whole in tensors else [tensors[key] for key in parts]
    if part == "g_idx":
        assert all(torch.equal(one, found[0]) for one in found)
        return found[0]
    joined = torch.cat(found, dim=0 if part == "weight" else 1)
    return joined.to(torch.bfloat16) if joined.is_floating_point() else joined


@pytest.mark.parametrize("variant", cases.VARIANTS)
@pytest.mark.parametrize("profile", ["vllm-omni", "sglang-omni"])
def test_parameters_are_those_the_engine_loaded(
    tiny_folder: Path, tmp_path: Path, profile: profiles.Profile, variant: str
) -> None:
    probe = cases.write_probe(tiny_folder, tmp_path / "probe", variant)
    notes = export_checkpoint(probe, tmp_path / "out", profile)
    golden = GOLDEN[RELEASES[profile]][variant]
    tensors = load_file(tmp_path / "out" / SINGLE)
    for name, expected in golden["params"].items():
        content = loaded(name, tensors).contiguous().view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(content).hexdigest()[:16] == expected, name
    assert golden["unfilled"] == 0
    assert [key for key in golden["skipped"] if not key.startswith("audio_decoder.")] == []
    assert len(golden["dense"]) == 4 and sum(golden["packed"].values()) == 12
    if profile == "vllm-omni":
        newer = GOLDEN["vllm and vllm-omni 0.30.0"][variant]
        assert ("refused" in newer) == ("below 0.30" in notes[0]) == (variant == "act_order")
        assert all(key.endswith(".g_idx") for key in newer.get("skipped", []))


@pytest.mark.parametrize("profile", ["vllm-omni", "sglang-omni"])
@pytest.mark.parametrize("name", cases.REAL_RECIPES)
def test_real_size(profile: profiles.Profile, name: str) -> None:
    """The engine leaves dense exactly what the plan keeps, and the patterns written say so by plain regex matching."""
    plan = cases.real_plan(name)
    made = engine_config(profile, S2Config.from_json(s2_pro_config()), cases.planned_packings(plan))  # type: ignore[arg-type]
    golden = GOLDEN[RELEASES[profile]][name]
    kept = [module for module in plan.dense_linears if not module.startswith("audio_decoder.")]
    assert len(golden["dense"]) == len(kept)
    assert sum(golden["packed"].values()) == 4 * 36 - len(kept)
    assert [key for key in golden["skipped"] if not key.startswith("audio_decoder.")] == []
    if profile == "vllm-omni":
        off = [pattern[2:] for pattern in made["dynamic"] if pattern.startswith("-:")]
        names = [f"model.layers.{n}.{m}" for n in range(36) for m in
                 ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")]  # fmt: skip
        assert sorted(n for n in names if any(re.match(p, n) for p in off)) == sorted(golden["dense"])
        assert made["desc_act"] == ("refused" in GOLDEN["vllm and vllm-omni 0.30.0"][name])


def test_split_is_exact(tiny_quantized: Path, tmp_path: Path) -> None:
    export_checkpoint(tiny_quantized, tmp_path / "out", "vllm-omni")
    tensors, source = load_file(tmp_path / "out" / SINGLE), open_checkpoint(tiny_quantized)
    layer = WQKV.removesuffix(".attention.wqkv")
    parts = []
    for letter in "qkv":
        name = f"{layer}.self_attn.{letter}_proj"
        packed = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        parts.append(unpack(packed, bits=4, group_size=32).dequantize())
    assert torch.equal(torch.cat(parts), source.dense(WQKV, dtype=torch.float32))
    config = read_json(tmp_path / "out" / "config.json")
    assert config["quantization_config"] == read_json(tmp_path / "out" / "quantize_config.json")


def test_what_is_lost_in_the_split_is_found(
    tiny_quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lossy(profiles.ShardWriter):
        def add(self, name: str, tensor: torch.Tensor) -> None:
            super().add(name, tensor ^ 1 if name.endswith("layers.0.self_attn.k_proj.qweight") else tensor)

    monkeypatch.setattr(profiles, "ShardWriter", Lossy)
    with pytest.raises(VerificationError) as error:
        export_checkpoint(tiny_quantized, tmp_path / "out", "vllm-omni")
    assert error.value.faults == [f"{WQKV}: the exported weight differs"]


def test_refusals_name_every_offender(tiny_folder: Path, tmp_path: Path) -> None:
    w1, w3 = (f"{cases.L}.{{}}.feed_forward.{w}" for w in ("w1", "w3"))
    others = {w1.format(0): (8, 32), w3.format(1): None, "audio_decoder.layers.0.attention.wo": (4, 32)}
    others |= {f"{cases.L}.0.attention.wo": (2, 32), f"{cases.L}.1.attention.wo": (4, 16)}
    probe = cases.write_probe(tiny_folder, tmp_path / "p", "act_order", others, shuffled=(w1.format(3),))
    for profile in ("vllm-omni", "sglang-omni"):
        with pytest.raises(UserError) as error:
            export_checkpoint(probe, tmp_path / "out", profile)  # type: ignore[arg-type]
        for said in ("8 bits in groups of 32, 4 in", "one is packed, the other is not", "g_idx", "Fast AR",
                     "has 2 bits", "groups of 16"):  # fmt: skip
            assert said in error.value.got
        with pytest.raises(UserError, match="nothing in this checkpoint is quantized"):
            export_checkpoint(tiny_folder, tmp_path / "out", profile)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
