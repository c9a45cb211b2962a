import dataclasses

import pytest
from codec_cases import TINY, WEIGHT_SEED, build_codec

from s2quant.codec import CodecConfig, TransformerSize, codec_from_state, random_codec_state


@pytest.fixture(scope="session")
def tiny():
    """The tiny codec. Tests do not change it."""
    return codec_from_state(random_codec_state(TINY, WEIGHT_SEED)).eval()


@pytest.fixture(scope="session")
def short():
    """A smaller codec with two heads, other rates and short windows, so that a few frames go past them."""
    size = TransformerSize(num_layers=2, intermediate_size=32)
    config = CodecConfig(
        encoder_dim=4,
        encoder_rates=(2, 3),
        encoder_transformers=(size, size),
        decoder_dim=16,
        decoder_rates=(3, 2),
        latent_dim=16,
        downsample_factors=(2, 3),
        pre=size,
        post=dataclasses.replace(size, num_layers=3),
        codebook_dim=4,
        semantic_size=64,
        num_residual=3,
        residual_size=32,
        head_dim=8,
        encoder_window=7,
        window=5,
    )
    return build_codec(config)
