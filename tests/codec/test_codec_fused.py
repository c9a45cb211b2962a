"""One kernel between two convolutions against the plain codec: in Triton's interpreter here, compiled on a GPU.

Whether triton interprets is decided when it is imported, so the tests of the interpreter run in a process of their own.
"""

import copy
import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from codec_cases import TINY, build_codec, random_codes, uniform
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from runtime_cases import passes_in_the_interpreter

from s2quant.codec import Codec, CodecStream, fused
from s2quant.codec.blocks import CausalTransposedConv
from s2quant.errors import UserError
from s2quant.gpu import kernel_obstacle

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INSIDE else "cuda"


def kernel(test):
    """Mark a test that runs in the interpreter's process, or on a GPU."""
    return test if INSIDE else pytest.mark.gpu(test)


@pytest.mark.skipif(INSIDE, reason="this is the process")
def test_in_the_interpreter():
    passes_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=["short"] if INSIDE else ["short", "tiny"])  # the interpreter is slow
def codec(request):
    return copy.deepcopy(request.getfixturevalue(request.param)).to(DEVICE)


def close(ours, theirs, bound=1e-5):
    assert ours.shape == theirs.shape and torch.isfinite(ours).all()
    wide = theirs.double().cpu()
    assert float((ours.double().cpu() - wide).abs().max()) <= bound * max(1.0, float(wide.abs().max()))


def signal(name, *shape):
    return (4 * uniform(name, shape)).to(DEVICE)


def snake(x, alpha):
    return x + torch.sin(alpha * x) ** 2 / (alpha + 1e-9)


CASES = [
    # batch, channels, columns, past: shorter and longer than the past, one column, several blocks, odd and even rows
    (1, 5, 1, 0), (2, 3, 1, 6), (1, 7, 5, 54), (3, 5, 54, 54), (2, 3, 55, 54), (2, 5, 1024, 18), (1, 3, 2051, 54),
    (2, 2, 3000, 6), (1, 1, 4, 7),
]  # fmt: skip


@kernel
@pytest.mark.parametrize(("batch", "channels", "columns", "num_past"), CASES)
@pytest.mark.parametrize("given", ["", "bias", "bias residual keep", "bias memory", "bias residual memory keep"])
def test_what_stands_between_two_convolutions(batch, channels, columns, num_past, given):
    from s2quant.codec.kernels import finish

    y, residual = signal("y", batch, channels, columns), signal("x", batch, channels, columns)
    bias, alpha = signal("bias", channels), signal("alpha", 1, channels, 1).abs() + 0.1
    past = signal("past", batch, channels, num_past)
    wanted = y.double()
    wanted = wanted + bias.double()[:, None] if "bias" in given else wanted
    wanted = wanted + residual.double() if "residual" in given else wanted
    before = past.double() if "memory" in given else torch.zeros_like(past).double()
    whole = torch.cat([before, snake(wanted, alpha.double())], dim=-1)
    kept = y.clone(), residual.clone()
    out, total = finish(
        y, bias if "bias" in given else None, alpha, num_past=num_past, past=past if "memory" in given else None,
        residual=residual if "residual" in given else None, keep="keep" in given,
    )  # fmt: skip
    close(out, whole)
    assert (total is not None) == ("keep" in given)
    if total is not None:
        close(total, wanted)
    if "memory" in given:
        assert torch.equal(past, out[..., out.shape[-1] - num_past :])
    assert torch.equal(kept[0], y) and torch.equal(kept[1], residual)


@kernel
@pytest.mark.parametrize(("batch", "channels", "columns"), [(1, 3, 1), (2, 5, 7), (1, 2, 300)])
@pytest.mark.parametrize("stride", [2, 3, 8])
@pytest.mark.parametrize("memory", [False, True])
def test_the_rows_of_a_transposed_convolution_are_brought_into_order(batch, channels, columns, stride, memory):
    from s2quant.codec.kernels import finish

    num_past = 18
    y = signal("y", batch, channels * stride, columns + 1)
    bias, alpha = signal("bias", channels), signal("alpha", 1, channels, 1).abs() + 0.1
    past, overhang = signal("past", batch, channels, num_past), signal("over", batch, channels, stride)
    rows = y.double().unflatten(1, (channels, stride))
    wanted, rest = rows[..., :-1].transpose(2, 3).flatten(2), rows[..., -1]
    if memory:
        wanted[..., :stride] += overhang.double()
    wanted = wanted + bias.double()[:, None]
    before = past.double() if memory else torch.zeros_like(past).double()
    out, total = finish(
        y, bias, alpha, num_past=num_past, past=past if memory else None, keep=True, stride=stride,
        overhang=overhang if memory else None,
    )  # fmt: skip
    close(out, torch.cat([before, snake(wanted, alpha.double())], dim=-1))
    close(total, wanted)
    if memory:
        assert torch.equal(past, out[..., -num_past:]) and torch.equal(overhang.double(), rest)


@pytest.mark.parametrize(("in_dim", "out_dim", "stride", "columns"), [(6, 4, 8, 5), (5, 3, 3, 1), (4, 2, 2, 17)])
def test_a_transposed_convolution_is_one_of_two_taps(in_dim, out_dim, stride, columns):
    layer = CausalTransposedConv(in_dim, out_dim, 2 * stride, stride).double()
    x = uniform("x", (2, in_dim, columns)).double()
    with torch.no_grad():
        wanted = F.conv_transpose1d(x, layer.conv.weight, None, stride)
        rows = F.conv1d(x, layer.two_taps(), padding=1).unflatten(1, (out_dim, stride))
    torch.testing.assert_close(rows.transpose(2, 3).flatten(2), wanted, rtol=1e-12, atol=1e-12)


def test_the_arranged_weight_follows_the_weight_and_is_no_part_of_the_state():
    layer = CausalTransposedConv(3, 2, 4, 2)
    other = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    names, first = list(layer.state_dict()), layer.two_taps()
    assert layer.two_taps() is first and list(layer.state_dict()) == names == ["conv.weight", "conv.bias"]
    assert sum(1 for _ in layer.parameters()) == 2 and not list(layer.buffers())

    def expected():
        return layer.conv.weight.detach().unflatten(2, (2, 2)).flip(2).permute(1, 3, 0, 2).reshape(4, 3, 2)

    layer.load_state_dict(other)
    assert torch.equal(layer.two_taps(), expected()) and not torch.equal(layer.two_taps(), first)
    layer.load_state_dict({name: value + 1 for name, value in other.items()}, assign=True)
    assert torch.equal(layer.two_taps(), expected())
    kept = layer.two_taps()
    assert layer.to("cpu").arranged is kept  # nothing has moved: who reads it goes on
    layer.double()
    assert layer.arranged is None and layer.two_taps().dtype == torch.float64
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.conv.weight.mul_(2)
    assert torch.equal(twin.two_taps(), 2 * layer.two_taps())
    layer.to("meta")
    assert layer.two_taps().device.type == "meta"


def same_memory(ours, theirs):
    assert list(ours._buffers) == list(theirs._buffers) and len(ours._buffers) > 10
    for key, buffer in ours._buffers.items():
        if buffer.is_floating_point():
            close(buffer, theirs._buffers[key])
        else:
            assert torch.equal(buffer, theirs._buffers[key])


@pytest.fixture(params=[2, 99], ids=["two taps", "cuDNN's own"])
def upsampling(request, monkeypatch):
    monkeypatch.setattr(fused, "LEAST_STRIDE", request.param)


@kernel
@pytest.mark.usefixtures("upsampling")
@pytest.mark.parametrize(("name", "batch"), [("short", 1), ("short", 3), ("tiny", 1)])
def test_the_decoder_is_the_plain_one(request, name, batch, monkeypatch):
    codec = copy.deepcopy(request.getfixturevalue(name)).to(DEVICE)
    codes, calls = random_codes(codec.config, batch, 5), []
    decode = fused.decode
    monkeypatch.setattr(fused, "decode", lambda *given: calls.append(given) or decode(*given))
    codec.fused = False
    wanted = codec.decode(codes)
    assert not calls
    codec.fused = True
    close(codec.decode(codes), wanted)
    assert len(calls) == 1


@kernel
def test_a_rate_of_one_is_no_convolution_of_two_taps(monkeypatch):
    monkeypatch.setattr(fused, "LEAST_STRIDE", 2)
    config = dataclasses.replace(TINY, encoder_rates=(1, 2, 2, 2), decoder_rates=(2, 2, 2, 1))
    codec = build_codec(config).to(DEVICE)
    codes = random_codes(config, 1, 5)
    codec.fused = False
    wanted = codec.decode(codes)
    codec.fused = True
    close(codec.decode(codes), wanted)
    stream = CodecStream(codec)
    close(torch.cat([stream.push(chunk) for chunk in codes.split(2, dim=-1)], dim=-1), wanted)


@kernel
def test_with_autocast_the_plain_way_is_taken(codec):
    codec.fused = True
    latent = uniform("latent", (1, codec.config.latent_dim, 2)).to(DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert torch.isfinite(codec.decode_latent(latent).float()).all()


@kernel
@pytest.mark.usefixtures("upsampling")
def test_chunks_are_the_whole_and_a_stream_may_change_between_the_ways(codec):
    codes = random_codes(codec.config, 2, 14)
    codec.fused = False
    wanted = codec.decode(codes, None)
    usual, ours, mixed = (CodecStream(codec, 2) for _ in range(3))
    at = 0
    for number, chunk in enumerate(codes.split([1, 1, 4, 2, 5, 1], dim=-1)):
        until = at + chunk.shape[-1] * codec.frame_size
        codec.fused = False
        plain = usual.push(chunk)
        codec.fused = True
        close(ours.push(chunk), plain)
        same_memory(ours.memory, usual.memory)
        codec.fused = number % 2 == 0
        close(mixed.push(chunk), wanted[..., at:until])
        at = until
    same_memory(mixed.memory, usual.memory)


@kernel
def test_streams_are_joined_gathered_copied_and_reset(codec):
    codes, size = random_codes(codec.config, 3, 12), codec.frame_size
    codec.fused = False
    whole = codec.decode(codes, None)
    codec.fused = True
    pair, single = CodecStream(codec, 2), CodecStream(codec)
    pair.push(codes[:2, :, :4])
    single.push(codes[2:, :, :2])
    stream = CodecStream.joined([(single, 0), (pair, 1), (CodecStream(codec), 0)])
    stream.memory.gather()
    twin = CodecStream(codec, 3)
    twin.memory = stream.memory.clone()
    part = torch.stack([codes[2, :, 2:5], codes[1, :, 4:7], codes[0, :, :3]])
    for one in (stream, twin):
        found = one.push(part)
        for row, (n, at) in enumerate(((2, 2), (1, 4), (0, 0))):
            close(found[row], whole[n, :, at * size : (at + 3) * size])
    stream.reset([0])
    stream.memory.copy_(twin.memory)
    part = torch.stack([codes[2, :, 5:6], codes[1, :, 7:8], codes[0, :, 3:4]])
    close(stream.push(part)[0], whole[2, :, 5 * size : 6 * size])
    stream.reset()
    close(stream.push(codes[:, :, :2]), whole[..., : 2 * size])


@kernel
@pytest.mark.parametrize("batch", [1, 2])
def test_the_encoder_is_the_plain_one(codec, batch):
    wav = 0.3 * uniform("wav", (batch, 1, 6 * codec.frame_size)).to(DEVICE)
    with torch.no_grad():
        codec.fused = False
        wanted = codec.encode_latent(wav)
        codec.fused = True
        close(codec.encode_latent(wav), wanted)
        # A whole signal that does not complete the last stride.
        close(fused.encode(codec.encoder, wav[..., :-3]), codec.encoder(wav[..., :-3]))
    found = codec.encode(wav, chunk_frames=2)
    codec.fused = False
    assert (found == codec.encode(wav)).float().mean() > 0.95  # near ties are a matter of rounding


@kernel
def test_with_gradients_the_plain_way_is_taken():
    codec = build_codec(TINY).to(DEVICE)
    codec.fused = True
    latent = uniform("latent", (1, TINY.latent_dim, 2)).to(DEVICE).requires_grad_()
    codec.decode_latent(latent).square().sum().backward()
    assert latent.grad is not None and float(latent.grad.abs().max()) > 0


def test_on_a_cpu_the_plain_way_is_taken_and_the_other_one_refused(short, monkeypatch):
    monkeypatch.setattr(fused, "decode", None)
    monkeypatch.setattr(fused, "encode", None)
    codec = copy.deepcopy(short)
    codes = random_codes(codec.config, 1, 2)
    assert codec.fused is None and torch.equal(codec.decode(codes), short.decode(codes))
    assert codec.encode(uniform("wav", (1, 1, 100))).shape[1] == codec.num_codebooks
    monkeypatch.setattr(fused, "kernel_obstacle", lambda device: f"no Triton kernels for {device.type}")
    codec.fused = True
    with pytest.raises(UserError, match="no Triton kernels for cpu"):
        codec.decode(codes)


@pytest.mark.skipif(INSIDE, reason="Triton interprets here")
@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize(("num_past", "stride"), [(54, 1), (0, 1), (6, 8)])
def test_it_compiles_and_reads_16_bytes_at_once_where_rows_allow_it(unit, num_past, stride):
    triton = pytest.importorskip("triton")
    pytest.importorskip("triton.backends.nvidia")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from s2quant.codec.kernels import BLOCK, finish_kernel

    values = {"PAST": num_past, "STRIDE": stride, "UNIT": unit, "BLOCK": BLOCK, "HEAD": 64}
    absent = {"overhang", "total"} if stride == 1 else {"residual"}
    absent |= set() if num_past else {"past"}
    values |= dict.fromkeys(absent)
    integers = ("num_units", "y_columns", "num_channels")
    names = finish_kernel.arg_names
    source = ASTSource(
        fn=finish_kernel,
        signature={name: "constexpr" if name in values else "i32" if name in integers else "*fp32" for name in names},
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs={
            (number,): [["tt.divisibility", 16]]
            for number, name in enumerate(names)
            if name not in values and name not in integers
        },
    )
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    wide = len(re.findall(r"ld\.global\.v4\.b32|st\.global\.v4\.b32", text))
    assert (wide >= 2) == (unit == 4)
    assert "rem." not in text and len(re.findall(r"\bdiv\.\w*32", text)) <= 1  # the reciprocal of alpha
    assert "sin.approx" not in text
    if num_past and unit == 1:  # else one of those that bring columns into another order is seen
        assert text.rindex("bar.sync") < text.rindex("st.global")  # the past is read, then overwritten


@pytest.mark.gpu
def test_the_first_chunk_by_its_graph(tiny):
    from s2quant.runtime.chunk_graphs import ChunkGraphs

    codec = copy.deepcopy(tiny).to("cuda")
    codes = random_codes(TINY, 1, 12).to("cuda")
    codec.fused = False
    wanted = codec.decode(codes, None)
    codec.fused = None
    graphs = ChunkGraphs(codec, (8,))
    for _ in range(2):
        stream = CodecStream(codec)
        size = 4 * codec.frame_size
        close(graphs.push(stream, codes[..., :4]), wanted[..., :size])
        close(graphs.push(stream, codes[..., 4:]), wanted[..., size:])
    stream = CodecStream(codec)
    graphs.push(stream, codes[..., :4])
    codec.fused = False  # a stream that a graph began goes on in the plain way
    close(stream.push(codes[..., 4:]), wanted[..., size:])


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_are_used_unasked(tiny, monkeypatch):
    codec, calls = copy.deepcopy(tiny).to("cuda"), []
    decode = fused.decode
    monkeypatch.setattr(fused, "decode", lambda *given: calls.append(given) or decode(*given))
    assert kernel_obstacle(codec.device) is None
    assert isinstance(codec, Codec) and codec.fused is None
    codec.decode(random_codes(TINY, 1, 2))
    assert len(calls) == 1
