"""`inspect_folder`: what is in a folder, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from folder_cases import INDEX, NORM, SINGLE, W2, WQKV, change_json, change_tensors, link_copy, replace_bytes, shard
from safetensors.torch import load_file

from s2quant.errors import UserError
from s2quant.export.verify import inspect_folder


def test_dense(tiny_folder: Path) -> None:
    found, tensors = inspect_folder(tiny_folder), load_file(tiny_folder / SINGLE)
    assert found.faults == ()
    assert (found.num_quantized, found.num_dense, found.num_tensors) == (0, 31, len(tensors))
    assert found.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert {f"{module.name}.weight": module.num_bytes for module in found.modules} == {
        name: tensor.nbytes for name, tensor in tensors.items()
    }
    assert {module.dtype for module in found.modules} == {"BF16"}


def test_quantized(tiny_quantized: Path) -> None:
    found, tensors = inspect_folder(tiny_quantized), load_file(tiny_quantized / SINGLE)
    assert found.faults == ()
    assert (found.num_quantized, found.num_dense, found.num_tensors) == (17, 14, len(tensors))
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + tensor.nbytes
    assert {module.name: module.num_bytes for module in found.modules} == sizes
    assert found.num_bytes == sum(sizes.values())


def test_json_has_exactly_these_keys(tiny_quantized: Path) -> None:
    table = inspect_folder(tiny_quantized).to_json()
    assert list(table) == ["modules", "quantized", "dense", "tensors", "tensor_bytes", "faults"]
    for module in table["modules"]:
        assert list(module) == ["name", "kind", "dtype", "bits", "group_size", "bytes"]
    by_name = {module["name"]: module for module in table["modules"]}
    assert by_name[WQKV] == {
        "name": WQKV,
        "kind": "linear",
        "dtype": "F16",
        "bits": 4,
        "group_size": 32,
        "bytes": 128 * 256 // 2 + 4 * 256 // 2 + 4 * 256 * 2 + 128 * 4,
    }
    assert by_name["text_model.model.embeddings"].items() >= {"kind": "embedding", "bits": None}.items()
    assert by_name["text_model.model.norm"].items() >= {"kind": "norm", "group_size": None, "bytes": 256}.items()


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (lambda f: replace_bytes(f / SINGLE, (f / SINGLE).read_bytes()[:-100]), "shard model.safetensors is truncated"),
        (lambda f: (f / SINGLE).unlink(), f"neither {INDEX} nor {SINGLE}"),
        (lambda f: change_tensors(f, lambda t: t.pop(NORM)), f"{NORM} is missing"),
        (lambda f: change_tensors(f, lambda t: t[NORM].fill_(float("nan"))), "norm has 128 NaN or infinite weights"),
        (lambda f: change_tensors(f, lambda t: t[f"{W2}.g_idx"].fill_(99)), f"{W2}:"),
        (lambda f: change_tensors(f, lambda t: t[f"{W2}.qzeros"].fill_(0)), f"{W2}: stored zero points 0"),
        (lambda f: replace_bytes(f / "config.json", b"{}"), "model_type is None"),
        (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
        (lambda f: (f / "codec.pth").unlink(), "codec.pth"),
        (lambda f: replace_bytes(f / "codec.pth", b"not a pickle"), "codec.pth"),
        (lambda f: replace_bytes(f / "codec.pth", (f / "codec.pth").read_bytes()[:5000]), "codec.pth"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda f: replace_bytes(f / "tokenizer.json", b"{}"), "tokenizer"),
        (lambda f: replace_bytes(f / "tokenizer.json", b"\xff\xfe"), "tokenizer"),
    ],
)
def test_damaged(tiny_quantized: Path, tmp_path: Path, damage: Callable[[Path], None], fragment: str) -> None:
    folder = link_copy(tiny_quantized, tmp_path / "copy")
    damage(folder)
    faults = inspect_folder(folder).faults
    assert any(fragment in fault for fault in faults), faults


def test_several_faults_are_all_listed(tiny_folder: Path, tmp_path: Path) -> None:
    folder = link_copy(tiny_folder, tmp_path / "copy")
    shard(folder)
    (folder / "model-00001-of-00003.safetensors").unlink()
    (folder / "codec.pth").unlink()
    change_json(
        folder, lambda index: index["weight_map"].update({"x.weight": "model-00002-of-00003.safetensors"}), INDEX
    )
    faults = "\n".join(inspect_folder(folder).faults)
    for fragment in ("shard model-00001", "x.weight is in the index", "codec.pth"):
        assert fragment in faults


def test_headers_only(tiny_folder: Path, tmp_path: Path) -> None:
    folder = link_copy(tiny_folder, tmp_path / "copy")
    change_tensors(folder, lambda tensors: tensors[NORM].fill_(float("nan")))
    assert inspect_folder(folder, values=False).faults == ()
    assert len(inspect_folder(folder).faults) == 1


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        inspect_folder(tmp_path / "absent")
