"""Two small models with weights and tokens that any machine can recompute, for the tests and the golden generator.

Everything random comes from SHAKE-256 of a name, turned into uniform numbers by exact arithmetic, so that the golden
files need not hold weights. Needs nothing but torch and numpy: the generator imports it too.
"""

import copy
import hashlib

import numpy as np
import torch

IM_END, BEGIN, END = 7, 300, 555


def _config(num_codebooks, text, decoder):
    common = {
        "vocab_size": 600,
        "max_seq_len": 512,
        "rope_base": 1000000,
        "norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    return {
        "model_type": "fish_qwen3_omni",
        "dtype": "bfloat16",
        "pad_token_id": 8,
        "eos_token_id": IM_END,
        "audio_pad_token_id": 9,
        "semantic_start_token_id": BEGIN,
        "semantic_end_token_id": END,
        "text_config": common | text,
        "audio_decoder_config": common
        | {"vocab_size": 256, "max_seq_len": num_codebooks + 1, "num_codebooks": num_codebooks, "text_dim": text["dim"]}
        | decoder,
    }


def _sizes(n_layer, dim, n_head, n_local_heads, head_dim, intermediate_size, attention_qk_norm):
    return {
        "n_layer": n_layer,
        "dim": dim,
        "n_head": n_head,
        "n_local_heads": n_local_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "attention_qk_norm": attention_qk_norm,
    }


# "project": the shape of S2 Pro but for the widths, so that the Fast AR projects its input.
# "shared": another head ratio, number of codebooks, rotary base and epsilon; q/k norm in the Fast AR instead.
CASES = {
    "project": _config(10, _sizes(2, 128, 4, 2, 64, 192, True), _sizes(2, 96, 4, 2, 32, 160, False)),
    "shared": _config(
        4,
        _sizes(3, 96, 6, 2, 32, 160, False) | {"rope_base": 10000.0, "norm_eps": 1e-5},
        _sizes(2, 96, 6, 2, 16, 128, True) | {"rope_base": 10000.0, "norm_eps": 1e-5},
    ),
}
LENGTHS = {"project": 320, "shared": 40}
PREFILL = {"project": 300, "shared": 16}  # positions given at once before single steps, in the generated golden


def raw_config(case):
    return copy.deepcopy(CASES[case])


def uniform(name, shape):
    """Give float32 numbers in [-1, 1), a function of the name and nothing else."""
    count = int(np.prod(shape))
    words = np.frombuffer(hashlib.shake_256(name.encode()).digest(2 * count), dtype="<u2")
    return torch.from_numpy(words.astype(np.float32) / np.float32(32768) - np.float32(1)).reshape(shape)


def integers(name, shape, low, high):
    """Give int64 numbers in low..high-1, a function of the name and nothing else."""
    words = np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * int(np.prod(shape))), dtype="<u4")
    return torch.from_numpy(low + words.astype(np.int64) % (high - low)).reshape(shape)


def weight(case, disk_name, shape):
    """Give the float32 weight of a tensor, by its name on disk, of a size that keeps logits near 1."""
    base = uniform(f"{case}:{disk_name}", shape)
    if disk_name.endswith(("q_norm.weight", "k_norm.weight")):
        return 1.5 + 0.5 * base
    if disk_name.endswith("norm.weight"):
        return 1 + 0.25 * base
    if disk_name.endswith("embeddings.weight"):
        return 0.15 * base
    if disk_name.endswith("bias"):
        return 0.5 * base
    gain = 1.5 if disk_name.endswith(("wqkv.weight", "w1.weight", "w3.weight")) else 0.75
    return base * np.float32(gain * (3 / shape[-1]) ** 0.5)


def digest(weights):
    """Hash named float32 tensors."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(name.encode() + weights[name].contiguous().numpy().astype("<f4").tobytes())
    return sha.hexdigest()


def tokens(case):
    """Give int64 [1, 1+N, T]: runs of text and of frames; the codes at text positions are garbage."""
    config, length = CASES[case], LENGTHS[case]
    num_codebooks = config["audio_decoder_config"]["num_codebooks"]
    text = integers(f"{case}:text", (length,), 10, BEGIN)
    text[::9] = integers(f"{case}:high", (length,), END + 1, 600)[::9]  # text ids above the semantic range too
    codes = integers(f"{case}:codes", (num_codebooks, length), 0, 256)
    position = torch.arange(length)
    is_frame = (position % 13 >= 6) | (position > length - 12)
    ids = torch.where(is_frame, codes[0] + BEGIN, text)
    ids[5], ids[17], ids[18] = IM_END, BEGIN, END  # the ends of the range are frames
    codes[0, 17], codes[0, 18] = 0, 255
    return torch.cat([ids[None], codes])[None]


def stored_positions(case):
    """Name the positions that the golden keeps: all, or the first and the last 24."""
    length = LENGTHS[case]
    return list(range(length)) if length <= 48 else [*range(24), *range(length - 24, length)]


def stored_frames(case):
    """Name positions t of frames whose codes the golden scores; t - 1 is stored too."""
    length = LENGTHS[case]
    return [6, 7, 12, 17, 18, length - 11, length - 3, length - 1]


LOGIT_STEP = 7  # every seventh column of the vocabulary, and of the codes, is kept
