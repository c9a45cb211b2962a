"""What causal layers remember between two chunks of a stream.

Legend: B batch (one slot per stream).

A causal layer needs a fixed number of past columns, keys or partial sums. Zeros stand for "before the beginning",
exactly as zero padding does when a whole signal is processed, so a fresh memory and a reset slot are the same thing.
Buffers are made at first use, keep their size and address from then on, and are overwritten in place (so a step can
be captured as a CUDA graph after one warm-up call). Memory is for inference: gradients never pass through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes, of gathered buffers: as if each were a tensor of its own


class Memory:
    """The buffers of every causal layer that was run with it.

    Args:
        batch_size: Number of streams B, side by side in the batch axis.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._buffers: dict[tuple[nn.Module, str], Tensor] = {}
        self._whole: Tensor | None = None  # uint8, of which all buffers are parts; see `gather`

    def buffer(
        self, owner: nn.Module, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Get a layer's buffer, zeros the first time.

        Args:
            owner: The layer.
            name: Which of its buffers.
            shape: Shape without the batch axis; the same at every call.
            like: The chunk [B, ...] being processed, for device and dtype.
            dtype: Other dtype than that of `like`.

        Returns:
            [B, *shape], to be overwritten in place with what the next chunk needs.
        """
        assert not torch.is_grad_enabled(), "a memory is written in place: use torch.no_grad()"
        assert like.shape[0] == self.batch_size, (like.shape, self.batch_size)
        if (owner, name) not in self._buffers:
            assert self._whole is None, "a layer that had not been run when the memory was gathered"
            size = (self.batch_size, *shape)
            with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
                self._buffers[owner, name] = torch.zeros(size, dtype=dtype or like.dtype, device=like.device)
        return self._buffers[owner, name]

    @classmethod
    def joined(cls, rows: Sequence[tuple[Memory, int]]) -> Memory:
        """Put streams of several memories side by side, so that they can be advanced together.

        Args:
            rows: Each stream's memory and its place in that one's batch axis; not changed, and out of date once the
                new memory is used.

        Returns:
            Their memory, in this order; one that is given whole and in order is given back as it is.
        """
        first = rows[0][0]
        if len(rows) == first.batch_size and all(row == (first, place) for place, row in enumerate(rows)):
            return first
        found = cls(len(rows))
        made = {key: buffer for memory, _ in rows for key, buffer in memory._buffers.items()}
        for key, like in made.items():
            parts = [
                memory._buffers[key][place] if key in memory._buffers else torch.zeros_like(like[0])
                for memory, place in rows
            ]
            with torch.inference_mode(False):
                found._buffers[key] = torch.stack(parts)
        return found

    def gather(self) -> None:
        """Put all buffers into one tensor, where they lie from now on, so that copying them is one operation.

        To be called when every layer has been run. The buffers get new addresses.
        """
        with torch.inference_mode(False), torch.no_grad():
            device = next(iter(self._buffers.values())).device
            size = sum(_room(buffer) for buffer in self._buffers.values())
            whole = torch.zeros(size, dtype=torch.uint8, device=device)
            gathered = self._parts_of(whole)
            for key, buffer in self._buffers.items():
                gathered[key].copy_(buffer)
        self._whole, self._buffers = whole, gathered

    def _parts_of(self, whole: Tensor) -> dict[tuple[nn.Module, str], Tensor]:
        """Lay buffers such as these into a tensor, one behind the other."""
        typed: dict[torch.dtype, Tensor] = {}
        parts, start = {}, 0
        for key, like in self._buffers.items():
            if like.dtype not in typed:
                typed[like.dtype] = whole.view(like.dtype)
            offset = start // like.element_size()
            parts[key] = typed[like.dtype].as_strided(like.shape, like.stride(), offset)  # one call of torch each
            start += _room(like)
        return parts

    def clone(self) -> Memory:
        """Copy a gathered memory.

        Returns:
            The same streams, gathered too.
        """
        assert self._whole is not None, "gather it first"
        found = Memory(self.batch_size)
        with torch.inference_mode(False), torch.no_grad():
            found._whole = self._whole.clone()
            found._buffers = self._parts_of(found._whole)
        return found

    def copy_(self, other: Memory) -> None:
        """Take over the streams of another memory, in place.

        Args:
            other: Of the same codec and batch size, after a first chunk.
        """
        assert self._buffers.keys() == other._buffers.keys() and self.batch_size == other.batch_size
        if self._whole is not None and other._whole is not None and list(self._buffers) == list(other._buffers):
            self._whole.copy_(other._whole)
            return
        for key, buffer in self._buffers.items():
            buffer.copy_(other._buffers[key])

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Forget streams, in place.

        Args:
            slots: Indices in the batch axis; None for all.
        """
        if slots is None and self._whole is not None:
            self._whole.zero_()
            return
        for buffer in self._buffers.values():
            if slots is None:
                buffer.zero_()
            else:
                buffer[list(slots)] = 0

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


def _room(buffer: Tensor) -> int:
    """Count the bytes that a buffer takes in a gathered memory."""
    return -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
