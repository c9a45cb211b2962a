"""Export profiles: native is the release's layout, bf16 is for engines of the original; both speak the same weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from folder_cases import REPOSITORY, SINGLE, W2, WQKV, change_json, change_tensors, link_copy, replace_bytes, to_v2
from safetensors.torch import load_file

from s2quant.checkpoint.reader import open_checkpoint
from s2quant.errors import UserError, VerificationError
from s2quant.export import profiles
from s2quant.export.profiles import export_checkpoint
from s2quant.export.random import tiny_config
from s2quant.export.verify import inspect_folder
from s2quant.files import read_json
from s2quant.records import folder_hashes
from s2quant.runtime.load import load_model

CARRIED = ("codec.pth", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def bf16(tiny_quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bf16") / "out"
    export_checkpoint(tiny_quantized, out, "bf16")
    return out


@pytest.fixture
def packed(tiny_quantized: Path, tmp_path: Path) -> Path:
    return link_copy(tiny_quantized, tmp_path / "packed")


def test_bf16_has_the_original_names_dtypes_and_config(bf16: Path, tiny_folder: Path, tiny_quantized: Path) -> None:
    exported, original = load_file(bf16 / SINGLE), load_file(tiny_folder / SINGLE)
    assert {n: (t.shape, t.dtype) for n, t in exported.items()} == {n: (t.shape, t.dtype) for n, t in original.items()}
    packed = open_checkpoint(tiny_quantized)
    for name, tensor in exported.items():
        module = packed.modules[name.removesuffix(".weight")]
        if module.bits is None:
            assert torch.equal(tensor, original[name])
            continue
        parts = load_file(tiny_quantized / SINGLE)
        group = parts[f"{module.name}.g_idx"].long()
        words = parts[f"{module.name}.qweight"]
        codes = torch.stack([words >> 4 * j & 15 for j in range(8)], dim=1).reshape(-1, words.shape[1]).T  # [M, K]
        scales = parts[f"{module.name}.scales"].float().T[:, group]
        assert torch.equal(tensor, ((codes - 8) * scales).to(torch.bfloat16)), name
    assert read_json(bf16 / "config.json") == tiny_config()
    assert list(read_json(bf16 / "config.json")) == list(tiny_config())
    assert not (bf16 / "quantize_config.json").exists()
    for name in CARRIED:
        assert (bf16 / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert inspect_folder(bf16).faults == ()
    assert "Fish Audio Research License" in (bf16 / "README.md").read_text("utf-8")


def test_bf16_speaks_the_quantized_weights(bf16: Path, tiny_quantized: Path, tiny_folder: Path) -> None:
    """In bf16 the reference linears round as the export does: the logits are the same bits.

    In float32 they do not round at all, so the logits differ by the rounding only: far less than by quantization.
    """
    config = open_checkpoint(bf16).config
    tokens = torch.randint(0, 400, (1, 11, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 0, 12:] = tokens[:, 1, 12:] + config.semantic_begin_id

    def outputs(folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        model = load_model(folder, dtype=dtype, linears="reference")
        with torch.inference_mode():
            slow = model.slow(tokens)
            return slow.logits.float(), model.fast(slow.hidden[0, 12:], tokens[0, 1:, 12:].T).float()

    for exported, quantized in zip(outputs(bf16, torch.bfloat16), outputs(tiny_quantized, torch.bfloat16), strict=True):
        assert torch.equal(exported, quantized)
    whole = [outputs(folder, torch.float32) for folder in (bf16, tiny_quantized, tiny_folder)]
    for exported, quantized, dense in zip(*whole, strict=True):
        rounding = (exported - quantized).norm() / quantized.norm()
        damage = (dense - quantized).norm() / quantized.norm()
        assert 0 < rounding < 0.01
        assert damage > 10 * rounding


def test_native_of_our_own_is_the_same_file(tiny_quantized: Path, tmp_path: Path) -> None:
    export_checkpoint(tiny_quantized, tmp_path / "out", "native")
    before, after = folder_hashes(tiny_quantized), folder_hashes(tmp_path / "out")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == ["README.md"]
    record = read_json(tmp_path / "out" / "manifest.json")
    assert (record["stage"], record["profile"]) == ("export", "native")
    assert record["inputs"]["model"] == before
    assert record["files_sha256"] == after


@pytest.mark.parametrize("profile", ["native", "bf16", "vllm-omni", "sglang-omni"])
def test_recipe_and_manifest_go_along(tiny_quantized: Path, tmp_path: Path, profile: profiles.Profile) -> None:
    export_checkpoint(tiny_quantized, tmp_path / "out", profile)
    recipe = (REPOSITORY / "recipes" / "tiny-w4a16.yaml").read_text("utf-8")
    assert [path.name for path in (tmp_path / "out" / "s2quant").iterdir()] == ["recipe.yaml"]
    assert (tmp_path / "out" / "s2quant" / "recipe.yaml").read_text("utf-8") == recipe
    record, source = read_json(tmp_path / "out" / "manifest.json"), read_json(tiny_quantized / "manifest.json")
    assert record["source"] == source
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"Recipe `tiny-w4a16` (sha256 {source['inputs']['recipe']['sha256']})" in card
    assert f"```yaml\n{recipe}```\n" in card and "`manifest.json`, under `source`" in card


def test_recipe_of_an_export_of_an_export(tiny_quantized: Path, tmp_path: Path) -> None:
    export_checkpoint(tiny_quantized, tmp_path / "one", "sglang-omni")
    export_checkpoint(tmp_path / "one", tmp_path / "two", "bf16")
    names = ("s2quant/recipe.yaml", "README.md")
    recipe, card = ((tmp_path / "two" / name).read_text("utf-8") for name in names)
    assert f"```yaml\n{recipe}```\n" in card and "Recipe `tiny-w4a16` (sha256" in card


def test_nothing_is_said_of_how_changed_weights_were_made(packed: Path, tmp_path: Path) -> None:
    recipe = packed / "s2quant" / "recipe.yaml"
    text = recipe.read_bytes()
    replace_bytes(recipe, text + b"# edited\n")
    (note,) = export_checkpoint(packed, tmp_path / "edited", "native")
    assert note.startswith("has no recipe, as that of the source is not the one")
    assert read_json(tmp_path / "edited" / "manifest.json")["source"]["stage"] == "quantize"
    replace_bytes(recipe, text)
    change_tensors(packed, to_v2)
    (note,) = export_checkpoint(packed, tmp_path / "changed", "native")
    assert "source has changed since: model.safetensors is not the file that manifest.json has the hash of" in note
    assert read_json(tmp_path / "changed" / "manifest.json")["source"] is None
    for name in ("edited", "changed"):
        assert not (tmp_path / name / "s2quant").exists()
        card = (tmp_path / name / "README.md").read_text("utf-8")
        assert "source has changed since" in card or "It has no recipe" in card
        assert "How it was made" not in card
    (packed / "manifest.json").unlink()
    assert export_checkpoint(packed, tmp_path / "unknown", "native") == []
    assert not (tmp_path / "unknown" / "s2quant").exists()


def test_native_of_v2_zeros_and_bf16_scales(packed: Path, tmp_path: Path) -> None:
    """The format named in the new config is that of the new tensors, or every weight is read off by one step."""
    change_tensors(packed, to_v2)
    for name in ("config.json", "quantize_config.json"):
        change_json(packed, lambda c: c.get("quantization_config", c).update(checkpoint_format="gptq_v2"), name)
    export_checkpoint(packed, tmp_path / "out", "native")
    tensors, before = load_file(tmp_path / "out" / SINGLE), load_file(packed / SINGLE)
    for name, tensor in tensors.items():
        if name.endswith(".qzeros"):
            assert bool((tensor == 0x77777777).all())
        if name.endswith(".scales"):
            exact = torch.equal(before[name].to(torch.float16).to(torch.bfloat16), before[name])
            assert tensor.dtype == (torch.float16 if exact else torch.bfloat16)
            assert torch.equal(tensor.float(), before[name].float())
    quantization = read_json(tmp_path / "out" / "quantize_config.json")
    assert (quantization["checkpoint_format"], quantization["format"]) == ("gptq", "gptq")
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"] == quantization
    source, out = open_checkpoint(packed), open_checkpoint(tmp_path / "out")
    for name in source.modules:
        assert torch.equal(source.dense(name, dtype=torch.float32), out.dense(name, dtype=torch.float32))


def test_native_of_a_folder_without_any_quantization_config(packed: Path, tmp_path: Path, tiny_quantized: Path) -> None:
    change_json(packed, lambda config: config.pop("quantization_config"))
    (packed / "quantize_config.json").unlink()
    export_checkpoint(packed, tmp_path / "out", "native")
    made, known = (
        read_json(tmp_path / "out" / "quantize_config.json"),
        read_json(tiny_quantized / "quantize_config.json"),
    )
    known.pop("meta")
    made.pop("meta")
    assert made == known


def test_native_of_a_folder_with_quantize_config_only(packed: Path, tmp_path: Path, tiny_quantized: Path) -> None:
    change_json(packed, lambda config: config.pop("quantization_config"))
    export_checkpoint(packed, tmp_path / "out", "native")
    assert read_json(tmp_path / "out" / "config.json") == read_json(tiny_quantized / "config.json")


@pytest.mark.parametrize("profile", ["native", "bf16"])
def test_profiles_of_a_dense_folder(tiny_folder: Path, tmp_path: Path, profile: profiles.Profile) -> None:
    export_checkpoint(tiny_folder, tmp_path / "out", profile)
    before, after = folder_hashes(tiny_folder), folder_hashes(tmp_path / "out")
    assert before.items() <= after.items()
    assert set(after) - set(before) == {"README.md"}


def test_what_goes_wrong_while_writing_is_found(
    tiny_quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lossy(profiles.ShardWriter):
        def add(self, name: str, tensor: torch.Tensor) -> None:
            if name == f"{WQKV}.weight":
                tensor = tensor.clone()
                tensor[3, 4] += 0.25
            super().add(name, tensor.T.contiguous().T if name == f"{W2}.weight" else tensor)

    monkeypatch.setattr(profiles, "ShardWriter", Lossy)
    with pytest.raises(VerificationError) as error:
        export_checkpoint(tiny_quantized, tmp_path / "out", "bf16")
    assert error.value.faults == [f"{WQKV}: the exported weight differs"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_lost_while_copying_is_found(
    tiny_quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "carry_files", lambda source, target: [])
    with pytest.raises(VerificationError, match=r"codec\.pth is missing"):
        export_checkpoint(tiny_quantized, tmp_path / "out", "native")
    assert list(tmp_path.iterdir()) == []


def test_refusals(tiny_quantized: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("profile 'gguf'")):
        export_checkpoint(tiny_quantized, tmp_path / "out", "gguf")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="exists already"):
        export_checkpoint(tiny_quantized, packed, "native")
    (packed / "codec.pth").unlink()
    with pytest.raises(UserError, match=r"codec\.pth is missing"):
        export_checkpoint(packed, tmp_path / "out", "native")
    change_tensors(packed, lambda tensors: tensors.pop(f"{W2}.qzeros"))
    with pytest.raises(UserError, match=r"w2 is quantized but lacks \.qzeros"):
        export_checkpoint(packed, tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()
