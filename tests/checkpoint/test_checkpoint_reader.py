"""The strict reader; folders are made by hand with safetensors' own writer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folder_cases import (
    INDEX,
    NORM,
    SINGLE,
    W2,
    WQKV,
    change_json,
    change_tensors,
    link_copy,
    replace_bytes,
    shard,
    to_v2,
)
from safetensors.torch import load_file, save_file

from s2quant.checkpoint.reader import open_checkpoint, scan
from s2quant.errors import UserError
from s2quant.packing import QuantizedWeight


@pytest.fixture
def dense(tiny_folder: Path, tmp_path: Path) -> Path:
    return link_copy(tiny_folder, tmp_path / "dense")


@pytest.fixture
def packed(tiny_quantized: Path, tmp_path: Path) -> Path:
    return link_copy(tiny_quantized, tmp_path / "packed")


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        open_checkpoint(folder)
    return str(error.value)


def test_every_tensor_is_that_of_safetensors(tiny_folder: Path) -> None:
    checkpoint, tensors = open_checkpoint(tiny_folder), load_file(tiny_folder / SINGLE)
    assert set(checkpoint.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
        assert checkpoint.entries[name].num_bytes == tensor.nbytes
    assert not checkpoint.is_quantized
    assert sum(module.num_bytes for module in checkpoint.modules.values()) == sum(t.nbytes for t in tensors.values())


def test_shards_with_an_index_are_equal_to_one_file(dense: Path, packed: Path, tiny_folder: Path) -> None:
    for folder in (dense, packed):
        whole = open_checkpoint(folder)
        values = {name: whole.tensor(name) for name in whole.entries}
        shard(folder)
        cut = open_checkpoint(folder)
        assert cut.modules == whole.modules
        assert list(cut.modules) == list(whole.modules)
        assert {entry.file for entry in cut.entries.values()} == {
            f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
        }
        for name, value in values.items():
            assert torch.equal(cut.tensor(name), value)


def test_missing_left_over_misshapen_and_mistyped_in_one_message(dense: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[NORM]
        tensors["text_model.model.layers.9.ffn_norm.weight"] = torch.zeros(4)
        tensors[f"{W2}.weight"] = tensors[f"{W2}.weight"].T.contiguous()
        tensors[f"{WQKV}.weight"] = tensors[f"{WQKV}.weight"].to(torch.int8)

    change_tensors(dense, spoil)
    message = refusal(dense)
    assert f"{NORM} is missing" in message
    assert "text_model.model.layers.9.ffn_norm.weight is left over" in message
    assert f"{W2}.weight has shape [192, 128], not [128, 192]" in message
    assert f"{WQKV}.weight has dtype I8, not one of ['BF16', 'F16', 'F32']" in message
    assert len(scan(dense).faults) == 4


def test_index_that_names_a_missing_shard(dense: Path) -> None:
    weight_map = shard(dense)
    (dense / "model-00002-of-00003.safetensors").unlink()
    faults = scan(dense).faults
    assert faults[0] == "shard model-00002-of-00003.safetensors is missing"
    lost = [name for name, file in weight_map.items() if file.startswith("model-00002")]
    assert sorted(faults[1:]) == sorted(f"{name} is missing" for name in lost)
    assert "shard model-00002-of-00003.safetensors is missing" in refusal(dense)


def test_key_in_a_shard_but_not_in_the_index_and_the_reverse(dense: Path) -> None:
    shard(dense)

    def spoil(index: dict[str, dict[str, str]]) -> None:
        del index["weight_map"][NORM]
        index["weight_map"]["no.such.weight"] = "model-00001-of-00003.safetensors"

    file = {entry.file for name, entry in open_checkpoint(dense).entries.items() if name == NORM}.pop()
    change_json(dense, spoil, INDEX)
    assert sorted(scan(dense).faults) == [
        "no.such.weight is in the index but not in model-00001-of-00003.safetensors",
        f"{NORM} is in {file} but not in the index",
    ]


def test_key_in_another_shard_than_the_index_says(dense: Path) -> None:
    weight_map = shard(dense)
    other = next(file for file in sorted(set(weight_map.values())) if file != weight_map[NORM])
    change_json(dense, lambda index: index["weight_map"].update({NORM: other}), INDEX)
    assert scan(dense).faults == [f"{NORM} is in {weight_map[NORM]}, but the index puts it in {other}"]


def test_key_in_two_shards(dense: Path) -> None:
    weight_map = shard(dense)
    other = next(file for file in sorted(set(weight_map.values())) if file != weight_map[NORM])
    change_tensors(dense, lambda tensors: tensors.update({NORM: torch.zeros(128, dtype=torch.bfloat16)}), other)
    first, second = sorted((weight_map[NORM], other))
    assert f"{NORM} is in {first} and in {second}" in refusal(dense)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}', b"\xff", b"{}"])
def test_index_that_is_no_index(dense: Path, content: bytes) -> None:
    replace_bytes(dense / INDEX, content)
    assert INDEX in refusal(dense)


def test_index_may_not_leave_the_folder(dense: Path) -> None:
    shard(dense, 1)
    (dense / "model-00001-of-00001.safetensors").rename(dense.parent / "elsewhere.safetensors")
    change_json(dense, lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], "../elsewhere.safetensors")), INDEX)
    assert "shard ../elsewhere.safetensors is missing" in refusal(dense)


def test_modules_are_told_by_their_keys(packed: Path) -> None:
    change_json(packed, lambda config: config.pop("quantization_config"))
    (packed / "quantize_config.json").unlink()
    checkpoint = open_checkpoint(packed)
    assert checkpoint.is_quantized
    quantized = [m for m in checkpoint.modules.values() if m.bits is not None]
    assert {(m.bits, m.group_size, m.kind, m.dtype) for m in quantized} == {(4, 32, "linear", "F16")}
    assert len(quantized) == 17
    assert isinstance(checkpoint.weight(W2), QuantizedWeight)
    kept = "text_model.model.layers.1.feed_forward.w2"
    assert checkpoint.modules[kept].bits is None
    assert isinstance(checkpoint.weight(kept), torch.Tensor)


def test_a_dense_folder_whose_config_says_quantized_is_dense(dense: Path) -> None:
    change_json(dense, lambda config: config.update(quantization_config={"bits": 4, "quant_method": "gptq"}))
    assert not open_checkpoint(dense).is_quantized


def test_both_weight_and_qweight(packed: Path) -> None:
    change_tensors(packed, lambda t: t.update({f"{W2}.weight": torch.zeros(128, 192, dtype=torch.bfloat16)}))
    assert f"{W2} has both .weight and ['g_idx', 'qweight', 'qzeros', 'scales']" in refusal(packed)


def test_missing_parts_are_all_named(packed: Path) -> None:
    change_tensors(packed, lambda tensors: [tensors.pop(f"{WQKV}.g_idx"), tensors.pop(f"{W2}.scales")])
    message = refusal(packed)
    assert f"{WQKV} is quantized but lacks .g_idx" in message
    assert f"{W2} is quantized but lacks .scales" in message


def test_packed_embedding(packed: Path) -> None:
    change_tensors(
        packed, lambda t: t.update({"text_model.model.embeddings.qweight": torch.zeros(1, dtype=torch.int32)})
    )
    assert "text_model.model.embeddings is no linear (embedding) but has packed tensors ['qweight']" in refusal(packed)


@pytest.mark.parametrize(
    ("part", "tensor", "fragment"),
    [
        ("qweight", torch.zeros(16, 100, dtype=torch.int32), "qweight has shape [16, 100], not [16, 256]"),
        ("qweight", torch.zeros(15, 256, dtype=torch.int32), "qweight has 15 rows, which is no 2-, 3-, 4- or 8-bit"),
        ("qweight", torch.zeros(20, 256, dtype=torch.int32), "qweight has 20 rows, which is no 2-, 3-, 4- or 8-bit"),
        ("qweight", torch.zeros(4096, dtype=torch.int32), "qweight has shape [4096], not two sizes"),
        ("qweight", torch.zeros(16, 256, dtype=torch.int64), "qweight has dtype I64, not I32"),
        ("scales", torch.zeros((), dtype=torch.float16), "scales has shape [], not two sizes"),
        ("scales", torch.ones(3, 256, dtype=torch.float16), "scales has 3 rows, which does not divide 128 inputs"),
        ("scales", torch.ones(0, 256, dtype=torch.float16), "scales has 0 rows"),
        ("scales", torch.ones(4, 256, dtype=torch.float32), "scales has dtype F32, not F16 or BF16"),
        ("qzeros", torch.zeros(4, 31, dtype=torch.int32), "qzeros has shape [4, 31], not [4, 32]"),
        ("g_idx", torch.zeros(64, dtype=torch.int32), "g_idx has shape [64], not [128]"),
    ],
)
def test_packed_tensors_of_wrong_shape_or_dtype(packed: Path, part: str, tensor: torch.Tensor, fragment: str) -> None:
    change_tensors(packed, lambda tensors: tensors.update({f"{WQKV}.{part}": tensor}))
    assert f"{WQKV}.{fragment}" in refusal(packed)


def test_v2_zeros_and_bf16_scales_read_as_v1(packed: Path, tiny_quantized: Path) -> None:
    v1 = open_checkpoint(tiny_quantized)
    change_tensors(packed, to_v2)
    v2 = open_checkpoint(packed)
    for name, module in v1.modules.items():
        one, two = v1.weight(name), v2.weight(name)
        if module.bits is None:
            assert torch.equal(one, two)
            continue
        assert isinstance(one, QuantizedWeight) and isinstance(two, QuantizedWeight)
        assert v2.modules[name].dtype == "BF16"
        assert two.scales.dtype == torch.bfloat16
        for part in ("codes", "zeros", "g_idx"):
            assert torch.equal(getattr(one, part), getattr(two, part)), (name, part)
        assert torch.equal(one.scales.to(torch.bfloat16), two.scales)
        codes = one.codes.double() - 8
        expected = codes * two.scales.double().T[:, one.g_idx.long()]
        assert torch.equal(two.dequantize(torch.float32).double(), expected)


def test_asymmetric_zeros_are_refused_by_name(packed: Path) -> None:
    change_tensors(packed, lambda tensors: tensors[f"{W2}.qzeros"].view(-1)[3:4].add_(1))
    with pytest.raises(UserError, match=r"layers\.0\.feed_forward\.w2: stored zero points 7, 8"):
        open_checkpoint(packed).weight(W2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(dense: Path, packed: Path, value: float) -> None:
    change_tensors(dense, lambda tensors: tensors[NORM][5:7].fill_(value))
    with pytest.raises(UserError, match=r"text_model\.model\.norm has 2 NaN or infinite weights"):
        open_checkpoint(dense).weight("text_model.model.norm")
    change_tensors(packed, lambda tensors: tensors[f"{W2}.scales"][0, :3].fill_(value))
    with pytest.raises(UserError, match=r"feed_forward\.w2.*\n.*scales: 3 values are not finite"):
        open_checkpoint(packed).weight(W2)


def test_dense_dtypes_are_kept(dense: Path) -> None:
    def mix(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM] = tensors[NORM].float()
        tensors[f"{W2}.weight"] = tensors[f"{W2}.weight"].half()

    change_tensors(dense, mix)
    checkpoint = open_checkpoint(dense)
    assert checkpoint.dense("text_model.model.norm").dtype == torch.float32
    assert checkpoint.dense(W2).dtype == torch.float16
    assert (checkpoint.modules[W2].dtype, checkpoint.modules["text_model.model.norm"].dtype) == ("F16", "F32")
    assert checkpoint.dense(W2, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_pickled_weights_are_not_read(dense: Path) -> None:
    (dense / SINGLE).unlink()
    (dense / "model.pth").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert "model.pth is not read: convert it to safetensors" in refusal(dense)


def test_no_weights_and_no_config_are_one_message(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "config.json: No such file" in message
    assert f"neither {INDEX} nor {SINGLE}" in message


@pytest.mark.parametrize("length", [0, 4, 100, 1_000_000])
def test_truncated_file(dense: Path, length: int) -> None:
    replace_bytes(dense / SINGLE, (dense / SINGLE).read_bytes()[:length])
    assert "shard model.safetensors is truncated or corrupt" in refusal(dense)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", b"\xff" * 64])
def test_file_that_is_no_safetensors(dense: Path, content: bytes) -> None:
    replace_bytes(dense / SINGLE, content)
    assert "shard model.safetensors is truncated or corrupt" in refusal(dense)


def test_extra_bytes_at_the_end(dense: Path) -> None:
    replace_bytes(dense / SINGLE, (dense / SINGLE).read_bytes() + b"tail")
    assert "truncated or corrupt" in refusal(dense)


def test_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(UserError, match="is not a folder"):
            open_checkpoint(path)


def test_long_lists_are_shortened_in_the_message_only(dense: Path) -> None:
    replace_bytes(dense / SINGLE, b"")
    save_file({NORM: ones_norm()}, dense / SINGLE)
    assert len(scan(dense).faults) > 40
    assert "more" in refusal(dense)


def ones_norm() -> torch.Tensor:
    return torch.ones(128, dtype=torch.bfloat16)
