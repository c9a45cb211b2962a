"""Many utterances at a time on the fast decoder: the next frame is asked for before the last one is read.

Legend: B active slots, N codebooks, F frames.

The same utterances, slots and order as `s2quant.runtime.slots`, and the same speech. What differs is when the host
looks: one frame late. An utterance that ended has then been advanced by a frame too many; that frame is thrown away,
and the random numbers it used are used again by the utterance's next batch of text.

Every frame has all the slots, those whose utterances have ended and to which nothing more has come, too. So an
utterance's frames are made by the same kernels from its first to its last, whichever others have ended, and no kernels
are compiled for the last few utterances of a run, which takes seconds for each number of slots
(reports/2026-11-27-two-gpus).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2quant.runtime.fast import FastDecoder, Read
from s2quant.runtime.slots import Event, PrefixLength, Prompt, Utterance, finished_speech
from s2quant.runtime.speech import Request

LAG = 1  # frames that may be under way, unread, while the next one is asked for


@dataclass(kw_only=True)
class _Seated:
    """An utterance in a slot, and how far it has been asked for."""

    utterance: Utterance
    drawn: int = 0  # frames of random numbers used for good
    asked: int = 0  # frames asked for since the prompt
    turn: int = 0  # which prompt it is at; a frame of an earlier one is stale


@dataclass(frozen=True, kw_only=True)
class _Flight:
    """A frame under way: of whom, and at which prompt each was."""

    read: Read
    of: tuple[tuple[_Seated, int] | None, ...]


class LaggedSlots:
    """The slots of one run over a list of requests.

    Args:
        decoder: The fast decoder; as many slots as it has are used.
        requests: What to speak.
        batches: The texts of each request, to be spoken one after the other.
        prompt: Builds the prompt of a batch.
        prefix_length: Tells what prompts share.
    """

    def __init__(
        self,
        decoder: FastDecoder,
        requests: Sequence[Request],
        batches: Sequence[Sequence[str]],
        prompt: Prompt,
        prefix_length: PrefixLength,
    ) -> None:
        self.decoder, self.requests, self.batches, self.prompt = decoder, requests, batches, prompt
        self.prefix_length = prefix_length
        self.seats: list[_Seated] = []
        self.flights: deque[_Flight] = deque()

    @torch.inference_mode()
    def run(self) -> Iterator[Event]:
        """Speak everything.

        The mode without gradients is left at every yield, and what is yielded in a `Speech` is an ordinary tensor.

        Yields:
            Every frame, and every speech when it has ended.

        Raises:
            UserError: The first prompt of a request does not fit.
        """
        waiting = deque(range(len(self.requests)))
        while waiting or self.seats:
            while waiting and len(self.seats) < self.decoder.num_slots:
                self._seat(waiting.popleft())
            launched = self._launch()
            if self.flights and (not launched or len(self.flights) > LAG):
                flight = self.flights.popleft()
                columns = flight.read.columns()
                for number in reversed(range(len(flight.of))):
                    yield from self._take(flight.of[number], columns[number])

    def _seat(self, index: int) -> None:
        request = self.requests[index]
        utterance = Utterance.start(index, request, self.batches[index], self.decoder.device)
        self.seats.append(_Seated(utterance=utterance))
        number = len(self.seats) - 1
        self.decoder.seat(number, utterance.noise, request.sampling, request.ignore_end)
        fits = self._begin(number)
        assert fits  # a first prompt that does not fit has raised

    def _begin(self, number: int) -> bool:
        """Read a slot's next prompt; False when the conversation has grown too long for another batch."""
        seated, decoder = self.seats[number], self.decoder
        utterance = seated.utterance
        prompt = utterance.next_prompt(self.prompt)
        if prompt is None:
            return False
        length = prompt.shape[1]
        utterance.limit = utterance.frame_limit(length, decoder.max_positions)
        decoder.ensure(length + utterance.limit)
        held, prefix = utterance.take_prompt(prompt), self.prefix_length(utterance.request)
        decoder.begin(number, prompt, seated.drawn, held, prefix)
        seated.asked, seated.turn = 0, seated.turn + 1
        return True

    def _launch(self) -> bool:
        """Ask for a frame of every slot, if any has one left to make."""
        wanted = [seated.asked < seated.utterance.limit for seated in self.seats]
        if not any(wanted):
            return False
        read = self.decoder.launch(len(self.seats), self.decoder.num_slots)
        of = tuple((s, s.turn) if more else None for s, more in zip(self.seats, wanted, strict=True))
        for seated in self.seats:
            seated.asked += 1
        self.flights.append(_Flight(read=read, of=of))
        return True

    def _take(self, whose: tuple[_Seated, int] | None, column: Tensor) -> Iterator[Event]:
        """Accept a slot's column: keep the frame, begin the next batch, or end the utterance."""
        if whose is None or whose[0].turn != whose[1]:
            return  # made in vain
        seated, utterance = whose[0], whose[0].utterance
        seated.drawn += 1
        ended = int(column[0]) == self.decoder.config.im_end_id
        if not ended:
            utterance.frames.append(column[1:])
            yield utterance.index, column[1:]
            if len(utterance.frames) < utterance.limit:
                return
            utterance.stop_reason = "limit"
        utterance.end_batch(self.decoder.config.num_codebooks, self.decoder.config.semantic_begin_id)
        number = next(place for place, other in enumerate(self.seats) if other is seated)
        if len(utterance.history) < len(utterance.batches):
            if self._begin(number):
                return
            utterance.stop_reason = "full"
        seated.turn += 1
        self._free(number)
        yield finished_speech(utterance)

    def _free(self, number: int) -> None:
        """Move the last slot into a slot that has ended."""
        last = len(self.seats) - 1
        if number != last:
            self.decoder.move(last, number)
            self.seats[number] = self.seats[last]
        self.decoder.free(last)
        self.seats.pop()
