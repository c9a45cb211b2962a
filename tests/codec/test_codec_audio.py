"""Encoding and decoding whole signals: shapes, padding, clamping, causality, chunks, training, bad input."""

import copy
import math

import pytest
import torch
from codec_cases import TINY, build_codec, random_codes, recording, uniform
from torch.nn import functional as F

from s2quant.codec import CodecStream
from s2quant.codec import transformer as transformer_module
from s2quant.codec.blocks import CausalConv, CausalTransposedConv, Snake
from s2quant.codec.memory import Memory
from s2quant.codec.transformer import rotary_rows, window_attention
from s2quant.errors import UserError
from s2quant.layers import rotary_table


@pytest.mark.parametrize(("num_samples", "num_frames"), [(1, 1), (2048, 1), (2049, 2), (6000, 3)])
def test_a_recording_is_padded_to_whole_frames(tiny, num_samples, num_frames):
    wav = 0.1 * uniform("wav", (2, 1, num_samples))
    codes = tiny.encode(wav)
    assert codes.shape == (2, 10, num_frames) and codes.dtype == torch.int64
    assert torch.equal(codes, tiny.encode(F.pad(wav, (0, num_frames * 2048 - num_samples))))
    assert codes.min() >= 0 and codes[:, 0].max() < 4096 and codes[:, 1:].max() < 1024


def test_decoding_gives_one_frame_size_per_frame(tiny):
    audio = tiny.decode(random_codes(TINY, 2, 3))
    assert audio.shape == (2, 1, 3 * 2048) and audio.dtype == torch.float32
    assert tiny.decode(random_codes(TINY, 2, 0)).shape == (2, 1, 0)
    assert (tiny.sample_rate, tiny.frame_size, tiny.num_codebooks) == (44100, 2048, 10)


def test_decoded_random_codes_are_audible_and_not_saturated(tiny):
    audio = tiny.decode(random_codes(TINY, 1, 43))
    assert torch.isfinite(audio).all()
    assert 0.02 < audio.std() < 0.5 and (audio.abs() > 0.99).float().mean() < 0.001


def test_codes_of_sound_are_spread_and_depend_on_it(tiny):
    time_s = torch.arange(44100 * 2) / 44100
    phase = 2 * math.pi * torch.cumsum(120 + 25 * torch.sin(5 * time_s), 0) / 44100
    voiced = sum(torch.sin(k * phase) * (1 + torch.sin(2.3 * k * time_s)) / k for k in range(1, 20))
    for wav in (0.03 * voiced, 0.1 * uniform("noise", (88200,))):
        codes = tiny.encode(wav[None, None])[0]
        assert all(len(set(book.tolist())) > 20 for book in codes)  # of 44 frames


def test_codes_past_the_end_are_clamped_and_the_callers_are_kept(tiny):
    codes = random_codes(TINY, 1, 4)
    codes[0, 0, 1], codes[0, 1, 2], codes[0, 9, 3] = 5000, 1024, 4095
    before, clamped = codes.clone(), codes.clone()
    clamped[0, 0, 1], clamped[0, 1, 2], clamped[0, 9, 3] = 4095, 1023, 1023
    assert torch.equal(tiny.decode(codes), tiny.decode(clamped))
    assert torch.equal(codes, before)


def test_no_frame_depends_on_a_later_one(short):
    codes = random_codes(short.config, 1, 20)
    other = codes.clone()
    other[..., 12:] = (other[..., 12:] + 1) % 32
    a, b = short.decode(codes), short.decode(other)
    cut = 12 * short.frame_size
    assert torch.allclose(a[..., :cut], b[..., :cut], atol=1e-6)
    assert (a[..., cut : cut + short.frame_size] - b[..., cut : cut + short.frame_size]).abs().max() > 1e-3
    wav = recording(0, 20, short.config)
    wav = F.pad(wav, (0, 20 * short.frame_size - wav.shape[-1]))
    with torch.no_grad():
        x, y = (short.encode_latent(w) for w in (wav, torch.cat([wav[..., :cut], wav[..., cut:] + 0.3], dim=-1)))
    assert torch.allclose(x[..., :12], y[..., :12], atol=1e-5)
    assert (x[..., 12] - y[..., 12]).abs().max() > 1e-3


@pytest.mark.parametrize("chunk_frames", [1, 3, 19])
def test_chunks_give_what_one_pass_gives(short, chunk_frames):
    codes = random_codes(short.config, 2, 20)
    assert torch.allclose(short.decode(codes, chunk_frames), short.decode(codes, None), atol=1e-5)
    wav = torch.cat([recording(seed, 20, short.config) for seed in (0, 1)])
    padded = F.pad(wav, (0, 20 * short.frame_size - wav.shape[-1]))
    memory = Memory(2)
    with torch.no_grad():
        latents = [
            short.encode_latent(chunk, memory) for chunk in padded.split(chunk_frames * short.frame_size, dim=-1)
        ]
        assert torch.allclose(torch.cat(latents, dim=-1), short.encode_latent(padded), atol=1e-5)
    assert torch.equal(short.encode(wav, chunk_frames), short.encode(wav, None))


def test_rows_of_a_batch_do_not_meet(short):
    codes = random_codes(short.config, 3, 9)
    together = short.decode(codes)
    for row in range(3):
        assert torch.allclose(together[row : row + 1], short.decode(codes[row : row + 1]), atol=1e-5)


def test_long_signals_are_taken_in_pieces(tiny, monkeypatch):
    seen, attend = [], F.scaled_dot_product_attention

    def watch(q, k, v, **kwargs):
        seen.append((q.shape[2], k.shape[2]))
        return attend(q, k, v, **kwargs)

    monkeypatch.setattr(transformer_module.F, "scaled_dot_product_attention", watch)
    tiny.decode(random_codes(TINY, 1, 300))
    tiny.encode(recording(0, 300))
    with torch.no_grad():
        tiny.quantizer.post_module(uniform("x", (1, 64, 300)))
    assert max(queries for queries, _ in seen) == 512
    assert max(keys for queries, keys in seen if queries <= 128) <= 128 + 511
    assert max(keys for _, keys in seen) <= 512 + 511


def test_attention_sees_its_window(short):
    q, k, v = (uniform(name, (2, 23, 2, 8)) for name in "qkv")
    distance = torch.arange(23)[:, None] - torch.arange(23)
    mask = (distance >= 0) & (distance < 5)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    assert torch.allclose(window_attention(q, k, v, 5), expected, atol=1e-6)


def test_rotary_rows_are_those_of_the_shared_table():
    positions = torch.tensor([[0, 1, 127, 5000]])
    assert torch.equal(rotary_rows(positions, 64)[0], rotary_table(5001, 64, 10000.0)[positions[0]])


def test_convolutions_against_their_definition():
    conv, upsample = CausalConv(2, 3, 6, stride=3, dilation=2), CausalTransposedConv(2, 3, 5, 2)
    x = uniform("x", (1, 2, 10))
    with torch.no_grad():
        y = conv(x)
        assert y.shape == (1, 3, 4)
        for t in range(4):  # output t ends with input 3t + 2
            columns = [3 * t + 2 - 2 * (5 - tap) for tap in range(6)]
            taken = torch.stack([x[0, :, c] if 0 <= c < 10 else torch.zeros(2) for c in columns], dim=-1)
            assert torch.allclose(y[0, :, t], (conv.conv.weight * taken).sum((1, 2)) + conv.conv.bias, atol=1e-5)
        y = upsample(x)
        assert y.shape == (1, 3, 20)
        expected = upsample.conv.bias[:, None].repeat(1, 23)
        for t in range(10):  # input t begins at output 2t
            expected[:, 2 * t : 2 * t + 5] += torch.einsum("i,iok->ok", x[0, :, t], upsample.conv.weight)
        assert torch.allclose(y[0], expected[:, :20], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_snake_has_the_same_bits_without_gradients_and_leaves_its_input(dtype):
    snake = Snake(5).to(dtype)
    snake.alpha.data.uniform_(0.1, 3, generator=torch.Generator().manual_seed(0))
    x = 4 * uniform("snake", (2, 5, 300)).to(dtype)
    kept = x.clone()
    with torch.no_grad():
        found = snake(x)
    assert torch.equal(found, snake(x)) and torch.equal(x, kept)
    expected = x.double() + torch.sin(snake.alpha.double() * x.double()) ** 2 / snake.alpha.double()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.2)


def test_it_trains(short):
    codec = build_codec(short.config).train()
    wav = uniform("wav", (2, 1, 6 * codec.frame_size))
    quantized = codec.quantize(codec.encode_latent(wav))
    audio = codec.decode_latent(quantized.latent)
    loss = (audio - wav).square().mean()
    loss = loss + (quantized.projected - quantized.rows.detach()).square().mean()
    loss = loss + (quantized.projected.detach() - quantized.rows).square().mean()
    loss.backward()
    silent = [name for name, p in codec.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert silent == []
    assert quantized.rows.shape == (2, 4, 4, 6) and torch.equal(quantized.codes, codec.encode(wav))
    assert torch.allclose(codec.decode(quantized.codes), audio, atol=1e-5)


def test_gradients_pass_straight_through_the_codebooks(short):
    latent = uniform("latent", (1, 16, 4)).requires_grad_()
    quantized = short.quantize(latent)
    (gradient,) = torch.autograd.grad(short.decode_latent(quantized.latent).square().sum(), latent)
    assert (gradient != 0).any(dim=1).all()
    assert torch.allclose(quantized.latent, short.dequantize(quantized.codes), atol=1e-5)


def test_upsampling_mirrors_downsampling(short):
    assert [stage[0].stride for stage in short.quantizer.downsample] == [2, 3]
    assert [stage[0].stride for stage in short.quantizer.upsample] == [3, 2]


def test_bfloat16_runs(short):
    codec = build_codec(short.config).bfloat16()
    audio = codec.decode(random_codes(short.config, 1, 8))
    assert audio.dtype == torch.float32
    assert (audio - short.decode(random_codes(short.config, 1, 8))).abs().mean() < 0.05
    assert codec.encode(recording(0, 4, short.config)).shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("wav", "message"),
    [
        (torch.zeros(100), r"audio of shape \[100\]"),
        (torch.zeros(1, 100), r"audio of shape \[1, 100\]"),
        (torch.zeros(1, 2, 100), r"audio of shape \[1, 2, 100\]"),
        (torch.zeros(1, 1, 0), r"one sample or more"),
        (torch.zeros(0, 1, 100), r"audio of shape \[0, 1, 100\]"),
        (torch.zeros(1, 1, 100, dtype=torch.int16), "dtype torch.int16"),
        (torch.full((1, 1, 100), math.nan), "NaN or infinite samples"),
    ],
)
def test_bad_audio_is_refused(tiny, wav, message):
    with pytest.raises(UserError, match=message):
        tiny.encode(wav)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(10, 5, dtype=torch.int64), r"codes of shape \[10, 5\]"),
        (torch.zeros(1, 9, 5, dtype=torch.int64), r"\[batch, 10, frames\]"),
        (torch.zeros(1, 10, 5), "dtype torch.float32"),
        (
            torch.tensor([0, -1, 0, -7]).expand(1, 10, 4),
            "20 negative codes, the first -1 at batch 0, codebook 0, frame 1",
        ),
    ],
)
def test_bad_codes_are_refused(tiny, codes, message):
    with pytest.raises(UserError, match=message):
        tiny.decode(codes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_cpus_audio(tiny):
    codec = build_codec(TINY).cuda()
    codes = random_codes(TINY, 2, 140)
    stream = CodecStream(codec, batch_size=2)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        decoded, encoded = codec.decode(codes), codec.encode(recording(1))
        streamed = torch.cat([stream.push(chunk) for chunk in codes.split([1, 30, 109], dim=-1)], dim=-1)
    assert (decoded.cpu() - tiny.decode(codes)).abs().max() < 1e-4
    assert (streamed - decoded).abs().max() < 1e-5
    assert (encoded.cpu() == tiny.encode(recording(1))).float().mean() > 0.98


def test_an_encoder_that_rests_elsewhere_is_fetched_for_its_time(short, monkeypatch):
    codec = copy.deepcopy(short)
    wav = 0.1 * torch.randn(1, 1, 9 * codec.frame_size, generator=torch.Generator().manual_seed(0))
    expected, moved = codec.encode(wav), []
    monkeypatch.setattr(codec, "_move_encoder", lambda device: moved.append(str(device)))
    codec._rest = torch.device("cuda")  # as if: nothing is moved here
    assert torch.equal(codec.encode(wav), expected) and moved == ["cpu", "cuda"]
    with pytest.raises(UserError):
        codec.encode(torch.full((1, 1, 5), float("nan")))
    monkeypatch.setattr(codec.encoder, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        codec.encode(wav)
    assert moved == ["cpu", "cuda"] * 2
    codec.rest_encoder("cpu")  # its own device: the end of it
    assert codec._rest is None and moved[-1] == "cpu"


def test_what_only_encoding_needs_is_about_half(short):
    codec = copy.deepcopy(short)
    codec.rest_encoder("meta")
    resting = {name for name, weight in codec.named_parameters() if weight.is_meta}
    assert {name.split(".")[0] for name in resting} == {"encoder", "quantizer"} and codec.device.type == "cpu"
    codes = short.encode(torch.zeros(1, 1, 3 * short.frame_size))
    assert torch.equal(codec.decode(codes), short.decode(codes))
