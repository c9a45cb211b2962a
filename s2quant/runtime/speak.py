"""The job of `s2quant speak`: one text to a wav file or to a stream of raw PCM, and the codes beside it.

A file appears when it is complete. Raw PCM is 16-bit little-endian mono at the codec's rate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from s2quant.errors import UserError, VerificationError, shorten_list
from s2quant.files import atomic_file, check_new
from s2quant.runtime.audio import pcm_bytes, write_chunks
from s2quant.runtime.backends import describe_decoding
from s2quant.runtime.engine import Engine
from s2quant.runtime.linears import Backend
from s2quant.runtime.load import DTYPES
from s2quant.runtime.loading import load_engine
from s2quant.runtime.speech import DEFAULT_MAX_FRAMES, DecoderKind, Request, Speech
from s2quant.sampling import Sampling, sampling_faults


@dataclass(frozen=True, kw_only=True)
class SpeakOptions:
    """What `s2quant speak` is asked for.

    Args:
        text: The text.
        model: A checkpoint folder.
        out: A file for wav, or None for raw PCM.
        device: cpu, cuda or cuda:N.
        dtype: Name of the model's dtype.
        linears: Backend of quantized linears.
        decoder: How frames are made, see `Engine`.
        voices: Pairs of recording and transcript, in the order of the speakers.
        seed: Seed.
        temperature: See `Sampling`.
        top_p: See `Sampling`.
        top_k: See `Sampling`.
        max_frames: Most frames per batch of text.
        split_sentences: Whether long text is spoken sentence by sentence.
        escape: Whether control tokens in the text are read as characters.
        stream: Whether sound is decoded and written while it is being made.
        codes_out: Where to write the codes, or None.
        overwrite: Whether existing files are replaced.
        voice_cache: A folder where codes of recordings are kept; None encodes them anew.
        memory_limit_gb: The most memory of the GPU, in 10^9 bytes; None: all of it.
        low_memory: Whether the codec's encoder rests on the host.
    """

    text: str
    model: Path
    out: Path | None
    device: str = "cpu"
    dtype: str = "bfloat16"
    linears: Backend = "auto"
    decoder: DecoderKind = "auto"
    voices: tuple[tuple[Path, str], ...] = ()
    seed: int = 0
    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 30
    max_frames: int = DEFAULT_MAX_FRAMES
    split_sentences: bool = False
    escape: bool = False
    stream: bool = False
    codes_out: Path | None = None
    overwrite: bool = False
    voice_cache: Path | None = None
    memory_limit_gb: float | None = None
    low_memory: bool = False


def speak_to(options: SpeakOptions, stdout: BinaryIO) -> dict[str, Any]:
    """Speak a text.

    Args:
        options: What to do.
        stdout: Where raw PCM goes when there is no file.

    Returns:
        num_frames, audio_s, seconds, rtf, first_audio_s (None unless streamed), stop_reason, seed, sample_rate,
        voices_s (reading and encoding the recordings, before the clock of `seconds` starts), voices_kept (how many
        of them the cache had), notes (what to tell about the cache), peak_device_bytes (of torch's tensors, loading
        included; None on a CPU), decoding (see `describe_decoding`).

    Raises:
        UserError: Something in the input cannot be used; no file is left.
        VerificationError: The model ended before the first frame, or its sound is not finite.
    """
    sampling = _checked_sampling(options)
    engine = load_engine(
        options.model,
        options.device,
        options.dtype,
        options.linears,
        1,
        options.decoder,
        voice_cache=options.voice_cache,
        memory_limit_bytes=None if options.memory_limit_gb is None else options.memory_limit_gb * 1e9,
        encoder_on_host=options.low_memory,
    )
    began = time.perf_counter()
    voices = tuple(engine.voice(path, text) for path, text in options.voices)
    voices_s = time.perf_counter() - began
    request = Request(
        text=options.text,
        voices=voices,
        seed=options.seed,
        sampling=sampling,
        max_frames=options.max_frames,
        split_sentences=options.split_sentences,
        text_policy="escape" if options.escape else "refuse",
    )
    engine.prepare(request)
    started = time.perf_counter()
    job = _Job(engine, request, started)
    chunks = job.streamed() if options.stream else job.whole()
    if options.out is None:
        for chunk in chunks:
            stdout.write(pcm_bytes(chunk))
            stdout.flush()
    with ExitStack() as files:  # both files get their names at the end, or none does
        if options.out is not None:
            write_chunks(files.enter_context(atomic_file(options.out, options.overwrite)), chunks, job.sample_rate)
        assert job.speech is not None
        if options.codes_out is not None:
            np.save(files.enter_context(atomic_file(options.codes_out, options.overwrite)), job.speech.codes.numpy())
    seconds = time.perf_counter() - started
    kept, notes = (engine.voices.hits, engine.voices.notes) if engine.voices is not None else (0, [])
    peak = torch.cuda.max_memory_allocated(engine.device) if engine.device.type == "cuda" else None
    return job.figures(seconds) | {
        "voices_s": voices_s,
        "voices_kept": kept,
        "notes": notes,
        "peak_device_bytes": peak,
        "decoding": describe_decoding(engine.model, engine.decoder, engine.residual_size),
    }


def _checked_sampling(options: SpeakOptions) -> Sampling:
    """Refuse what can be refused before the model is read; give the sampling parameters."""
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k)
    faults = sampling_faults(sampling, "sampling")
    if options.dtype not in DTYPES:
        faults.append(f"dtype is {options.dtype!r}, not one of {', '.join(DTYPES)}")
    if options.codes_out is not None and options.codes_out.suffix != ".npy":
        faults.append(f"the codes' file is {options.codes_out}, not a name ending in .npy")
    if options.codes_out is not None and options.codes_out == options.out:
        faults.append(f"{options.out} is named for the sound and for the codes")
    faults += [f"{path} is no file" for path, _ in options.voices if not path.is_file()]
    if faults:
        raise UserError(shorten_list(faults), "options in range and files that exist", "correct them")
    for path in (options.out, options.codes_out):
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{path} is a folder", "the name of a file", "name a file in it")
        if not options.overwrite or not path.exists():
            check_new(path)
    return sampling


class _Job:
    """One utterance on its way out, with its clock."""

    def __init__(self, engine: Engine, request: Request, started: float) -> None:
        assert engine.codec is not None
        self.engine, self.request, self.started = engine, request, started
        self.sample_rate = engine.codec.sample_rate
        self.first_audio_s: float | None = None
        self.speech: Speech | None = None
        self.num_samples = 0

    def whole(self) -> Iterator[Tensor]:
        """Speak, then decode everything at once."""
        self.speech = self.engine.speak(self.request)
        yield self._checked(self.engine.decode(self.speech.codes))

    def streamed(self) -> Iterator[Tensor]:
        """Decode while speaking."""
        for chunk, speech in self.engine.stream_request(self.request):
            self.speech = speech
            if len(chunk):
                if self.first_audio_s is None:
                    self.first_audio_s = time.perf_counter() - self.started
                yield self._checked(chunk)
        if self.num_samples == 0:
            self._checked(torch.zeros(0))

    def _checked(self, audio: Tensor) -> Tensor:
        if len(audio) == 0:
            raise VerificationError("speech", ["the model ended before the first frame; another --seed may speak"])
        if not bool(torch.isfinite(audio).all()):
            raise VerificationError("speech", ["the codec made samples that are not finite"])
        self.num_samples += len(audio)
        return audio

    def figures(self, seconds: float) -> dict[str, Any]:
        """Sum up."""
        assert self.speech is not None
        audio_s = self.num_samples / self.sample_rate
        return {
            "num_frames": self.speech.codes.shape[1],
            "audio_s": audio_s,
            "seconds": seconds,
            "rtf": seconds / audio_s,
            "first_audio_s": self.first_audio_s,
            "stop_reason": self.speech.stop_reason,
            "seed": self.request.seed,
            "sample_rate": self.sample_rate,
        }
