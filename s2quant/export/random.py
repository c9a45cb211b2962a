"""A checkpoint of random weights in exactly the real layout, for tests and for benchmarks of the real size.

It says nothing, but it behaves: logits have a sensible spread, speech ends by itself after some tens of frames,
the codec makes finite sound. Every tensor has its own generator, seeded by the seed and its name, so a tensor does
not depend on the others. The tokenizer has the special tokens and the ids of config.json; at the real size its
text tokens are fillers, not Qwen's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.layout import FAST, SLOW, TensorSpec, expected_tensors
from s2quant.checkpoint.writer import MAX_SHARD_BYTES, ShardWriter
from s2quant.codec import CodecConfig, random_codec_state
from s2quant.export.config_files import merged_config
from s2quant.files import atomic_folder, write_json
from s2quant.prompt import synthetic_tokenizer, tiny_token_ids
from s2quant.records import manifest

LOGIT_STD = 2.0
# Speech of random weights ends by itself: all codebook embeddings share a direction, so the hidden vector of every
# frame leans towards it, whatever the width and less the deeper the model (measured: 2.9 at 4 layers, 1.2 at 36).
# im_end's embedding leans the same way, so that its logit is among the best thirty of 4096 every now and then.
# Text does not lean: speech can begin.
SHARED_LENGTH = 0.3  # the shared part of a codebook embedding, over the length of its own part
END_LENGTH = 1.8  # of the shared direction in im_end's embedding, at END_DEPTH layers
END_DEPTH = 4
END_POWER = 0.15  # tried at 36 layers: 0 lets 7 clips of 32 end, 0.4 ends them after a frame or two


def s2_pro_config() -> dict[str, Any]:
    """Compose config.json of the real size, as far as it is publicly known.

    Returns:
        The JSON object.
    """
    common = {
        "attention_o_bias": False,
        "attention_qkv_bias": False,
        "audio_hidden_dim": 5120,
        "dim": 2560,
        "dropout": 0.0,
        "head_dim": 128,
        "initializer_range": 0.01976423537605237,
        "intermediate_size": 9728,
        "moe_intermediate_size": 768,
        "n_head": 32,
        "n_local_heads": 8,
        "norm_eps": 1e-06,
        "norm_topk_prob": True,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "rope_base": 1000000,
        "router_gamma": 0.001,
        "use_aux_loss_free": False,
        "use_bfloat16": False,
        "use_gradient_checkpointing": True,
        "use_moe": False,
    }
    audio = common | {
        "attention_qk_norm": False,
        "max_seq_len": 11,
        "model_type": "fish_qwen3_audio_decoder",
        "n_layer": 4,
        "num_codebooks": 10,
        "text_dim": 2560,
        "tie_word_embeddings": False,
        "vocab_size": 4096,
    }
    text = common | {
        "attention_qk_norm": True,
        "max_seq_len": 32768,
        "model_type": "fish_qwen3",
        "n_layer": 36,
        "tie_word_embeddings": True,
        "vocab_size": 155776,
    }
    return {
        "audio_decoder_config": dict(sorted(audio.items())),
        "audio_pad_token_id": 151677,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "model_type": "fish_qwen3_omni",
        "pad_token_id": 151669,
        "semantic_end_token_id": 155773,
        "semantic_start_token_id": 151678,
        "text_config": dict(sorted(text.items())),
    }


def tiny_config() -> dict[str, Any]:
    """Compose config.json of a model of the same family that a laptop runs in a blink.

    Returns:
        The JSON object; every linear's sizes are multiples of 64.
    """
    config = json.loads(json.dumps(s2_pro_config()))
    sizes = {"dim": 128, "head_dim": 32, "intermediate_size": 192, "n_head": 4, "n_local_heads": 2}
    config["text_config"] |= sizes | {"n_layer": 4, "max_seq_len": 4096, "vocab_size": tiny_token_ids()["vocab_size"]}
    config["audio_decoder_config"] |= sizes | {"n_layer": 2, "text_dim": 128}
    return config | {name: value for name, value in tiny_token_ids().items() if name in config}


CONFIGS = {"tiny": tiny_config, "s2-pro": s2_pro_config}


def write_random(
    raw_config: Mapping[str, Any],
    out: Path,
    seed: int = 0,
    codec: CodecConfig | None = None,
    device: str = "cpu",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    ends: bool = True,
) -> None:
    """Write a random checkpoint folder.

    Args:
        raw_config: config.json.
        out: The folder to make.
        seed: Seed of the weights.
        codec: Sizes of the codec; None means the real one's for a model of the real width, else the tiny one's.
        device: Where numbers are drawn; they differ between devices.
        max_shard_bytes: Shard limit.
        ends: Whether its speech ends by itself now and then; else hardly ever.

    Raises:
        UserError: The configuration is no S2 Pro's, or the folder cannot be written.
    """
    config = S2Config.from_json(raw_config)
    codec = codec or (CodecConfig.s2_pro() if config.slow.dim >= 2560 else CodecConfig.tiny())
    with atomic_folder(out) as folder:
        write_json(folder / "config.json", merged_config(raw_config, None))
        writer = ShardWriter(folder, max_shard_bytes)
        for spec in expected_tensors(config).values():
            writer.add(spec.name, random_tensor(spec, config, seed, device, ends).to(torch.bfloat16))
        writer.finish()
        for name, content in synthetic_tokenizer(config).items():
            (folder / name).write_bytes(content)
        _save_codec(random_codec_state(codec, seed), folder / "codec.pth")
        record = manifest("random", {"config": dict(raw_config)}, device, seed, num_tensors=writer.num_tensors)
        write_json(folder / "manifest.json", record)


def _save_codec(state: Mapping[str, Tensor], path: Path) -> None:
    try:
        torch.save(dict(state), path)
    except RuntimeError as error:  # torch's zip writer says so when the disk is full
        raise OSError(f"{path.name} could not be written whole: {error}") from error


def random_tensor(spec: TensorSpec, config: S2Config, seed: int, device: str = "cpu", ends: bool = True) -> Tensor:
    """Draw one tensor.

    Args:
        spec: Which.
        config: The model's configuration.
        seed: Seed of the checkpoint.
        device: Where to draw.
        ends: Whether im_end's embedding leans as those of frames do, or the other way.

    Returns:
        float32 of the spec's shape, on the device.
    """
    noise = _normal(spec.name, spec.shape, seed, device)
    if spec.kind == "norm":
        return 1 + 0.1 * noise
    if spec.kind == "bias":
        return 0.1 * noise
    scale = LOGIT_STD / math.sqrt(config.slow.dim)  # of an embedding's element
    if spec.kind == "linear":
        return noise * _gain(spec, config) / math.sqrt(spec.shape[1])
    noise *= scale
    direction = _normal("shared direction", (config.slow.dim,), seed, device)
    if spec.module == f"{FAST}.codebook_embeddings":
        noise += SHARED_LENGTH * LOGIT_STD * direction / direction.norm()
    if spec.module == f"{SLOW}.embeddings":
        length = END_LENGTH * (config.slow.n_layer / END_DEPTH) ** END_POWER
        noise[config.im_end_id] += (length if ends else -length) * direction / direction.norm()
    return noise


def _gain(spec: TensorSpec, config: S2Config) -> float:
    """Say how strong a linear is: all blocks together add a residual stream of unit root mean square.

    That is far more than an embedding, so a token does not call for itself through the tied head.
    """
    sizes = config.slow if spec.module.startswith(SLOW) else config.fast
    if spec.module.endswith(("attention.wo", "feed_forward.w2")):
        return 1 / math.sqrt(2 * sizes.n_layer)
    return LOGIT_STD if spec.module == f"{FAST}.output" else 1.0


def _normal(name: str, shape: tuple[int, ...], seed: int, device: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, device=device)
