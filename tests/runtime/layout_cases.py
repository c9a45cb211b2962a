"""The kernels' layout read back: the inverse of `s2quant.runtime.kernels.layout.pack`."""

import torch
from torch import Tensor

from s2quant.runtime.kernels.layout import Packed
from s2quant.runtime.kernels.ptx import TILE


def matrix_of(packed: Packed) -> Tensor:
    """Read a packed weight back, in plain PyTorch: float32 [M, K], inputs in the order of the layout."""
    tiles, steps = packed.words.shape[:2]
    if packed.bits == 4:
        shifts = torch.arange(8, device=packed.words.device, dtype=torch.int32) * 4
        nibbles = (packed.words[..., None] >> shifts) & 15
        split = nibbles.view(tiles, steps, 2, 8, 4, 2, 2, 2, 2, 2)  # tile step half g t q s p r high
        codes = split.permute(0, 9, 3, 1, 2, 5, 4, 6, 8, 7).reshape(tiles * TILE, -1)
    else:
        shifts = torch.arange(4, device=packed.words.device, dtype=torch.int32) * 8
        split = ((packed.words[..., None] >> shifts) & 255 ^ 128).view(tiles, steps, 4, 8, 4, 2, 2, 2, 2)
        codes = split.permute(0, 8, 3, 1, 2, 4, 5, 6, 7).reshape(tiles * TILE, -1)  # of tile step q g t s n p high
    scales = packed.scales.permute(0, 4, 2, 1, 3).reshape(tiles * TILE, -1)
    wide = scales.float().repeat_interleave(packed.group_size, dim=1)
    return ((codes - (1 << packed.bits - 1)) * wide)[: packed.out_features]
