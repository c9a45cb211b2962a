"""The engine: requests in, codes and sound out.

Legend: B slots, T prompt positions, F frames, N codebooks, S samples.

Requests wait in order; each takes a slot, is prefilled, and then all active slots advance one frame at a time.
A slot whose utterance ends takes the next request at once (see `s2quant.runtime.slots`). Long text is spoken batch
by batch in one conversation (turns of several speakers, see `s2quant.prompt`).
A request that cannot be spoken is refused before anything is computed, when it is handed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from s2quant.codec import Codec
from s2quant.errors import UserError, shorten_list
from s2quant.model import DualAR
from s2quant.prompt import (
    Conversation,
    Tokenizer,
    Voice,
    build_prompt,
    check_text,
    prompt_budget,
    split_text,
    system_message,
)
from s2quant.runtime import memory
from s2quant.runtime.audio import read_reference
from s2quant.runtime.chunk_graphs import CODEC_GRAPHS, ChunkGraphs
from s2quant.runtime.decoder import Decoder
from s2quant.runtime.fast import FastDecoder
from s2quant.runtime.lagged import LaggedSlots
from s2quant.runtime.prefix import PREFIX_BYTES, PrefixCache
from s2quant.runtime.prompt_graphs import PROMPT_GRAPHS, reads_together
from s2quant.runtime.resting import RestingDecoders
from s2quant.runtime.slots import Event, Slots
from s2quant.runtime.speech import DECODERS, DEFAULT_MAX_FRAMES, DecoderKind, Request, Speech, decoder_for
from s2quant.runtime.streaming import Chunk, decoded
from s2quant.runtime.voices import VoiceCache
from s2quant.sampling import Sampling, sampling_faults

RELEASED_RESIDUAL_SIZE = 1024  # entries of a residual codebook of the released codec


class Engine:
    """Speaks with one model.

    Args:
        model: The model, in eval mode, on its device.
        tokenizer: Its tokenizer.
        codec: Its codec, or None when only codes are wanted.
        num_slots: Most utterances in progress at a time.
        decoder: "plain": one operation after the other, read at every frame; "fast": the frame as one replayed
            graph, read a frame late (`s2quant.runtime.fast`). Both give the same speech up to rounding. "auto": fast
            on a CUDA device, else plain.
        prefix_bytes: Most bytes of keys and values kept of what prompts begin with; 0 keeps none. The speech of a
            seed is the same, to the last bit, whatever is kept.
        residual_size: Entries of a residual codebook where there is no codec to say it.
        prompt_graphs: Whether the fast decoder reads prompts in padded pieces, on a GPU as graphs
            (`s2quant.runtime.prompt_graphs`); None: as measured to be better (PROMPT_GRAPHS), on a CUDA device.
        codec_graphs: Whether streams have chunks decoded by graphs (`s2quant.runtime.chunk_graphs`); None: as measured
            to be better (CODEC_GRAPHS), on a CUDA device.
        prompts_together: Whether prompts that begin before the same frame are read together, with the same bits; None:
            as measured to be better (PROMPTS_TOGETHER), where they can.

    Raises:
        UserError: num_slots is not positive, the decoder is unknown, or something that is asked for cannot be done.
    """

    def __init__(
        self,
        model: DualAR,
        tokenizer: Tokenizer,
        codec: Codec | None = None,
        num_slots: int = 8,
        decoder: DecoderKind = "auto",
        prefix_bytes: int = PREFIX_BYTES,
        residual_size: int = RELEASED_RESIDUAL_SIZE,
        prompt_graphs: bool | None = None,
        codec_graphs: bool | None = None,
        prompts_together: bool | None = None,
    ) -> None:
        if decoder not in DECODERS:
            raise UserError(f"decoder {decoder!r}", f"one of {', '.join(DECODERS)}", "name one of these")
        if num_slots < 1:
            raise UserError(f"{num_slots} slots", "1 or more", "raise the number of utterances in progress")
        self.model, self.tokenizer, self.codec, self.config = model, tokenizer, codec, model.config
        self.device = model.slow.embeddings.weight.device
        if codec_graphs and self.device.type != "cuda":
            raise UserError(f"graphs of a codec on {self.device}", "a CUDA device", "leave codec graphs out")
        self.num_slots, self.decoder = num_slots, decoder_for(decoder, self.device)
        if prompt_graphs and self.decoder == "plain":
            raise UserError("prompt graphs and the plain decoder", "the fast decoder", "choose it, or leave them out")
        on_cuda = self.device.type == "cuda"
        self.prompt_graphs = PROMPT_GRAPHS and on_cuda if prompt_graphs is None else prompt_graphs
        self.codec_graphs = CODEC_GRAPHS and on_cuda if codec_graphs is None else codec_graphs
        self._chunk_graphs: ChunkGraphs | None = None  # captured when the first stream begins
        self.prefixes = PrefixCache(prefix_bytes)
        self.voices: VoiceCache | None = None
        self._resting = RestingDecoders.on(self.device)
        if codec is not None:
            residual_size = codec.config.residual_size
        self.residual_size = min(residual_size, self.config.codebook_size)
        by_pieces = self.prompt_graphs and self.decoder == "fast"
        self.prompts_together = reads_together(prompts_together, by_pieces, model, self.residual_size)

    # ---- requests ----------------------------------------------------------------------------------------------

    def voice(self, path: Path, text: str) -> Voice:
        """Encode a reference recording, or take its codes from the cache of voices if the engine has one.

        Args:
            path: An audio file.
            text: Its transcript.

        Returns:
            The voice.

        Raises:
            UserError: The recording or the transcript cannot be used, or the engine has no codec.
        """
        codec = self._need_codec()
        check_text(text, tokenizer=self.tokenizer)
        doing, todo = "encoding a recording", "use a shorter recording, or give up other engines first"

        def encode() -> Tensor:
            audio = read_reference(path, codec.sample_rate)
            return memory.guarded(
                lambda: codec.encode(audio[None, None].to(codec.device))[0].cpu(), doing, todo, self.release
            )

        return Voice(text=text, codes=encode() if self.voices is None else self.voices.codes(path, encode))

    def keep_voices(self, folder: Path | None, codec_file: Path) -> None:
        """Keep the codes of recordings on disk from now on, or no longer.

        Args:
            folder: Where, see `s2quant.runtime.voices`; None keeps nothing.
            codec_file: The engine's codec.pth, or the folder that holds it.

        Raises:
            UserError: The engine has no codec.
        """
        self.voices = None
        if folder is not None:
            self.voices = VoiceCache(folder, codec_file, self._need_codec(), self.tokenizer.num_semantic)

    def prepare(self, request: Request) -> list[str]:
        """Check a request and split its text into batches.

        Args:
            request: The request.

        Returns:
            The texts to be spoken one after the other.

        Raises:
            UserError: The text, a voice or a parameter cannot be used.
        """
        faults = sampling_faults(request.sampling, "sampling")
        if request.max_frames < 1:
            faults.append(f"max_frames is {request.max_frames}, not positive")
        if request.max_positions is not None and request.max_positions < 1:
            faults.append(f"max_positions is {request.max_positions}, not positive")
        if not -(2**63) <= request.seed < 2**64:
            faults.append(f"seed is {request.seed}, not a 64-bit integer")
        if faults:
            raise UserError(shorten_list(faults), "sampling parameters in range", "correct them")
        check_text(request.text, request.text_policy, self.tokenizer)
        batches = split_text(request.text, request.chunk_bytes, split_sentences=request.split_sentences)
        self._prompt(request, batches[0], [])
        return batches

    def _prompt(self, request: Request, text: str, history: Sequence[tuple[str, Tensor]]) -> Tensor:
        """Build one batch's prompt, checked to leave room to speak: int64 [1+N, T]."""
        return build_prompt(
            self.tokenizer,
            text,
            request.voices,
            history,
            self.config.num_codebooks,
            policy=request.text_policy,
            max_tokens=prompt_budget(self.config),
            codebook_size=self.config.codebook_size,
        )

    def _prefix_length(self, request: Request) -> int:
        """Count the positions that all prompts with these voices begin with."""
        prefix = Conversation(messages=[system_message(request.voices)])
        return prefix.encode(self.tokenizer, self.config.num_codebooks).shape[1]

    def spoken_sequence(self, request: Request, codes: Sequence[Tensor]) -> Tensor:
        """Put together what the model saw when it spoke: the last prompt, the frames drawn for it, im_end.

        Args:
            request: What was spoken.
            codes: int64 [N, F] for each batch that was spoken, or nothing for the first prompt alone.

        Returns:
            int64 [1+N, T].

        Raises:
            UserError: The request cannot be spoken.
        """
        batches = self.prepare(request)
        if not codes:
            return self._prompt(request, batches[0], [])
        last = len(codes) - 1  # not always the last batch: see stop_reason "full"
        prompt = self._prompt(request, batches[last], list(zip(batches[:last], codes[:last], strict=True)))
        frames = torch.cat([codes[-1][:1] + self.config.semantic_begin_id, codes[-1]])
        end = torch.zeros(len(frames), 1, dtype=torch.int64)
        end[0] = self.config.im_end_id
        return torch.cat([prompt, frames, end], dim=1)

    def next_prompt(self, request: Request, codes: Sequence[Tensor]) -> Tensor | None:
        """Put together what the model would have seen next, had it spoken on.

        Args:
            request: What was spoken.
            codes: int64 [N, F] for each batch that was spoken.

        Returns:
            int64 [1+N, T], the prompt of the next batch; None if there is none, or the model has no room for it.
        """
        batches = self.prepare(request)
        if len(codes) == len(batches):
            return None
        try:
            return self._prompt(request, batches[len(codes)], list(zip(batches, codes, strict=False)))
        except UserError:
            return None  # text and voices were checked before: only the length can be wrong

    # ---- speaking ----------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> Iterator[Speech]:
        """Speak many requests, several at a time.

        Args:
            requests: What to speak.

        Returns:
            One speech per request, as they end; `.index` tells which. They are made while they are asked for.

        Raises:
            UserError: A request cannot be spoken; raised before any is.
        """
        return (event for event in self.events(requests) if isinstance(event, Speech))

    def events(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Speak many requests, several at a time, and give every frame.

        Args:
            requests: What to speak.

        Returns:
            Each frame, with its request's index, as it is known, and each speech as it ends; made while asked for.

        Raises:
            UserError: A request cannot be spoken; raised before any is.
        """
        batches, num_slots = [self.prepare(request) for request in requests], min(self.num_slots, len(requests))
        make = self._fast_events if self.decoder == "fast" else self._plain_events
        doing = f"speaking, up to {num_slots} at a time"
        return memory.guarded_iterator(make(num_slots, requests, batches), doing, memory.SPEAKING_TODO, self.release)

    def _plain_events(
        self, num_slots: int, requests: Sequence[Request], batches: Sequence[Sequence[str]]
    ) -> Iterator[Event]:
        """Speak on a plain decoder, made for this run."""
        decoder = Decoder(self.model, num_slots, 0, self.residual_size, self.prefixes)
        yield from Slots(decoder, requests, batches, self._prompt, self._prefix_length).run()

    def _fast_events(
        self, num_slots: int, requests: Sequence[Request], batches: Sequence[Sequence[str]]
    ) -> Iterator[Event]:
        """Speak on the fast decoder: one at rest that has this many slots, or a new one."""
        decoder = self._resting.take(num_slots, self.model)
        if decoder is None:
            how = {"prompt_graphs": self.prompt_graphs, "prompts_together": self.prompts_together}
            decoder = FastDecoder(self.model, num_slots, 0, self.residual_size, **how)
            decoder.prefixes = self.prefixes
        try:
            yield from LaggedSlots(decoder, requests, batches, self._prompt, self._prefix_length).run()
        except GeneratorExit:  # nobody wants the rest
            self._resting.put(decoder)
            raise
        self._resting.put(decoder)  # not after an error: who knows what state it is in

    def speak(self, request: Request) -> Speech:
        """Speak one request.

        Args:
            request: What to speak.

        Returns:
            The speech.

        Raises:
            UserError: The request cannot be spoken.
        """
        return next(self.generate([request]))

    def stream(
        self,
        text: str,
        voice: Voice | Sequence[Voice] | None = None,
        seed: int = 0,
        sampling: Sampling | None = None,
        max_frames: int = DEFAULT_MAX_FRAMES,
    ) -> Iterator[Tensor]:
        """Speak one text and give its sound while it is being made.

        The chunks, put together, are what `decode` makes of all codes: the codec keeps exact state.

        Args:
            text: The text.
            voice: Reference voice or voices.
            seed: Seed.
            sampling: Sampling parameters; None means the defaults.
            max_frames: Most frames per batch of text.

        Returns:
            float32 [s] on the CPU, in growing chunks, made while they are asked for.

        Raises:
            UserError: The text cannot be spoken, or the engine has no codec.
        """
        voices = () if voice is None else (voice,) if isinstance(voice, Voice) else tuple(voice)
        request = Request(text=text, voices=voices, seed=seed, sampling=sampling or Sampling(), max_frames=max_frames)
        return (audio for audio, _ in self.stream_request(request) if len(audio))

    def stream_request(self, request: Request) -> Iterator[tuple[Tensor, Speech | None]]:
        """Stream one request, with the whole speech beside the last chunk.

        Args:
            request: What to speak.

        Returns:
            Chunks of float32 [s] on the CPU, each with None, but the last with the speech (the chunk may be empty).

        Raises:
            UserError: The request cannot be spoken, or the engine has no codec.
        """
        chunks = self.stream_requests([request])
        return ((chunk.audio, chunk.speech) for chunk in chunks)

    def stream_requests(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        """Stream many requests, several at a time.

        Args:
            requests: What to speak.

        Returns:
            Chunks of all requests, those of one in order, as they are ready; made while they are asked for.

        Raises:
            UserError: A request cannot be spoken, or the engine has no codec; raised before any is spoken.
        """
        codec, events, alone = self._need_codec(), self.events(requests), len(requests) == 1
        if self.codec_graphs and self._chunk_graphs is None:
            doing = "capturing the codec's graphs"
            self._chunk_graphs = memory.guarded(lambda: ChunkGraphs(codec), doing, memory.SPEAKING_TODO, self.release)
        chunks = decoded(codec, events, alone, self._chunk_graphs)
        return memory.guarded_iterator(chunks, "decoding sound", memory.SPEAKING_TODO, self.release)

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into sound.

        Args:
            codes: int64 [N, F].

        Returns:
            float32 [S] on the CPU; empty when F is 0.

        Raises:
            UserError: The engine has no codec.
        """
        codec = self._need_codec()
        if codes.shape[1] == 0:
            return torch.zeros(0)
        doing, todo = "decoding sound", "stream it, or speak fewer frames"
        return memory.guarded(
            lambda: codec.decode(codes[None].to(codec.device)).float().cpu()[0, 0], doing, todo, self.release
        )

    def release(self) -> None:
        """Give back what the engine holds beside model and codec: resting decoders' caches, graphs, prefixes."""
        self._resting.clear()
        self._chunk_graphs = None
        self.prefixes.clear()
        memory.release_memory()

    def _need_codec(self) -> Codec:
        if self.codec is None:
            raise UserError("an engine without a codec", "a checkpoint folder with codec.pth", "load it with its codec")
        return self.codec
