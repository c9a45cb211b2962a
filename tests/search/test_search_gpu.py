"""On a GPU: the damage of a linear is that of whole models there, too, and a resumed run ends with the same figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from search_cases import BLOCKS, measure, spoken, whole_model_damage

from s2quant.files import read_json
from s2quant.model import module_name
from s2quant.packing import unpack
from s2quant.runtime.load import load_model

pytestmark = pytest.mark.gpu


def test_damage_on_a_gpu(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    measure(tiny_folder, out, device="cuda")
    unit = f"{BLOCKS}.1.feed_forward.w1+w3"
    baseline, model = (load_model(tiny_folder, "cuda", torch.float32) for _ in range(2))
    tensors = load_file(out / "candidates" / f"{unit}@4.safetensors", device="cuda")
    row = next(row for row in read_json(out / "sensitivity.json")["units"] if row["name"] == unit)
    for name in row["modules"]:
        parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        weight = unpack(parts, 4, 32).dequantize(torch.float32)
        model.get_submodule(module_name(name)).weight = torch.nn.Parameter(weight, requires_grad=False)
    expected = whole_model_damage(baseline, model, spoken(out, tiny_folder))
    found = next(one for one in row["candidates"] if one["bits"] == 4)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_resumed_on_a_gpu(tiny_folder: Path, tmp_path: Path) -> None:
    measure(tiny_folder, tmp_path / "whole", device="cuda")

    def report(phase: str, done: int, total: int) -> None:
        if phase.startswith("text_model") and done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tiny_folder, tmp_path / "run", device="cuda", report=report)
    assert measure(tiny_folder, tmp_path / "run", device="cuda", resume=True) == read_json(
        tmp_path / "whole" / "sensitivity.json"
    )
