"""What the codec's tests and make_goldens.py both compute: configurations, inputs and weights, all from seeds."""

import dataclasses
import hashlib

import torch

from s2quant.codec import CodecConfig, TransformerSize
from s2quant.codec.blocks import ConvNeXt, DecoderBlock, EncoderBlock
from s2quant.codec.layout import file_shapes, fold_weight, weight_norm_styles
from s2quant.codec.quantizer import Codebook
from s2quant.codec.random_state import random_tensor
from s2quant.codec.transformer import WindowTransformer

TINY = CodecConfig.tiny()
ONE_LAYER = TransformerSize(num_layers=1, intermediate_size=3072)
# The released codec's width with one layer per transformer: what the real-width blocks are taken from.
WIDE = dataclasses.replace(
    CodecConfig.s2_pro(), encoder_transformers=(None, None, None, ONE_LAYER), pre=ONE_LAYER, post=ONE_LAYER
)
WEIGHT_SEED = 1
GOLDEN_FRAMES = 150  # past the windows: 128 frames in pre and post, 512 positions of a quarter frame in the encoder
STEP = 97  # of the stored samples; prime, so that every phase of every stride is met

# name -> (prefix in codec.pth, our module, shape of its input)
WIDE_BLOCKS = {
    "encoder_block": ("encoder.block.4.", lambda: EncoderBlock(WIDE, 3), (1, 512, 530 * 8)),
    "decoder_block": ("decoder.model.1.", lambda: DecoderBlock(WIDE, 0), (1, 1536, 7)),
    "pre_module": ("quantizer.pre_module.", lambda: WindowTransformer(1024, ONE_LAYER, 64, 128), (2, 1024, 140)),
    "convnext": ("quantizer.upsample.0.1.", lambda: ConvNeXt(1024), (2, 1024, 20)),
    "codebook": ("quantizer.semantic_quantizer.quantizers.0.", lambda: Codebook(1024, 4096, 8), (1, 1024, 40)),
}


def uniform(name, shape, seed=0):
    """Uniform -1 ... 1 by name: unlike normal numbers, the same bits on every machine."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.rand(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))) * 2 - 1


def recording(seed, frames=GOLDEN_FRAMES, config=TINY):
    """Noise that swells and fades, [1, 1, S], a third of a frame short of whole frames."""
    num_samples = frames * config.frame_size - config.frame_size // 3
    envelope = uniform("envelope", (frames,), seed).abs().repeat_interleave(config.frame_size)[:num_samples]
    return (0.3 * envelope * uniform("recording", (num_samples,), seed))[None, None]


def random_codes(config, batch, frames, seed=0, past_end=0):
    """Codes [B, N, F]; with past_end some lie that far past the end of their codebook."""
    sizes = torch.tensor(config.codebook_sizes)[:, None] + past_end
    return ((uniform("codes", (batch, config.num_codebooks, frames), seed) + 1) / 2 * sizes).long().clamp(max=sizes - 1)


def file_state(prefix, config=WIDE):
    """The part of a random codec.pth under a prefix, prefix taken off."""
    return {
        key.removeprefix(prefix): random_tensor(key, shape, WEIGHT_SEED)
        for key, shape in file_shapes(config).items()
        if key.startswith(prefix)
    }


def wide_block(name):
    """One of our real-width blocks with its weights."""
    prefix, make, _ = WIDE_BLOCKS[name]
    state = file_state(prefix)
    with torch.device("meta"):
        block = make()
    for parameter, _ in block.named_parameters():
        for g, v in weight_norm_styles(prefix + parameter)[:1]:
            stem = parameter.removesuffix(".weight")
            state[parameter] = fold_weight(state.pop(stem + g), state.pop(stem + v))
    block.load_state_dict(state, strict=True, assign=True)
    return block.eval()


def wide_input(name):
    return uniform(name, WIDE_BLOCKS[name][2])


def excerpt(x):
    """A strided part and both ends of a tensor: what a fixture keeps of it."""
    flat = x.flatten()
    return torch.cat([flat[:200], flat[:: max(STEP, flat.numel() // 2000 | 1)], flat[-200:]]).clone()


def build_codec(config, seed=WEIGHT_SEED):
    """A codec whose head width and windows, which no file can tell, are those of config."""
    from s2quant.codec import Codec, random_codec_state
    from s2quant.codec.layout import fold_weight, weight_norm_styles

    codec, state = Codec(config), random_codec_state(config, seed)
    folded = {}
    for name in codec.state_dict():
        stem, styles = name.removesuffix(".weight"), weight_norm_styles(name)
        folded[name] = fold_weight(state[stem + styles[0][0]], state[stem + styles[0][1]]) if styles else state[name]
    codec.load_state_dict(folded, strict=True)
    return codec.eval()
