"""Decode codes as they come.

Legend: B batch (one slot per stream), F frames, N codebooks.

The codec is causal, so the samples of a frame are final as soon as its codes are known: there is no look-ahead, no
overlap and no cross-fade. A stream carries each convolution's left context and each attention layer's last window
of keys and values, so any chunking gives the samples of one whole decode, and its memory does not grow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2quant.codec.codec import Codec, check_codes
from s2quant.codec.memory import Memory
from s2quant.errors import UserError


class CodecStream:
    """B streams being decoded side by side, all advancing by the same number of frames per push.

    Args:
        codec: The codec; shared, not changed.
        batch_size: Number of streams B.
    """

    def __init__(self, codec: Codec, batch_size: int = 1) -> None:
        self.codec = codec
        self.memory = Memory(batch_size)

    @classmethod
    def joined(cls, rows: Sequence[tuple[CodecStream, int]]) -> CodecStream:
        """Put streams side by side, so that they can be advanced together.

        Args:
            rows: Streams of one codec, and which of each one's slots; not to be pushed any more.

        Returns:
            Streams that go on where those are, in this order.
        """
        found = cls(rows[0][0].codec, len(rows))
        found.memory = Memory.joined([(stream.memory, slot) for stream, slot in rows])
        return found

    @torch.no_grad()
    def push(self, codes: Tensor) -> Tensor:
        """Decode the next frames of every stream.

        Args:
            codes: int64 [B, N, F], F of 0 or more; not changed.

        Returns:
            float32 [B, 1, F * frame_size], the samples of these frames.

        Raises:
            UserError: The codes have another shape, are not integers, or are negative. The streams are unchanged.
        """
        codes = check_codes(codes, self.codec.num_codebooks)
        if codes.shape[0] != self.memory.batch_size:
            raise UserError(
                f"codes for {codes.shape[0]} streams",
                f"codes for {self.memory.batch_size}",
                "push one row of codes for every stream",
            )
        if codes.shape[-1] == 0:
            return torch.zeros(codes.shape[0], 1, 0, device=self.codec.device)
        return self.step(codes.to(self.codec.device))

    @torch.no_grad()
    def step(self, codes: Tensor) -> Tensor:
        """Do `push` without its checks: no device synchronisation, so it can be captured as a CUDA graph.

        Args:
            codes: int64 [B, N, F] on the codec's device, F of 1 or more, not negative.

        Returns:
            float32 [B, 1, F * frame_size].
        """
        return self.codec.decode_latent(self.codec.dequantize(codes), self.memory).float()

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Begin new streams, in place.

        Args:
            slots: Which of the B streams; None for all.
        """
        self.memory.reset(slots)

    @property
    def state_bytes(self) -> int:
        """Bytes carried from push to push; 0 before the first, constant after it."""
        return self.memory.num_bytes
