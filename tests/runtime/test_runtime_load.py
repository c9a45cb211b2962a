"""Loading: a quantized folder is the dequantized one; devices that are not there."""

import pytest
import torch
from torch import nn

from s2quant import load_engine, load_model
from s2quant.checkpoint.reader import open_checkpoint
from s2quant.errors import UserError
from s2quant.model import module_name
from s2quant.packing import QuantizedWeight
from s2quant.runtime.linears import Int4Linear, QuantizedLinear
from s2quant.runtime.load import device_name, parse_device, set_module
from s2quant.runtime.speech import Request

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.fixture(scope="module")
def tokens(engine):
    request = Request(text="Hello there.", seed=1, max_frames=8)
    return engine.spoken_sequence(request, [engine.speak(request).codes])[None]


@torch.no_grad()
def test_a_quantized_folder_is_its_dequantized_weights(quantized_folder, tokens):
    checkpoint = open_checkpoint(quantized_folder)
    model = load_model(checkpoint, dtype=torch.float32, linears="reference")
    dense = load_model(quantized_folder, dtype=torch.float32, linears="reference")
    for name in linears(model):
        disk = next(d for d in checkpoint.modules if module_name(d) == name)
        weight = checkpoint.weight(disk)
        assert isinstance(weight, QuantizedWeight)
        linear = nn.Linear(weight.in_features, weight.out_features, bias=False)
        linear.weight = nn.Parameter(weight.dequantize(torch.float32))
        set_module(dense, name, linear)
    assert not linears(dense) and len(linears(model)) == 4 * 5
    ours, oracle = model(tokens), dense(tokens)
    assert torch.equal(ours.logits, oracle.logits) and torch.equal(ours.fast_logits, oracle.fast_logits)


@torch.no_grad()
def test_a_quantized_folder_is_its_bf16_export(quantized_folder, tokens, tmp_path):
    from s2quant.export.profiles import export_checkpoint

    export_checkpoint(quantized_folder, tmp_path / "dense", "bf16")
    model = load_model(quantized_folder, linears="reference")
    dense = load_model(tmp_path / "dense")
    assert linears(model) and not linears(dense)
    ours, oracle = model(tokens), dense(tokens)
    assert ours.logits.dtype == torch.bfloat16
    assert torch.equal(ours.logits, oracle.logits) and torch.equal(ours.fast_logits, oracle.fast_logits)


@torch.no_grad()
def test_the_choice_of_linears_is_recorded(quantized_folder, tokens):
    auto = load_model(quantized_folder)
    assert {linear.backend for linear in linears(auto).values()} == {"int4"}
    exact = load_model(quantized_folder, dtype=torch.float32)
    assert {linear.backend for linear in linears(exact).values()} == {"reference"}
    reference = load_model(quantized_folder, linears="reference")
    truth = exact(tokens).hidden
    errors = [(model(tokens).hidden.float() - truth).square().mean().sqrt() for model in (auto, reference)]
    assert errors[0] < 1.3 * errors[1] < 0.1  # int4 is as far from float32 as bf16 is


@torch.no_grad()
def test_8_bits_are_as_near_as_bf16_whatever_computes_them(folder_of_8_bits, tokens, monkeypatch):
    truth = load_model(folder_of_8_bits, dtype=torch.float32)(tokens).hidden
    reference = load_model(folder_of_8_bits, linears="reference")(tokens).hidden
    chosen = load_model(folder_of_8_bits)
    assert {linear.backend for linear in linears(chosen).values()} == {"int8" if HAS_AVX512 else "dense"}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    dense = load_model(folder_of_8_bits)
    assert {linear.backend for linear in linears(dense).values()} == {"dense"}
    assert torch.equal(dense(tokens).hidden, reference)
    errors = [(hidden.float() - truth).square().mean().sqrt() for hidden in (chosen(tokens).hidden, reference)]
    assert errors[0] < 1.3 * errors[1] < 0.1


def test_a_model_is_loaded_for_use(tiny_folder):
    model = load_model(tiny_folder, dtype=torch.float32)
    assert not model.training
    assert all(not p.requires_grad and p.dtype == torch.float32 and not p.is_meta for p in model.parameters())


def test_int4_speaks_the_same_alone_and_in_a_batch_of_one(quantized_folder):
    engine = load_engine(quantized_folder, linears="int4")
    assert any(isinstance(module, Int4Linear) for module in engine.model.modules())
    speech = engine.speak(Request(text="Hi.", max_frames=5))
    assert speech.codes.shape[0] == 10 and torch.equal(
        speech.codes, engine.speak(Request(text="Hi.", max_frames=5)).codes
    )


@pytest.mark.parametrize("device", ["xpu9", "gpu", "meta", "mps", "", "cuda:-1", torch.device("meta")], ids=str)
def test_devices_that_are_none(tiny_folder, device):
    with pytest.raises(UserError, match="cpu, cuda or cuda:N"):
        load_model(tiny_folder, device)
    with pytest.raises(UserError, match="cpu, cuda or cuda:N"):
        load_engine(tiny_folder, device)


def test_a_device_that_is_not_there(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"'cuda', but torch sees 0 CUDA devices[\s\S]*use cpu"):
        load_model(tiny_folder, "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="'cuda:2', but torch sees 2"):
        parse_device("cuda:2")


def test_a_dtype_is_torch_s_or_its_name(tiny_folder):
    named, known = load_model(tiny_folder, dtype="float32"), load_model(tiny_folder, dtype=torch.float32)
    assert {p.dtype for p in named.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(named.parameters(), known.parameters(), strict=True))
    assert {p.dtype for p in load_engine(tiny_folder, dtype="bfloat16").model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float8", "torch.float32", "", None, torch.int8], ids=str)
def test_dtypes_that_are_none(tiny_folder, dtype, monkeypatch):
    monkeypatch.setattr("s2quant.runtime.loading.open_checkpoint", lambda path: pytest.fail("read before refused"))
    for load in (load_model, load_engine):
        with pytest.raises(UserError, match=rf"dtype {dtype!r}[\s\S]*one of bfloat16, float32[\s\S]*do: correct"):
            load(tiny_folder, dtype=dtype)


def test_the_cpu_has_a_name():
    assert device_name(parse_device("cpu")).startswith("cpu, ")


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError):
        load_model(tmp_path / "nothing")
