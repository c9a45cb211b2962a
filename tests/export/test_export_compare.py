"""Comparing checkpoints: the same, one number changed, quantized against bf16, and what cannot be compared."""

import json
from pathlib import Path

import pytest
import torch
from folder_cases import W2, WQKV, change_json, change_tensors, link_copy, replace_bytes

from s2quant.checkpoint.reader import open_checkpoint
from s2quant.cli import main
from s2quant.export.compare import compare_folders, relative_error


def test_a_folder_is_the_same_as_itself(tiny_quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tiny_quantized), str(tiny_quantized), "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "the same"


def test_one_number_a_field_and_a_file(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = link_copy(tiny_folder, tmp_path / "other")
    change_tensors(other, lambda tensors: tensors[f"{W2}.weight"].view(-1)[:1].add_(8))
    change_json(other, lambda config: config["text_config"].update(dropout=0.5))
    replace_bytes(other / "chat_template.jinja", b"other")
    assert main(["compare", str(tiny_folder), str(other), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    differ = [module for module in found["modules"] if module["error"] != 0]
    assert [module["name"] for module in differ] == [W2]
    a, b = (open_checkpoint(folder).dense(W2, dtype=torch.float32) for folder in (tiny_folder, other))
    assert differ[0]["error"] == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-5)
    assert found["config"] == [["text_config.dropout", 0.0, 0.5]]
    assert found["files"] == ["chat_template.jinja"]
    assert found["same"] is False


def test_quantized_against_dense(tiny_folder: Path, tiny_quantized: Path) -> None:
    found = compare_folders(tiny_folder, tiny_quantized)
    packed = {name for name, module in open_checkpoint(tiny_quantized).modules.items() if module.bits}
    assert {module.name for module in found.modules if not module.is_same} == packed
    wqkv = next(module for module in found.modules if module.name == WQKV)
    assert wqkv.storage == ("BF16", "4 bit g32")
    assert wqkv.error is not None and 0.01 < wqkv.error < 0.3
    assert found.bits_per_weight[0] == 16 > found.bits_per_weight[1] > 4
    assert found.num_bytes[0] > found.num_bytes[1]
    assert "quantization_config.bits" in {name for name, _, _ in found.config}


def test_chunks_and_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.arange(12.0).reshape(4, 3), torch.ones(4, 3)
    whole = relative_error(a, b)
    monkeypatch.setattr("s2quant.export.compare.ROW_VALUES", 3)
    assert relative_error(a, b) == pytest.approx(whole) == pytest.approx(float((b - a).norm() / a.norm()))
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert relative_error(torch.zeros(2, 2), torch.ones(2, 2)) is None


def test_what_is_no_checkpoint(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tiny_folder), str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
