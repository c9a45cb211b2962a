"""Fast decoders at rest: their graphs outlive a run, so that the next one of as many slots captures nothing.

A decoder has as many slots as its run had utterances at a time. Runs of one, eight and one again would otherwise make
three decoders, each with graphs of its own to capture, seconds in all.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from s2quant.model import DualAR
from s2quant.runtime.fast import FastDecoder

SHARE = 1 / 32  # of a GPU's memory, for keys and values of decoders at rest while another one is made
MOST_DECODERS = 3  # each has graphs, vectors and room for prompts of its own (90 MB at the real size), not counted


class RestingDecoders:
    """The decoders that were used last, one for each number of slots.

    The one used last is kept whatever it has, until one of other slots is wanted.

    Args:
        most_bytes: Of the keys and values of all that are kept while another decoder is made, or beside the newest.
    """

    def __init__(self, most_bytes: float = 0) -> None:
        self.most_bytes = most_bytes
        self._kept: OrderedDict[int, FastDecoder] = OrderedDict()

    @classmethod
    def on(cls, device: torch.device) -> RestingDecoders:
        """Make room as the device has it; on a CPU, where nothing is captured, for one.

        Args:
            device: The device.

        Returns:
            No decoders as yet.
        """
        if device.type != "cuda":
            return cls()
        allowed = torch.cuda.get_per_process_memory_fraction(device)
        return cls(SHARE * allowed * torch.cuda.get_device_properties(device).total_memory)

    @property
    def newest(self) -> FastDecoder | None:
        """The one used last, if there is one."""
        return next(reversed(self._kept.values()), None)

    def take(self, num_slots: int, model: DualAR) -> FastDecoder | None:
        """Take a decoder to speak with it.

        Args:
            num_slots: Its slots.
            model: Its model; those of another are given up.

        Returns:
            The decoder, which is not kept here meanwhile; None: there is none, and what is kept has made room for one.
        """
        for slots in [slots for slots, decoder in self._kept.items() if decoder.model is not model]:
            del self._kept[slots]
        found = self._kept.pop(num_slots, None)
        if found is None:
            self._make_room(0)
        return found

    def put(self, decoder: FastDecoder) -> None:
        """Keep a decoder, and give up what there is no room for, those first that were used longest ago.

        Args:
            decoder: The decoder; its run has ended.
        """
        self._kept.pop(decoder.num_slots, None)
        self._kept[decoder.num_slots] = decoder
        self._make_room(1)

    def _make_room(self, spared: int) -> None:
        """Give up decoders, those first that were used longest ago, until the others are few and small enough.

        Args:
            spared: Of the newest, kept whatever they have.
        """
        while len(self._kept) > spared and (
            len(self._kept) > MOST_DECODERS
            or sum(kept.cache.num_bytes for kept in self._kept.values()) > self.most_bytes
        ):
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Give up all."""
        self._kept.clear()
