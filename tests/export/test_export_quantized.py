"""The whole job at the tiny size: what stands in the folder, and that verification finds what is changed in it."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folder_cases import (
    NORM,
    SINGLE,
    W2,
    WQKV,
    change_json,
    change_tensors,
    link_copy,
    listing,
    replace_bytes,
)
from safetensors.torch import load_file

from s2quant.calibrate.sequences import load_set
from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.reader import open_checkpoint
from s2quant.codec import CodecConfig, random_codec_state
from s2quant.errors import UserError, VerificationError
from s2quant.export import following
from s2quant.export import quantized as quantized_module
from s2quant.export.card import LICENSE_NOTICE
from s2quant.export.config_files import quantization_config
from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint
from s2quant.export.random import s2_pro_config, tiny_config
from s2quant.export.verify import verify_quantized
from s2quant.files import read_json, sha256_file
from s2quant.quantize.plan import Plan, make_plan
from s2quant.recipe import load_recipe
from s2quant.records import folder_hashes

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "recipes" / "tiny-w4a16.yaml"
KEPT = [
    "text_model.model.layers.1.feed_forward.w2",
    "text_model.model.layers.3.attention.wo",
    "text_model.model.layers.3.feed_forward.w2",
]
CARRIED = ("codec.pth", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(load_recipe(RECIPE), S2Config.from_json(tiny_config()))


def test_what_stands_in_the_folder(tiny_quantized: Path, tiny_folder: Path) -> None:
    assert listing(tiny_quantized) == {
        *CARRIED,
        "README.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
        "quantize_config.json",
        "s2quant",
        "s2quant/calibration.safetensors",
        "s2quant/recipe.yaml",
        "s2quant/records.json",
    }
    assert {p.name for p in tiny_folder.parent.iterdir()} == {"bf16", "w4a16"}  # OUT.partial is gone
    for name in CARRIED:
        assert (tiny_quantized / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert (tiny_quantized / "s2quant" / "recipe.yaml").read_bytes() == RECIPE.read_bytes()


def test_tensors_are_planned_ones_and_the_rest_is_unchanged(
    tiny_quantized: Path, tiny_folder: Path, plan: Plan
) -> None:
    before, after = load_file(tiny_folder / SINGLE), load_file(tiny_quantized / SINGLE)
    assert len(after) == plan.num_tensors == len(before) + 3 * 17
    assert sum(tensor.nbytes for tensor in after.values()) == plan.num_bytes
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module not in plan.quantized:
            assert torch.equal(after[name], tensor), name
            continue
        rows, columns = tensor.shape
        shapes = {p: tuple(after[f"{module}.{p}"].shape) for p in ("qweight", "qzeros", "scales", "g_idx")}
        assert shapes == {
            "qweight": (columns // 8, rows),
            "qzeros": (columns // 32, rows // 8),
            "scales": (columns // 32, rows),
            "g_idx": (columns,),
        }
        assert bool((after[f"{module}.qzeros"] == 0x77777777).all())
        assert after[f"{module}.scales"].dtype == torch.float16
        weight = open_checkpoint(tiny_quantized).dense(module, dtype=torch.float32)
        error = (weight - tensor.float()).norm() / tensor.float().norm()
        assert 0.01 < error < 0.2, module


def test_config_keeps_all_fields_first_and_unchanged(tiny_quantized: Path) -> None:
    config = read_json(tiny_quantized / "config.json")
    assert list(config)[:-1] == list(tiny_config())
    assert list(config)[-1] == "quantization_config"
    assert {key: value for key, value in config.items() if key != "quantization_config"} == tiny_config()
    quantization = read_json(tiny_quantized / "quantize_config.json")
    assert config["quantization_config"] == quantization
    facts = {"bits": 4, "group_size": 32, "desc_act": True, "sym": True, "lm_head": False, "quant_method": "gptq"}
    facts |= {"checkpoint_format": "gptq", "format": "gptq", "pack_dtype": "int32"}
    assert quantization.items() >= facts.items()
    assert quantization["meta"]["damp_percent"] == 0.05


def test_dynamic_patterns_name_every_kept_linear_and_no_other(tiny_quantized: Path) -> None:
    dynamic = read_json(tiny_quantized / "quantize_config.json")["dynamic"]
    checkpoint = open_checkpoint(tiny_quantized)
    linears = [module for module in checkpoint.modules.values() if module.kind == "linear"]
    assert {module.name for module in linears if module.bits is None} >= set(KEPT)
    for module in linears:
        matching = [pattern for pattern in dynamic if re.match(pattern[2:], module.name)]
        assert matching == ([f"-:^{re.escape(module.name)}$"] if module.bits is None else []), module.name
        assert not [pattern for pattern in dynamic if re.match(pattern[2:], f"{module.name}0")]
    assert len(dynamic) == 3 + 11


def test_gptqmodel_reads_the_settings(tiny_quantized: Path) -> None:
    gptqmodel = pytest.importorskip("gptqmodel")
    settings = gptqmodel.QuantizeConfig.from_pretrained(str(tiny_quantized))
    assert (settings.bits, settings.group_size, settings.desc_act, settings.sym) == (4, 32, True, True)
    for name in KEPT:
        assert settings.dynamic_get(layer_name=name) is False
    assert settings.dynamic_get(layer_name=WQKV) is not False


def test_settings_of_single_linears_are_in_dynamic(tmp_path: Path) -> None:
    rules = [
        {"quantize": "**.wo", "bits": 8, "group_size": 64},
        {"quantize": "text_model.model.layers.*.feed_forward.w2", "method": "rtn"},
        {"quantize": "text_model.model.layers.**.{wqkv,w1,w3}", "damp_percent": 0.1},
        {"keep": "audio_decoder.**"},
    ]
    recipe = {"name": "mixed", "rules": rules, "calibration": {"source": "x.jsonl"}}
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    plan = make_plan(load_recipe(tmp_path / "mixed.yaml"), S2Config.from_json(tiny_config()))
    quantization = quantization_config(plan)
    assert (quantization["bits"], quantization["group_size"], quantization["desc_act"]) == (4, 32, True)
    wo = {key: value for key, value in quantization["dynamic"].items() if key.startswith("+:")}
    assert wo == {
        f"+:^{re.escape(name)}$": {"bits": 8, "group_size": 64} for name in plan.quantized if name.endswith("wo")
    }
    assert len(wo) == 6


def test_act_order_is_said_even_if_most_linears_have_none(tmp_path: Path) -> None:
    """A reader that believes desc_act false does not read g_idx, and gets every weight wrong."""
    rules = [{"quantize": KEPT[1]}, {"quantize": "**.{wqkv,wo,w1,w2,w3}", "method": "rtn"}, {"keep": "**"}]
    recipe = {"name": "mostly-rtn", "rules": rules, "calibration": {"source": "x.jsonl"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    plan = make_plan(load_recipe(tmp_path / "r.yaml"), S2Config.from_json(tiny_config()))
    assert quantization_config(plan)["desc_act"] is True


def test_release_settings_at_the_real_size() -> None:
    plan = make_plan(load_recipe(REPOSITORY / "recipes" / "s2-pro-w4a16.yaml"), S2Config.from_json(s2_pro_config()))
    quantization = quantization_config(plan, [{"solver": "s2quant"}, {"solver": None}])
    assert [maker.partition(":")[0] for maker in quantization["meta"]["quantizer"]] == ["s2quant"]
    both = quantization_config(plan, [{"solver": "s2quant"}, {"solver": "gptqmodel"}])["meta"]["quantizer"]
    assert [maker.partition(":")[0] for maker in both] == ["s2quant", "gptqmodel"]
    assert len(quantization["dynamic"]) == 9 + 21
    assert "-:^text_model\\.model\\.layers\\.34\\.attention\\.wo$" in quantization["dynamic"]
    assert not re.match(
        "^text_model\\.model\\.layers\\.1\\.feed_forward\\.w2$", "text_model.model.layers.10.feed_forward.w2"
    )


def test_manifest(tiny_quantized: Path, tiny_folder: Path, plan: Plan) -> None:
    record = read_json(tiny_quantized / "manifest.json")
    assert record["manifest_version"] == 1
    assert record["stage"] == "quantize"
    assert record["inputs"]["model"]["sha256"] == folder_hashes(tiny_folder)
    assert record["inputs"]["recipe"] == {"name": "tiny-w4a16", "sha256": sha256_file(RECIPE)}
    facts = record["inputs"]["calibration"]
    assert facts["num_sequences"] == 24
    assert 0 < facts["num_frames"] < facts["num_positions"] <= 24 * 256
    assert (record["num_quantized"], record["num_tensors"]) == (17, plan.num_tensors)
    assert (record["tensor_bytes"], record["seed"]) == (plan.num_bytes, 0)
    assert record["device"].startswith("cpu")
    assert record["versions"]["gptqmodel"]
    assert record["files_sha256"] == folder_hashes(tiny_quantized)


def test_model_card(tiny_quantized: Path, plan: Plan) -> None:
    card = (tiny_quantized / "README.md").read_text("utf-8")
    _, front, body = card.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["license"] == "other"
    assert data["license_name"] == "fish-audio-research-license"
    assert (data["base_model"], data["base_model_relation"]) == ("fishaudio/s2-pro", "quantized")
    assert data["pipeline_tag"] == "text-to-speech"
    assert {"gptq", "4-bit", "s2quant"} <= set(data["tags"])
    assert LICENSE_NOTICE in body
    assert "Fish Audio Research License" in LICENSE_NOTICE
    assert f"17 of 31 linears; 107 tensors, {plan.num_bytes:,} bytes" in body
    assert RECIPE.read_text("utf-8") in body
    assert sha256_file(RECIPE) in body
    for name in KEPT:
        assert f"`{name}`" in body
    assert "None" not in body
    assert "nan" not in body


def test_records_are_those_of_the_folder(tiny_quantized: Path, plan: Plan) -> None:
    records = read_json(tiny_quantized / "s2quant" / "records.json")["modules"]
    assert sorted(record["module"] for record in records) == sorted(plan.quantized)
    assert {record["method"] for record in records} == {"gptq"}
    assert {record["fallback"] for record in records} == {None}


# ---- verification ---------------------------------------------------------------------------------------------------


def nibble(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{WQKV}.qweight"][3, 7] ^= 1 << 12


def scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{W2}.scales"].view(torch.int16)[1, 2] += 1


def swapped(tensors: dict[str, torch.Tensor]) -> None:
    index = tensors[f"{WQKV}.g_idx"]
    first, second = 0, int((index != index[0]).nonzero()[0])
    index[first], index[second] = index[second].item(), index[first].item()


def no_grouping(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{WQKV}.g_idx"][:] = 0


def asymmetric(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{WQKV}.qzeros"][0, 0] += 1


def norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM][5] += 0.5


def gone(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NORM]


def dense_again(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{W2}.{part}"]
    tensors[f"{W2}.weight"] = torch.zeros(128, 192, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (nibble, [f"{WQKV}: quantized weight differs"]),
        (scale, [f"{W2}: quantized weight differs"]),
        (swapped, [f"{WQKV}: quantized weight differs"]),
        (no_grouping, [f"{WQKV}:", "groups do not have 32 inputs"]),
        (asymmetric, [f"{WQKV}: stored zero points 7, 8"]),
        (norm, ["text_model.model.norm: weight differs from the source's"]),
        (gone, [f"{NORM} is missing"]),
        (dense_again, [f"{W2}: not quantized, but there is a record", "104 tensors, 107 planned", "planned 4, 32"]),
        (lambda tensors: (nibble(tensors), scale(tensors)), [f"{WQKV}: quant", f"{W2}: quant", ": 2 fault(s)"]),
    ],
)
def test_verification_finds_changed_tensors(
    tiny_quantized: Path, tiny_folder: Path, tmp_path: Path, plan: Plan,
    change: Callable[[dict[str, torch.Tensor]], None], fragments: list[str],
) -> None:  # fmt: skip
    folder = link_copy(tiny_quantized, tmp_path / "copy")
    records = read_json(folder / "s2quant" / "records.json")["modules"]
    verify_quantized(folder, tiny_folder, plan, records)
    change_tensors(folder, change)
    with pytest.raises(VerificationError) as error:
        verify_quantized(folder, tiny_folder, plan, records)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda f: replace_bytes(f / "codec.pth", (f / "codec.pth").read_bytes()[:-1] + b"?"), "codec.pth differs"),
        (lambda f: (f / "codec.pth").unlink(), "codec.pth is missing"),
        (lambda f: replace_bytes(f / "tokenizer.json", b"{}"), "tokenizer.json differs"),
        (lambda f: change_json(f, lambda c: c.update(extra=1)), "config.json: fields differ"),
        (lambda f: change_json(f, lambda c: c["quantization_config"].update(bits=8)), "is not the object of quantize_"),
        (lambda f: change_json(f, lambda c: c.pop("quantization_config")), "is not the object of quantize_config.json"),
        (lambda f: (f / "quantize_config.json").unlink(), "quantize_config.json: No such file"),
        (lambda f: (f / SINGLE).unlink(), "neither model.safetensors.index.json nor model.safetensors"),
    ],
)
def test_verification_finds_changed_files(
    tiny_quantized: Path, tiny_folder: Path, tmp_path: Path, plan: Plan, change: Callable[[Path], None], fragment: str
) -> None:
    folder = link_copy(tiny_quantized, tmp_path / "copy")
    change(folder)
    records = read_json(tiny_quantized / "s2quant" / "records.json")["modules"]
    with pytest.raises(VerificationError) as error:
        verify_quantized(folder, tiny_folder, plan, records)
    assert fragment in str(error.value)


def test_verification_finds_missing_records(tiny_quantized: Path, tiny_folder: Path, plan: Plan) -> None:
    records = read_json(tiny_quantized / "s2quant" / "records.json")["modules"]
    with pytest.raises(VerificationError, match="records of 16 modules, 17 planned"):
        verify_quantized(tiny_quantized, tiny_folder, plan, records[:-1])


# ---- runs that end badly --------------------------------------------------------------------------------------------


def options(tiny_folder: Path, tmp_path: Path, **more: Any) -> QuantizeOptions:
    return QuantizeOptions(recipe=RECIPE, model=tiny_folder, out=tmp_path / "out", num_sequences=2, **more)


def test_folder_that_does_not_verify_gets_no_name(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong between store and disk is found; afterwards the run goes on from what is finished."""

    class Lossy(following.StreamedShards):
        def add(self, name: str, tensor: torch.Tensor) -> None:
            super().add(name, tensor.bitwise_xor(16) if name == f"{WQKV}.qweight" else tensor)

    with monkeypatch.context() as patch:
        patch.setattr(following, "StreamedShards", Lossy)
        with pytest.raises(VerificationError, match="quantized weight differs"):
            quantize_checkpoint(options(tiny_folder, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    phases: list[str] = []
    quantize_checkpoint(options(tiny_folder, tmp_path, resume=True), lambda phase, done, total: phases.append(phase))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "calibration speech" not in phases


def test_files_are_written_beside_the_stages(tiny_folder: Path, tmp_path: Path) -> None:
    sizes: list[int] = []

    def report(phase: str, done: int, total: int) -> None:
        if phase == "text_model.model.layers.1":  # there are more, which cannot be finished before this returns
            until = time.monotonic() + 30
            while not sizes and time.monotonic() < until:
                files = (tmp_path / "out.partial").glob(".files.partial-*/*.safetensors")
                sizes.extend(path.stat().st_size for path in files)
                time.sleep(0.02)

    quantize_checkpoint(options(tiny_folder, tmp_path), report)
    assert sizes
    record = read_json(tmp_path / "out" / "manifest.json")
    assert record["files_sha256"] == folder_hashes(tmp_path / "out")
    assert list(record["files_sha256"]) == sorted(record["files_sha256"])


@pytest.mark.parametrize("broken", ["add", "carry_files"])
def test_a_disk_that_fails_beside_the_stages_is_told_and_loses_none(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(following if broken == "carry_files" else following.StreamedShards, broken, full)
        with pytest.raises(UserError, match=r"writing .*out failed: No space left on device"):
            quantize_checkpoint(options(tiny_folder, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not list((tmp_path / "out.partial").glob(".*"))
    assert len(list((tmp_path / "out.partial" / "stages").iterdir())) == 4
    quantize_checkpoint(options(tiny_folder, tmp_path, resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_is_stopped_stops_writing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(phase: str, done: int, total: int) -> None:
        if phase.startswith("text_model"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(options(tiny_folder, tmp_path), stopped)
    assert not list((tmp_path / "out.partial").glob(".*")) and (tmp_path / "out.partial" / "run.json").exists()
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_input_that_fails_before_anything_is_finished_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    model = link_copy(tiny_folder, tmp_path / "model")
    change_tensors(model, lambda tensors: tensors[NORM].fill_(float("nan")))
    with pytest.raises(UserError, match=r"text_model\.model\.norm has 128 NaN"):
        quantize_checkpoint(options(model, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_gptqmodel_that_cannot_be_used_is_said_before_any_speech(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, phases = importlib.metadata.version, []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "7.7.0" if name == "gptqmodel" else version(name))
    with pytest.raises(UserError, match=r"gptqmodel 7.7.0\nexpected: gptqmodel 7.6"):
        quantize_checkpoint(options(tiny_folder, tmp_path), lambda phase, done, total: phases.append(phase))
    assert phases == ["hashing the model"] and list(tmp_path.iterdir()) == []


def test_what_takes_seconds_once_is_done_before_any_speech(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels for the recipe's settings; a run that is stopped there has spoken nothing."""
    asked: list[int] = []

    def stopped(settings: Any, device: torch.device) -> None:
        asked.extend(one.group_size for one in settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(quantized_module, "warm_up", stopped)
    recipe = REPOSITORY / "recipes" / "tiny-w4a16.yaml"
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(QuantizeOptions(recipe=recipe, model=tiny_folder, out=tmp_path / "out"))
    assert set(asked) == {32} and len(asked) == 17
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_finds_nothing_speaks_while_the_model_is_hashed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, waited = threading.Event(), []

    def when_begun(folder: Path) -> dict[str, str]:
        if folder == tiny_folder:
            waited.append(begun.wait(60))
        return folder_hashes(folder)

    def report(phase: str, done: int, total: int) -> None:
        if phase == "calibration speech":
            begun.set()

    monkeypatch.setattr(quantized_module, "folder_hashes", when_begun)
    quantize_checkpoint(options(tiny_folder, tmp_path), report)
    assert waited == [True]
    assert read_json(tmp_path / "out" / "manifest.json")["inputs"]["model"]["sha256"] == folder_hashes(tiny_folder)


def test_calibration_draws_no_code_that_the_codec_lacks(tiny_folder: Path, tmp_path: Path) -> None:
    small = CodecConfig(**vars(CodecConfig.tiny()) | {"residual_size": 32})
    model = link_copy(tiny_folder, tmp_path / "model")
    (model / "codec.pth").unlink()
    torch.save(random_codec_state(small, 0), model / "codec.pth")
    stored = tmp_path / "calibration.safetensors"
    quantize_checkpoint(options(model, tmp_path, calibration=stored))
    codes = torch.cat([sequence[2:].flatten() for sequence in load_set(stored, 10).sequences])
    assert 16 < codes.max() < 32


def test_calibration_set_is_made_once_and_used_again(tiny_folder: Path, tmp_path: Path) -> None:
    stored = tmp_path / "sets" / "calibration.safetensors"
    quantize_checkpoint(options(tiny_folder, tmp_path, calibration=stored))
    first = folder_hashes(tmp_path / "out")
    bytes_of_set = stored.read_bytes()
    phases: list[str] = []
    base = options(tiny_folder, tmp_path, calibration=stored)
    quantize_checkpoint(
        replace(base, out=tmp_path / "again"),
        lambda phase, done, total: phases.append(phase),
    )
    assert "calibration speech" not in phases
    second = folder_hashes(tmp_path / "again")
    assert first[SINGLE] == second[SINGLE]
    assert stored.read_bytes() == bytes_of_set
    changed = tmp_path / "r.yaml"
    text = RECIPE.read_text("utf-8").replace("max_frames: 96", "max_frames: 95")
    changed.write_text(text.replace("calibration/tiny", f"{RECIPE.parent}/calibration/tiny"), "utf-8")
    with pytest.raises(UserError, match="was made from other lines, settings or weights"):
        quantize_checkpoint(replace(base, recipe=changed, out=tmp_path / "x"))
    assert not (tmp_path / "x.partial").exists()


def test_shards_of_the_output(tiny_folder: Path, tiny_quantized: Path, tmp_path: Path) -> None:
    quantize_checkpoint(options(tiny_folder, tmp_path, max_shard_bytes=5_000_000))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text("utf-8"))
    before = load_file(tiny_quantized / SINGLE)
    assert set(index["weight_map"]) == set(before)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    parts = [f"{WQKV}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]
    position = list(index["weight_map"]).index(parts[0])
    assert list(index["weight_map"])[position : position + 4] == parts
