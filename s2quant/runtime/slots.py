"""Many utterances at a time: each takes a slot, is prefilled, and all slots advance together, one frame at a time.

Legend: B active slots, N codebooks, F frames, T prompt positions.

The active slots are always the first ones: when an utterance ends, the last slot moves into its place and the next
request is prefilled behind it. Every utterance has its own random state, so its speech does not depend on its
neighbours. Long text is spoken batch by batch in one conversation, in the same slot and with the same random state.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2quant.errors import UserError
from s2quant.runtime.decoder import Decoder
from s2quant.runtime.prefix import num_held
from s2quant.runtime.sampler import Noise, SamplingRows
from s2quant.runtime.speech import Request, Speech, StopReason

Prompt = Callable[[Request, str, Sequence[tuple[str, Tensor]]], Tensor]
"""(request, text of the batch, batches spoken already with their codes [N, F]) -> int64 [1+N, T]."""
PrefixLength = Callable[[Request], int]
"""How many first positions of a request's prompts other requests may share."""
Event = tuple[int, Tensor] | Speech
"""One frame, int64 [N] on the CPU, with its request's index; or a whole speech."""


@dataclass(kw_only=True)
class Utterance:
    """One utterance in progress.

    Args:
        index: The request's place in the list.
        request: The request.
        batches: Its texts, to be spoken one after the other.
        noise: Its random numbers.
        started: When it took its slot.
        history: Batches that are spoken, with their codes int64 [N, F].
        frames: int64 [N] each, of the batch in progress.
        position: Where the last column goes.
        limit: Most frames of the batch in progress.
        num_prompt_tokens: Positions of its prompts so far.
        stop_reason: See `Speech`.
        held: int64 [1+N, T], what the slot's first keys and values are of; None before the first prompt.
    """

    index: int
    request: Request
    batches: Sequence[str]
    noise: Noise
    started: float
    history: list[tuple[str, Tensor]] = field(default_factory=list)
    frames: list[Tensor] = field(default_factory=list)
    position: int = 0
    limit: int = 0
    num_prompt_tokens: int = 0
    stop_reason: StopReason = "end"
    held: Tensor | None = None

    @classmethod
    def start(cls, index: int, request: Request, batches: Sequence[str], device: torch.device) -> Utterance:
        """Give a request its random state and start its clock.

        Args:
            index: The request's place in the list.
            request: The request.
            batches: Its texts.
            device: Of the random state.

        Returns:
            The utterance, without a prompt.
        """
        noise = Noise(torch.Generator(device).manual_seed(request.seed))
        return cls(index=index, request=request, batches=batches, noise=noise, started=time.perf_counter())

    def next_prompt(self, build: Prompt) -> Tensor | None:
        """Build the prompt of the next batch.

        Args:
            build: Builds it.

        Returns:
            int64 [1+N, T], or None when the conversation has grown too long for another batch.

        Raises:
            UserError: The first prompt does not fit.
        """
        try:
            prompt = build(self.request, self.batches[len(self.history)], self.history)
        except UserError:
            if not self.history:
                raise
            return None  # text and voices were checked before: only the length can be wrong
        most = self.request.max_positions
        return None if self.history and most is not None and prompt.shape[1] >= most else prompt

    def frame_limit(self, length: int, most: int) -> int:
        """Say how many frames the next batch may have.

        Args:
            length: Positions of its prompt.
            most: Positions that the model has.

        Returns:
            Their number, 1 or more.
        """
        asked = self.request.max_positions
        room = most - length if asked is None else max(1, min(most, asked) - length)
        return min(self.request.max_frames, room)

    def end_batch(self, num_codebooks: int, semantic_begin_id: int) -> None:
        """Put the frames of the batch in progress into the history.

        Args:
            num_codebooks: N.
            semantic_begin_id: Token id of semantic code 0.
        """
        empty = torch.zeros(num_codebooks, 0, dtype=torch.int64)
        codes = torch.stack(self.frames, dim=1) if self.frames else empty
        assert self.held is not None
        columns = torch.cat([self.held, torch.cat([codes[:1] + semantic_begin_id, codes])], dim=1)
        self.held = columns[:, :-1]  # the last column need not have been fed
        self.history.append((self.batches[len(self.history)], codes))
        self.frames = []

    def take_prompt(self, prompt: Tensor) -> int:
        """Begin the next batch.

        Args:
            prompt: int64 [1+N, T].

        Returns:
            How many first positions the slot holds already.
        """
        held, self.held = num_held(self.held, prompt), prompt
        self.num_prompt_tokens += prompt.shape[1]
        return held


class Slots:
    """The slots of one run over a list of requests.

    Args:
        decoder: The cached model; as many slots as it has are used.
        requests: What to speak.
        batches: The texts of each request, to be spoken one after the other.
        prompt: Builds the prompt of a batch.
        prefix_length: Tells what prompts share.
    """

    def __init__(
        self,
        decoder: Decoder,
        requests: Sequence[Request],
        batches: Sequence[Sequence[str]],
        prompt: Prompt,
        prefix_length: PrefixLength,
    ) -> None:
        self.decoder, self.requests, self.batches, self.prompt = decoder, requests, batches, prompt
        self.prefix_length = prefix_length
        self.slots: list[Utterance] = []
        self.columns = torch.zeros(
            decoder.num_slots, 1 + decoder.config.num_codebooks, dtype=torch.int64, device=decoder.device
        )
        self._rows: SamplingRows | None = None  # of the slots as they are; None after a change

    @torch.inference_mode()
    def run(self) -> Iterator[Event]:
        """Speak everything.

        The mode without gradients is left at every yield, and what is yielded in a `Speech` is an ordinary tensor.

        Yields:
            Every frame as it is drawn, and every speech when it has ended.

        Raises:
            UserError: The first prompt of a request does not fit.
        """
        waiting = deque(range(len(self.requests)))
        while waiting or self.slots:
            while waiting and len(self.slots) < self.decoder.num_slots:
                index = waiting.popleft()
                request, batches = self.requests[index], self.batches[index]
                self.slots.append(Utterance.start(index, request, batches, self.decoder.device))
                self._rows = None
                number = len(self.slots) - 1
                yield from self._take(number, self._prefill(number))
            if not self.slots:
                continue
            columns = self._step()
            for number in reversed(range(len(self.slots))):  # the last slot, which may move, has been taken already
                yield from self._take(number, columns[number])

    def _step(self) -> Tensor:
        """Advance all active slots by one frame: their columns int64 [B, 1+N], on the CPU."""
        count = len(self.slots)
        if self._rows is None:
            self._rows = _rows([slot.request for slot in self.slots], self.decoder.device)
        hidden = self.decoder.step(self.columns[:count], [slot.position for slot in self.slots])
        noises = [slot.noise for slot in self.slots]
        self.columns[:count] = self.decoder.sample(hidden, self._rows, noises, slice(count), first=False)
        return self.columns[:count].to("cpu", copy=True)  # the one wait for the device

    def _prefill(self, number: int) -> Tensor | None:
        """Read a slot's next batch of text and draw the first frame.

        Args:
            number: The slot.

        Returns:
            Its column int64 [1+N] on the CPU, or None when the conversation has grown too long for another batch.

        Raises:
            UserError: The first prompt does not fit.
        """
        slot, decoder = self.slots[number], self.decoder
        prompt = slot.next_prompt(self.prompt)
        if prompt is None:
            return None
        length = prompt.shape[1]
        slot.limit = slot.frame_limit(length, decoder.config.slow.max_seq_len)
        slot.position = length - 1
        decoder.cache.ensure(length + slot.limit)
        hidden = decoder.prefill(number, prompt, slot.take_prompt(prompt), self.prefix_length(slot.request))
        rows = _rows([slot.request], decoder.device)
        where = slice(number, number + 1)
        self.columns[where] = decoder.sample(hidden, rows, [slot.noise], where, first=True)
        return self.columns[number].to("cpu", copy=True)

    def _take(self, number: int, column: Tensor | None) -> Iterator[Event]:
        """Accept a slot's new column: keep the frame, begin the next batch, or end the utterance.

        Args:
            number: The slot.
            column: From `_step` or `_prefill`.

        Yields:
            The frame, if it is one, and the speech, if it has ended.
        """
        slot = self.slots[number]
        while column is not None:
            slot.position += 1
            ended = int(column[0]) == self.decoder.config.im_end_id
            if not ended:
                slot.frames.append(column[1:])
                yield slot.index, column[1:]
                if len(slot.frames) < slot.limit:
                    return
                slot.stop_reason = "limit"
            slot.end_batch(self.decoder.config.num_codebooks, self.decoder.config.semantic_begin_id)
            if len(slot.history) == len(slot.batches):
                break
            column = self._prefill(number)
        if len(slot.history) < len(slot.batches):
            slot.stop_reason = "full"
        self._free(number)
        yield finished_speech(slot)

    def _free(self, number: int) -> None:
        """Move the last slot into a slot that has ended."""
        last = len(self.slots) - 1
        if number != last:
            self.decoder.move(last, number, self.slots[last].position)
            self.columns[number] = self.columns[last]
            self.slots[number] = self.slots[last]
        self.slots.pop()
        self._rows = None


def _rows(requests: Sequence[Request], device: torch.device) -> SamplingRows:
    ignore_end = [request.ignore_end for request in requests]
    return SamplingRows.of([request.sampling for request in requests], device, ignore_end)


def finished_speech(slot: Utterance) -> Speech:
    """Sum up an utterance that has ended.

    Args:
        slot: The utterance.

    Returns:
        Its speech; the codes are an ordinary tensor on the CPU.
    """
    with torch.inference_mode(False):  # the caller may write to the codes
        codes = torch.cat([part for _, part in slot.history], dim=1)
    return Speech(
        index=slot.index,
        codes=codes,
        stop_reason=slot.stop_reason,
        batch_frames=tuple(part.shape[1] for _, part in slot.history),
        num_prompt_tokens=slot.num_prompt_tokens,
        seconds=time.perf_counter() - slot.started,
    )
