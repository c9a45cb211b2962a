"""What every part of the training shares: the clock, logs, captured steps, the spoken data on the device, WER.

Legend: S samples at 16 kHz, F frames, B batch.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mini.speech import SAMPLE_RATE, SUBFRAMES

CODEC_RATE, FRAME_SIZE = 44100, 2048


class Log:
    """JSON lines in a file, the important ones on the screen too; `t` is seconds since `origin`."""

    def __init__(self, path: Path, part: str, origin: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.part, self.origin = path, part, origin

    def __call__(self, event: str, show: bool = True, **values: Any) -> None:
        values = {name: round(v, 5) if isinstance(v, float) else v for name, v in values.items()}
        row = {"t": round(time.time() - self.origin, 2), "part": self.part, "event": event, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if show:
            print(json.dumps(row), flush=True)


class Budget:
    """How much of a stretch of time is spent; learning rates follow it, so a slow machine trains less, not wrongly."""

    def __init__(self, seconds: float, max_steps: int | None = None) -> None:
        self.seconds, self.max_steps, self.since, self.steps = seconds, max_steps, time.time(), 0

    @property
    def fraction(self) -> float:
        spent = (time.time() - self.since) / max(self.seconds, 1e-9)
        return min(1.0, max(spent, self.steps / self.max_steps if self.max_steps else 0.0))

    @property
    def over(self) -> bool:
        return self.fraction >= 1.0


def cosine(fraction: float, low: float = 0.02, warm: float = 0.03) -> float:
    """A learning rate's factor: a short rise, then half a cosine down to `low`."""
    if fraction < warm:
        return 0.1 + 0.9 * fraction / warm
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (fraction - warm) / (1 - warm)))


class Step:
    """A training step, captured as one CUDA graph after a few ordinary calls; without CUDA an ordinary call.

    The function takes tensors by name, always of the same shapes, and returns tensors by name; what it returns is
    overwritten by the next call.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]], log: Log, warm: int = 3) -> None:
        self.function, self.log, self.warm, self.calls = function, log, warm, 0
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if not torch.cuda.is_available() or self.warm < 0:
            return self.function(**inputs)
        if self.calls <= self.warm:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = self.function(**inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return outputs
        if self.graph is None:
            self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self.outputs = self.function(**self.inputs)
            except RuntimeError as error:  # slower, not wrong: say so and go on without a graph
                self.log("not captured", error=str(error)[:300])
                self.warm = -1
                torch.cuda.synchronize()
                return self.function(**inputs)
            self.graph = graph
            self.log("captured", show=False)
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return self.outputs


def wait_for(path: Path, log: Log, poll_s: float = 0.2) -> Path:
    """Wait until another part has written a file."""
    started = time.time()
    while not path.exists():
        time.sleep(poll_s)
    log("waited", path=path.name, seconds=time.time() - started)
    return path


@functools.cache
def sinc_kernel(rate_in: int, rate_out: int, zeros: int = 16, rolloff: float = 0.97) -> tuple[Tensor, int, int]:
    """A windowed-sinc resampler, one filter per output phase: float64 [width, out], input step, left context."""
    common = math.gcd(rate_in, rate_out)
    step_in, step_out = rate_in // common, rate_out // common
    cut = min(step_in, step_out) * rolloff
    context = math.ceil(zeros * step_in / cut)
    position = torch.arange(-context, step_in + context, dtype=torch.float64)[:, None] / step_in
    t = (position - torch.arange(step_out, dtype=torch.float64) / step_out) * cut
    window = torch.cos(t.clamp(-zeros, zeros) * math.pi / zeros / 2).square()
    return torch.sinc(t) * window * cut / step_in, step_in, context


def resample(wav: Tensor, rate_in: int, rate_out: int) -> Tensor:
    """Resample float [B, S] to [B, ceil(S * rate_out / rate_in)]; in float64, which no device rounds to TF32."""
    kernel, step, context = sinc_kernel(rate_in, rate_out)
    blocks = -(-wav.shape[1] // step)
    padded = functional.pad(wav.double(), (context, context + blocks * step - wav.shape[1]))
    y = padded.unfold(1, len(kernel), step) @ kernel.to(wav.device)  # [B, blocks, out]
    return y.flatten(1)[:, : -(-wav.shape[1] * rate_out // rate_in)].to(wav.dtype)


class Speech:
    """The parts that are there so far: audio flat on the device (if it is wanted), texts on the host."""

    def __init__(self, folder: Path, device: str, split: str = "train", with_audio: bool = True) -> None:
        self.folder, self.device, self.split, self.with_audio = folder, device, split, with_audio
        self.rows: list[dict[str, Any]] = []
        self.samples = np.zeros(0, np.int64)
        self.frames = np.zeros(0, np.int64)
        self.audio = torch.zeros(0, dtype=torch.int16, device=device)
        self.phones = torch.zeros(0, SUBFRAMES, dtype=torch.uint8)
        self.lead = 0  # samples at the codec's rate before every utterance
        self._seen: set[str] = set()

    @property
    def starts(self) -> np.ndarray:
        """First sample of each utterance."""
        return np.concatenate([[0], np.cumsum(self.samples)[:-1]])

    @property
    def frame_starts(self) -> np.ndarray:
        """First frame of each utterance."""
        return np.concatenate([[0], np.cumsum(self.frames)[:-1]])

    @property
    def complete(self) -> bool:
        """Whether every part is loaded."""
        total = self.folder / "num_parts"
        return total.exists() and len(self._seen) == (1 if self.split == "validation" else int(total.read_text()) - 1)

    @property
    def found_all(self) -> bool:
        """Whether every part is there, loaded or not."""
        total = self.folder / "num_parts"
        wanted = 1 if self.split == "validation" else (int(total.read_text()) - 1 if total.exists() else None)
        return len(self._found()) == wanted

    def _found(self) -> list[Path]:
        wanted = "part-000.npz" if self.split == "validation" else "part-[0-9][0-9][0-9].npz"
        found = sorted(self.folder.glob(wanted))
        return [p for p in found if self.split == "validation" or p.name != "part-000.npz"]

    def refresh(self) -> int:
        """Load parts that have appeared; gives how many."""
        new = [p for p in self._found() if p.name not in self._seen]
        pieces, phones, samples, frames = [self.audio], [self.phones], [self.samples], [self.frames]
        for path in new:
            with np.load(path) as data:
                if self.with_audio:
                    pieces.append(torch.from_numpy(data["audio"]).to(self.device))
                phones.append(torch.from_numpy(data["phones"]))
                samples.append(data["samples"].astype(np.int64))
                frames.append(data["frames"].astype(np.int64))
            self.rows += json.loads(path.with_suffix(".json").read_text())
            self._seen.add(path.name)
        if new:
            self.audio, self.phones = torch.cat(pieces), torch.cat(phones)
            self.samples, self.frames = np.concatenate(samples), np.concatenate(frames)
            pieces.clear()
            release_memory()
        return len(new)

    def wait(self, num_parts: int, log: Log) -> None:
        """Load once so many parts are there (or all)."""
        started = time.time()
        while not self.complete and len(self._seen) < num_parts:
            self.refresh()
            time.sleep(0.2)
        log(
            "data",
            utterances=len(self.rows),
            hours=float(self.samples.sum() / SAMPLE_RATE / 3600),
            waited=time.time() - started,
        )

    @classmethod
    def whole(cls, folder: Path, device: str, split: str, log: Log, with_audio: bool = True) -> Speech:
        """Wait for every part and load them in their order, which is the same in every process.

        What is loaded while it appears is in the order in which it appeared, and that differs between processes.
        """
        started, ahead = time.time(), cls(folder, device, split, with_audio)
        while not ahead.found_all:
            time.sleep(0.2)
        ahead.refresh()
        log("data", utterances=len(ahead.rows), waited=time.time() - started)
        return ahead

    def shifted(self, quarters: int) -> Speech:
        """The same utterances that many quarters of a frame later: other codes, exact labels, the same words."""
        other = copy.copy(self)
        other.lead = quarters * FRAME_SIZE // SUBFRAMES
        long = self.samples * CODEC_RATE / SAMPLE_RATE + other.lead
        other.frames = np.ceil(long / FRAME_SIZE - 1e-9).astype(np.int64)
        labels = np.zeros((int(other.frames.sum()), SUBFRAMES), np.uint8)  # silence
        flat, phones = labels.reshape(-1), self.phones.numpy().reshape(-1)
        for start, old, count, old_count in zip(
            other.frame_starts * SUBFRAMES,
            self.frame_starts * SUBFRAMES,
            other.frames * SUBFRAMES - quarters,
            self.frames * SUBFRAMES,
            strict=True,
        ):
            count = min(count, old_count)
            flat[start + quarters : start + quarters + count] = phones[old : old + count]
        other.phones = torch.from_numpy(labels)
        return other

    def cut(self, indices: Sequence[int], length: int) -> Tensor:
        """Give utterances as float [B, length], zeros behind each."""
        start = torch.from_numpy(self.starts[list(indices)]).to(self.device)[:, None]
        samples = torch.from_numpy(self.samples[list(indices)]).to(self.device)[:, None]
        position = torch.arange(length, device=self.device)[None]
        wav = self.audio[(start + position).clamp(max=len(self.audio) - 1)].float() / 32768
        return wav * (position < samples)

    def framed(self, first: int, batch: int = 64) -> Tensor:
        """Resample utterances `first`, first + 1, ... for the codec: int16 [F, 2048], each from a frame of its own."""
        pieces = []
        for start in range(first, len(self.rows), batch):
            indices = range(start, min(start + batch, len(self.rows)))
            wav = resample(self.cut(indices, int(self.samples[indices].max())), SAMPLE_RATE, CODEC_RATE)
            for sound, i in zip(wav, indices, strict=True):
                size = int(self.frames[i]) * FRAME_SIZE
                whole = functional.pad(sound, (self.lead, max(0, size - self.lead - len(sound))))[:size]
                pieces.append((whole * 32767).short())
        if not pieces:
            return torch.zeros(0, FRAME_SIZE, dtype=torch.int16, device=self.device)
        return torch.cat(pieces).view(-1, FRAME_SIZE)


def release_memory() -> None:
    """Give memory that is not in use back to the device, which other parts share.

    What grows by being put together anew leaves behind blocks that are too small for its next size.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compiled_or_not(warm_up: Callable[[], None], give_up: Callable[[], None], log: Log) -> None:
    """Compile by a first call; where the compiler fails, say so and go on without it: slower, not wrong."""
    started = time.time()
    try:
        warm_up()
    except RuntimeError as error:  # the compiler's own errors are RuntimeErrors, whatever they were caused by
        log("not compiled", error=f"{type(error).__name__}: {error}"[:500])
        give_up()
        warm_up()
    log("warm", seconds=time.time() - started)


def word_errors(reference: Sequence[str], heard: Sequence[str]) -> int:
    """Substitutions, deletions and insertions between two lists of words."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(reference, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def save(path: Path, value: Any) -> None:
    """torch.save under the final name only when complete."""
    partial = path.with_name(path.name + ".partial")
    torch.save(value, partial)
    partial.replace(path)


def means(sums: Mapping[str, float], count: int) -> dict[str, float]:
    """Divide all sums by a count."""
    return {name: value / max(count, 1) for name, value in sums.items()}
