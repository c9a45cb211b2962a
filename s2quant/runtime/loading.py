"""A checkpoint folder -> an engine that speaks."""

from __future__ import annotations

from pathlib import Path

import torch

from s2quant.checkpoint.reader import open_checkpoint
from s2quant.codec import load_codec
from s2quant.prompt import Tokenizer
from s2quant.runtime import memory
from s2quant.runtime.engine import Engine
from s2quant.runtime.linears import Backend
from s2quant.runtime.load import load_model, parse_device, parse_dtype
from s2quant.runtime.prefix import PREFIX_BYTES
from s2quant.runtime.speech import DecoderKind


def load_engine(
    path: Path | str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.bfloat16,
    linears: Backend = "auto",
    num_slots: int = 8,
    decoder: DecoderKind = "auto",
    prefix_bytes: int = PREFIX_BYTES,
    voice_cache: Path | None = None,
    memory_limit_bytes: float | None = None,
    encoder_on_host: bool = False,
    prompt_graphs: bool | None = None,
    codec_graphs: bool | None = None,
    prompts_together: bool | None = None,
) -> Engine:
    """Load everything that a checkpoint folder needs to speak.

    Args:
        path: The folder.
        device: Where to put model and codec.
        dtype: The model's, one of torch's or its name; the codec is float32.
        linears: Backend of the quantized linears.
        num_slots: Most utterances in progress at a time.
        decoder: See `Engine`.
        prefix_bytes: See `Engine`.
        voice_cache: A folder where codes of recordings are kept, see `s2quant.runtime.voices`; None keeps none.
        memory_limit_bytes: The most memory of the GPU that this process takes from now on, with what CUDA itself
            needs; None sets no limit.
        encoder_on_host: Whether what only encoding a recording needs of the codec, half of it, is on the device only
            while it encodes.
        prompt_graphs: See `Engine`.
        codec_graphs: See `Engine`.
        prompts_together: See `Engine`.

    Returns:
        The engine.

    Raises:
        UserError: The folder, the device or the dtype cannot be used.
    """
    target = parse_device(device)
    parse_dtype(dtype)
    if memory_limit_bytes is not None:
        memory.limit_memory(target, memory_limit_bytes)
    checkpoint = open_checkpoint(path)
    tokenizer = Tokenizer.load(checkpoint.folder, checkpoint.config)
    doing = f"loading {path}"
    codec = memory.guarded(lambda: load_codec(checkpoint.folder, device=target), doing, memory.LOADING_TODO)
    if encoder_on_host:
        codec.rest_encoder("cpu")
        memory.release_memory()
    model = memory.guarded(lambda: load_model(checkpoint, target, dtype, linears), doing, memory.LOADING_TODO)
    engine = Engine(
        model,
        tokenizer,
        codec,
        num_slots,
        decoder,
        prefix_bytes,
        prompt_graphs=prompt_graphs,
        codec_graphs=codec_graphs,
        prompts_together=prompts_together,
    )
    engine.keep_voices(voice_cache, checkpoint.folder)
    return engine
