"""codec.pth: its keys, the sizes read off it, and everything that is refused."""

import dataclasses
import io
import math
import re

import pytest
import torch
from codec_cases import TINY, WEIGHT_SEED, random_codes

from s2quant.codec import (
    CodecConfig,
    TransformerSize,
    codec_from_state,
    config_from_state,
    load_codec,
    random_codec_state,
    unfold_state,
)
from s2quant.codec.layout import buffer_keys, file_shapes, fold_weight, parameter_shapes
from s2quant.errors import UserError

G, V = ".parametrizations.weight.original0", ".parametrizations.weight.original1"


@pytest.fixture(scope="module")
def state():
    """A random state dict. Tests copy it before they change it."""
    return random_codec_state(TINY, WEIGHT_SEED)


@pytest.fixture
def folder(tmp_path, state):
    torch.save(state, tmp_path / "codec.pth")
    return tmp_path


def with_changed(state, key, change):
    """A state dict with one tensor changed in place, in a copy."""
    tensor = state[key].clone()
    change(tensor)
    return {**state, key: tensor}


def test_the_released_codec_is_counted_exactly():
    config = CodecConfig.s2_pro()
    on_disk, folded = file_shapes(config), parameter_shapes(config)
    assert len(on_disk) == 535 and len(folded) == 455
    assert sum(map(math.prod, folded.values())) == 391_398_385
    assert sum(map(math.prod, on_disk.values())) == 391_430_530
    assert sum(V in key for key in on_disk) == 60 and sum(key.endswith("_proj.weight_v") for key in on_disk) == 20
    assert len(buffer_keys(config)) == 6
    assert config.frame_size == 2048 and config.codebook_sizes == (4096, *[1024] * 9)


@pytest.mark.parametrize(
    ("prefix", "folded", "more_with_g"),
    [
        (("encoder.block.4.block.5.",), 54_543_360, 0),
        (("quantizer.downsample.",), 21_006_336, 0),
        (("quantizer.pre_module.",), 109_085_696, 0),
        (("quantizer.semantic_quantizer.",), 50_184, 1_032),
        (("quantizer.quantizer.",), 230_472, 9_288),
        (("quantizer.post_module.",), 109_085_696, 0),
        (("quantizer.upsample.",), 21_006_336, 0),
        (("decoder.",), 54_091_105, 13_057),
    ],
)
def test_the_parts_of_the_released_codec_are_counted_exactly(prefix, folded, more_with_g):
    def count(shapes):
        return sum(math.prod(shape) for key, shape in shapes.items() if key.startswith(prefix))

    config = CodecConfig.s2_pro()
    assert count(parameter_shapes(config)) == folded
    assert count(file_shapes(config)) == folded + more_with_g


def test_the_tiny_codec_is_small_and_whole(state):
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 3_000_000
    assert TINY.frame_size == 2048 and TINY.codebook_sizes == (4096, *[1024] * 9)
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == file_shapes(TINY)


def test_random_weights_hang_on_seed_and_key_alone(state):
    again, other = random_codec_state(TINY, WEIGHT_SEED), random_codec_state(TINY, WEIGHT_SEED + 1)
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert not any(torch.equal(state[key], other[key]) for key in state)


def test_sizes_are_read_off_the_tensors(state):
    assert config_from_state(state) == TINY
    meta = {key: torch.empty(shape, device="meta") for key, shape in file_shapes(CodecConfig.s2_pro()).items()}
    assert config_from_state(meta) == CodecConfig.s2_pro()
    size = TransformerSize(num_layers=3, intermediate_size=80)
    narrow = dataclasses.replace(
        TINY,
        encoder_dim=32,
        encoder_rates=(2, 5, 3),
        encoder_transformers=(size, None, TransformerSize(num_layers=1, intermediate_size=7)),
        decoder_dim=40,
        decoder_rates=(30,),
        latent_dim=128,
        downsample_factors=(3,),
        post=size,
        codebook_dim=5,
        semantic_size=512,
        num_residual=4,
        residual_size=256,
    )
    meta = {key: torch.empty(shape, device="meta") for key, shape in file_shapes(narrow).items()}
    assert config_from_state(meta) == narrow


@pytest.mark.parametrize("wrap", ["plain", "wrapped", "prefixed", "both", "file", "buffers", "bfloat16"])
def test_every_form_of_the_file_is_loaded(folder, state, tiny, wrap):
    path = folder / "codec.pth" if wrap == "file" else folder
    if wrap in ("prefixed", "both"):
        state = {f"generator.{key}": value for key, value in state.items()}
    if wrap in ("wrapped", "both"):
        state = {"state_dict": state | ({"discriminator.x": torch.zeros(1)} if wrap == "both" else {}), "step": 3}
    if wrap == "buffers":
        state = {**state, **{key: torch.ones(2, 2, dtype=torch.bool) for key in buffer_keys(TINY)}}
    if wrap == "bfloat16":
        state = {key: value.bfloat16() for key, value in state.items()}
    torch.save(state, folder / "codec.pth")
    codec = load_codec(path)
    assert not codec.training and codec.dtype == torch.float32 and codec.device.type == "cpu"
    error = (codec.decode(random_codes(TINY, 1, 3)) - tiny.decode(random_codes(TINY, 1, 3))).abs().max()
    assert error == 0 if wrap != "bfloat16" else 0 < error < 0.2


def test_a_dtype_can_be_asked_for(folder):
    assert {p.dtype for p in load_codec(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_weight_norm_is_folded_as_torch_folds_it(state, tiny):
    for stem, style in {
        "decoder.model.1.block.1.conv": (G, V),  # transposed: rows are input channels
        "encoder.block.2.block.4.conv": (G, V),
        "quantizer.quantizer.quantizers.3.in_proj": (".weight_g", ".weight_v"),
    }.items():
        g, v = state[stem + style[0]], state[stem + style[1]]
        weight = tiny.get_parameter(f"{stem}.weight")
        assert torch.allclose(weight, torch._weight_norm(v, g, 0), atol=1e-7)
        assert not torch.allclose(weight, v, atol=1e-3)


def test_either_style_of_weight_norm_and_none_are_understood(state, tiny):
    names = {G: ".weight_g", V: ".weight_v", ".weight_g": G, ".weight_v": V}
    swapped = {}
    for key, tensor in state.items():
        suffix = next((suffix for suffix in names if key.endswith(suffix)), None)
        swapped[key.removesuffix(suffix) + names[suffix] if suffix else key] = tensor
    for other in (swapped, tiny.state_dict()):
        codec = codec_from_state(other)
        assert all(torch.equal(p, tiny.get_parameter(name)) for name, p in codec.named_parameters())


def test_a_codec_can_be_written_as_codec_pth(tiny, state):
    keys = unfold_state(tiny.state_dict())
    assert list(keys) == list(file_shapes(TINY)) and set(keys) == set(state)
    codec = codec_from_state(keys)
    assert all(torch.allclose(p, tiny.get_parameter(name), atol=1e-6) for name, p in codec.named_parameters())


def test_all_faults_are_named_at_once(folder, state):
    bad = dict(state)
    del bad["decoder.model.2.block.3.block.0.alpha"], bad[f"encoder.block.3.block.4.conv{G}"]
    bad["encoder.extra"] = torch.zeros(1)
    bad["quantizer.post_module.norm.weight"] = torch.ones(63)
    bad["quantizer.upsample.0.1.norm.bias"] = torch.ones(64, dtype=torch.int64)
    bad["step"] = 7
    bad = with_changed(bad, "quantizer.quantizer.quantizers.8.codebook.weight", lambda t: t[3, 1:3].fill_(math.nan))
    bad = with_changed(bad, "decoder.model.6.conv.bias", lambda t: t.fill_(math.inf))
    bad = with_changed(bad, f"decoder.model.0.conv{V}", lambda t: t[5].zero_())
    torch.save(bad, folder / "codec.pth")
    with pytest.raises(UserError) as error:
        load_codec(folder)
    for line in (
        "9 faults",
        "decoder.model.2.block.3.block.0.alpha: missing",
        f"encoder.block.3.block.4.conv{G}: missing",
        "encoder.extra: left over",
        "quantizer.post_module.norm.weight: shape [63], expected [64]",
        "quantizer.upsample.0.1.norm.bias: dtype torch.int64, expected floating",
        "step: int, not a tensor",
        "quantizer.quantizer.quantizers.8.codebook.weight: 2 values are NaN or infinite",
        "decoder.model.6.conv.bias: 1 values are NaN or infinite",
        f"decoder.model.0.conv{V}: rows of zeros",
    ):
        assert line in str(error.value), line


def test_any_single_key_that_is_missing_is_named(state):
    sized = [
        key
        for key in state
        if re.search(r"0\.codebook|block\.4\.conv|block\.1\.conv\.p|downsample\..\.0|norm.weight$", key)
    ]
    for key in sized + list(state)[::15]:
        with pytest.raises(UserError) as error:
            codec_from_state({k: v for k, v in state.items() if k != key})
        assert f"1 faults\n  {key}: missing\n" in str(error.value), key


@pytest.mark.parametrize("bend", [lambda t: t[None], lambda t: t.repeat(3, *[1] * (t.ndim - 1)), lambda t: t.sum()])
def test_any_single_key_of_another_shape_is_named(state, bend):
    for key in list(state)[::19]:
        bent = {**state, key: bend(state[key])}
        with pytest.raises(UserError) as error:
            codec_from_state(bent)
        assert f"{key}: shape {list(bent[key].shape)}" in str(error.value), key


def test_rates_that_contradict_each_other_are_refused(folder, state):
    key = f"decoder.model.4.block.1.conv{V}"
    torch.save({**state, key: torch.cat([state[key]] * 2, dim=-1)}, folder / "codec.pth")
    with pytest.raises(UserError, match=r"codec.pth: .*(?s:.*)decoder rates \(8, 8, 4, 4\) differ in product"):
        load_codec(folder)


def test_a_weight_given_twice_is_left_over(state, tiny):
    name = "encoder.block.0.conv.weight"
    with pytest.raises(UserError, match=r"encoder\.block\.0\.conv\.parametrizations\.weight\.original0: left over"):
        codec_from_state({**state, name: tiny.get_parameter(name).detach()})


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "codec.pth", str(tmp_path / "no" / "folder")):
        with pytest.raises(UserError, match="is not there"):
            load_codec(path)


@pytest.mark.parametrize("fraction", [0.0, 1e-5, 0.3, 0.9, 0.9999])
def test_a_truncated_file(folder, fraction):
    content = (folder / "codec.pth").read_bytes()
    (folder / "codec.pth").write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(UserError, match="cannot be read"):
        load_codec(folder)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\x80\x02}q\x00X", b"PK\x03\x04" + bytes(200), bytes(999)])
def test_a_file_that_is_something_else(folder, content):
    (folder / "codec.pth").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        load_codec(folder)


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [([torch.zeros(1)], "holds a list"), ({3: torch.zeros(1)}, "holds a dict"), ({"x": Evil()}, "cannot be read")],
)
def test_a_file_of_something_else(folder, capsys, content, message):
    torch.save(content, folder / "codec.pth")
    with pytest.raises(UserError, match=message):
        load_codec(folder)
    assert "code was run" not in capsys.readouterr().out


def test_sizes_that_do_not_fit_together():
    with pytest.raises(UserError) as error:
        dataclasses.replace(TINY, decoder_rates=(8, 8, 4), latent_dim=65, num_residual=0, codebook_dim=-1)
    for part in (
        "differ in product",
        "width 65 is no multiple of head_dim 64",
        "num_residual is 0",
        "codebook_dim is -1",
    ):
        assert part in str(error.value)
    for change in ({"decoder_dim": 20}, {"head_dim": 3}, {"encoder_transformers": (None,)}, {"encoder_dim": 0}):
        with pytest.raises(UserError, match="do not fit together"):
            dataclasses.replace(TINY, **change)


def test_fold_weight_keeps_lengths():
    g, v = torch.tensor([2.0, 3.0])[:, None, None], torch.rand(2, 3, 4)
    assert torch.allclose(fold_weight(g, v).flatten(1).norm(dim=1), g.flatten())
