"""The audio codec: 44.1 kHz audio to codes and back, whole and streamed."""

from s2quant.codec.codec import Codec
from s2quant.codec.config import CodecConfig, TransformerSize
from s2quant.codec.layout import config_from_state, unfold_state
from s2quant.codec.random_state import random_codec_state
from s2quant.codec.state import codec_from_state, load_codec, read_codec_config
from s2quant.codec.stream import CodecStream

__all__ = [
    "Codec",
    "CodecConfig",
    "CodecStream",
    "TransformerSize",
    "codec_from_state",
    "config_from_state",
    "load_codec",
    "random_codec_state",
    "read_codec_config",
    "unfold_state",
]
