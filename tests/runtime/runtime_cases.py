"""Small situations with numbers that any machine can recompute, for the runtime's tests and their golden generator.

Models, prompts and the hash-based numbers are those of the model's tests. Needs nothing but torch and numpy: the
generator imports it too.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from model_cases import BEGIN, END, IM_END, raw_config, tokens, uniform, weight  # noqa: F401

NUM_SEMANTIC = END - BEGIN + 1
RESIDUAL_SIZE = 256  # of both models; below 1024, where masking the residual logits changes nothing

# Whole speeches: model, prompt positions, seed, temperature, top_p, top_k, max_frames.
SPEECHES = (
    ("project", 20, 1, 0.8, 0.8, 30, 150),
    ("project", 37, 2, 1.0, 0.9, 30, 150),
    ("project", 9, 3, 0.3, 0.35, 8, 70),
    ("project", 300, 4, 1.3, 1.0, 60, 250),
    ("project", 16, 5, 0.7, 0.6, 20, 2),
    ("shared", 12, 72, 0.9, 0.7, 25, 150),
    ("shared", 31, 7, 1e-6, 0.8, 30, 20),
    ("shared", 25, 63, 1.0, 0.95, 40, 150),
)


def draws(seed, frame, count):
    """Give float32 [count] in [0, 1) for one frame of one speech, a function of seed and frame and nothing else."""
    raw = hashlib.shake_256(f"draws:{seed}:{frame}".encode()).digest(4 * count)
    words = np.frombuffer(raw, dtype="<u4") >> 8
    return torch.from_numpy(words.astype(np.float32) / np.float32(1 << 24))


def prompt(case, length):
    """Give int64 [1+N, length]: the beginning of the model tests' sequence."""
    return tokens(case)[0, :, :length].clone()


def filter_cases():
    """Give (name, logits float32 [V], temperature, top_p, top_k) to be filtered."""
    found = []
    for number in range(60):
        spread = (0.5, 2.0, 6.0)[number % 3]
        size = (50, 257, 300)[number // 3 % 3]
        logits = spread * (uniform(f"filter:{number}", (size,)) + uniform(f"filter:b:{number}", (size,)))
        temperature = (0.8, 1.0, 0.1, 1.7, 1e-6, 0.5)[number % 6]
        top_p = (0.8, 0.9, 0.3, 0.99, 0.05, 0.6, 1.0)[number % 7]
        top_k = (30, 5, 1, 400, 12)[number % 5]
        if number % 10 == 9:
            logits[::2] = float("-inf")
        found.append((f"filter.{number}", logits, temperature, top_p, top_k))
    return found


NUM_SWAPS = 300
SWAP_SEMANTIC = 24


def swap_case(number):
    """Give logits float32 [25], window int64 [10], temperature, top_p, top_k, uniform float32 [2, 25] of one draw."""
    logits = 2.5 * uniform(f"swap:{number}", (SWAP_SEMANTIC + 1,))
    logits[SWAP_SEMANTIC] += (0.0, 2.0, 4.0)[number % 3]
    raw = hashlib.shake_256(f"window:{number}".encode()).digest(10)
    window = torch.tensor(list(raw)) % (SWAP_SEMANTIC + 1)  # im_end too: it must not count as a repetition
    window[: number % 8] = -1
    noise = draws(10_000 + number, 0, 2 * (SWAP_SEMANTIC + 1)).view(2, -1)
    return logits, window, (0.8, 0.3, 1.2)[number % 3], (0.8, 0.95)[number % 2], (30, 10)[number % 2], noise


def quantized_weight(out_features, in_features, group_size=32, bits=4, seed=0, shuffled=True):
    """Make a random quantized weight, of scales that keep the output near the input; act order shuffles g_idx."""
    from s2quant.packing import QuantizedWeight  # the golden generator runs without s2quant

    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group_size
    g_idx = torch.arange(in_features) // group_size
    if shuffled:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    unit = 1 / (2 ** (bits - 1) * in_features**0.5)
    return QuantizedWeight(
        codes=torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8),
        scales=(unit * (0.5 + torch.rand(groups, out_features, generator=generator))).half(),
        zeros=torch.full((groups, out_features), 2 ** (bits - 1), dtype=torch.uint8),
        g_idx=g_idx.int(),
        bits=bits,
        group_size=group_size,
    )


def passes_in_the_interpreter(path):
    """Run a test file in a process in which Triton interprets its kernels."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path]
    found = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-5000:]
    assert " passed" in found.stdout and "failed" not in found.stdout
