"""A codec.pth of random weights, for tests and benchmarks.

Each tensor is drawn from a generator of its own, seeded by its key, so it does not depend on the order of keys or on
the other tensors. Uniform numbers are used because they are the same bits on every machine. The scales keep the
signal's size through both halves: codes of noise and speech spread over the codebooks, and decoded random codes are
audible and not saturated.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import Tensor

from s2quant.codec.config import CodecConfig
from s2quant.codec.layout import HOOKED, PARAMETRIZED, file_shapes

# Root mean square of a weight's output over that of its input, first match wins; 1 for all others.
_GAINS = (
    (r"(encoder|decoder)\..*\.block\.\d\.block\.3\.conv", 0.4),  # the end of each residual unit
    (r"encoder\.block\.0\.conv", 6.0),  # speech has a root mean square near 0.1
    (r"decoder\.model\.[1-9]\d*\.conv", 0.3),  # the last one: its tanh must not saturate
)


def random_codec_state(config: CodecConfig, seed: int) -> dict[str, Tensor]:
    """Draw a codec of random weights.

    Args:
        config: Sizes.
        seed: The same seed gives the same bits.

    Returns:
        float32 tensors by key, exactly the keys and shapes of a codec.pth without its masks and rotary tables.
    """
    return {key: random_tensor(key, shape, seed) for key, shape in file_shapes(config).items()}


def random_tensor(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw one tensor of a codec.pth by the role that its key gives it.

    Args:
        key: Its key.
        shape: Its shape.
        seed: The same seed gives the same bits.

    Returns:
        float32, of that shape.
    """
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    unit = torch.rand(shape, generator=generator) * 2 - 1  # variance 1/3
    if key.endswith("norm.weight"):
        return 1 + 0.2 * unit
    if key.endswith(".alpha"):
        return 1 + 0.5 * unit
    if key.endswith(".gamma"):
        return 0.3 + 0.1 * unit
    if key.endswith(".codebook.weight"):
        return unit
    if key.endswith(".bias"):
        return 0.02 * unit
    stem = re.sub(r"(\.parametrizations\.weight\.original[01]|\.weight(_[gv])?)$", "", key)
    gain = next((gain for pattern, gain in _GAINS if re.fullmatch(pattern, stem)), 1.0)
    if key.endswith((PARAMETRIZED[0], HOOKED[0])):  # g, the length of each row of W
        return gain * (1 + 0.1 * unit)
    fan_in = math.prod(shape[1:])
    return gain * math.sqrt(3 / fan_in) * unit
