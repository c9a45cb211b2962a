"""How fast checkpoints speak, side by side: the one timing code behind `s2quant bench` and the evaluation.

All arms are loaded together and take turns (A, B, A, B; then B, A, ...), so that a clock or a temperature that drifts
meets all alike. Every arm speaks the same number of frames (`Request.ignore_end`): a checkpoint that stops early must
not look fast. The first round of each batch size is warm-up, reported and left out. The device is waited for at both
ends of every stretch of time.

Definitions: `ms_per_frame` is the time between the frames that all utterances make together, the first frame left out;
`rtf` is the time of prefill, frames and codec over the sound of one utterance; `ar_rtf` the same without the codec;
`audio_s_per_s` is the sound of all utterances over the same time as `rtf`. Times are medians over the repeats. No
round knows prefixes of an earlier one; utterances of one batch share theirs.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from s2quant.errors import UserError, shorten_list
from s2quant.evaluate.continuity import measure_streams
from s2quant.evaluate.first_audio import Voice, first_audio, measure_first_audio, noise, wait_for
from s2quant.evaluate.upstream import Upstream, check_upstream, measure_upstream
from s2quant.runtime.backends import describe_decoding
from s2quant.runtime.engine import Engine
from s2quant.runtime.linears import Backend
from s2quant.runtime.load import device_name, parse_device, parse_dtype
from s2quant.runtime.loading import load_engine
from s2quant.runtime.memory import limit_memory
from s2quant.runtime.speech import DecoderKind, Request, Speech
from s2quant.sampling import Sampling

SPEED_VERSION = 2
Progress = Callable[[str, int, int], None]


@dataclass(kw_only=True)
class _Arm:
    """One checkpoint being timed."""

    name: str
    folder: Path
    engine: Engine
    load_s: float
    loaded_bytes: int | None
    warmup_s: float = 0.0
    samples: dict[int, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    encode_s: list[float] = field(default_factory=list)
    first_audio_s: list[float] = field(default_factory=list)
    peak_bytes: dict[int, int | None] = field(default_factory=dict)
    reserved_bytes: dict[int, int | None] = field(default_factory=dict)


def measure_speed(
    folders: Mapping[str, Path],
    *,
    text: str,
    num_frames: int,
    repeats: int = 3,
    batch_sizes: Sequence[int] = (1,),
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.bfloat16,
    linears: Backend = "auto",
    decoder: DecoderKind = "auto",
    prompt_graphs: bool | None = None,
    voice: Voice | None = None,
    streams: Sequence[int] = (),
    memory_limit_gb: float | None = None,
    low_memory: bool = False,
    codec_graphs: bool | None = None,
    prompts_together: bool | None = None,
    against: Upstream | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Time one or more checkpoints under the same conditions.

    Args:
        folders: Name of the arm -> checkpoint folder; the first is what ratios are taken against.
        text: What every utterance says.
        num_frames: Frames per utterance, 2 or more.
        repeats: Timed rounds per batch size.
        batch_sizes: Utterances at a time.
        device: Where to run.
        dtype: The models', one of torch's or its name.
        linears: Backend of the quantized linears.
        decoder: How frames are made, see `Engine`.
        prompt_graphs: How prompts are read, see `Engine`.
        voice: Whose first sound is timed as well, see `s2quant.evaluate.first_audio`; None times none.
        streams: Streams at a time whose continuity is measured, see `s2quant.evaluate.continuity`.
        memory_limit_gb: The most memory of the GPU for all arms together, in 10^9 bytes; None: all of it.
        low_memory: Whether the codecs' encoders rest on the host.
        codec_graphs: Whether streams have chunks decoded by graphs, see `Engine`.
        prompts_together: Whether prompts are read together, see `Engine`.
        against: A fish-speech checkout that is timed beside us, on the first checkpoint; None: none.
        progress: Told the phase, the rounds done and their total.

    Returns:
        version, device, dtype, decoder, prompt_graphs, memory_limit_gb, low_memory, codec_graphs, prompts_together,
        text, num_frames, repeats, warmup_s (of all arms), `arms` (per name: folder_bytes, load_s, loaded_bytes,
        warmup_s, backends, decoding: see `describe_decoding`), and `rows`, one per batch size and arm: concurrency,
        arm, ms_per_frame, rtf, ar_rtf, first_audio_s, frames_per_s, audio_s_per_s, peak_device_bytes,
        peak_reserved_bytes, stages_s (encode, prefill, ar, codec), ratio (ms_per_frame over the first arm's, the median
        of the rounds' own ratios), samples (every timed round). Memory is that of speaking and decoding, and None on a
        CPU; first_audio_s is that of one stream alone, without a voice, and None in the rows of other batch sizes.
        `first_audio` has the rows of `measure_first_audio`, `streams` those of `measure_streams`, `upstream` those of
        `measure_upstream`, with same_first_code (whether our first arm's likeliest code is the same) and ratios (its
        ms_per_frame over that of every arm at batch 1); each is empty unless it was asked for.

    Raises:
        UserError: A number is out of range, or a folder, the text, the device or the dtype cannot be used.
    """
    target = _checked(folders, num_frames, repeats, batch_sizes, streams, device)
    dtype = parse_dtype(dtype)
    if memory_limit_gb is not None:
        limit_memory(target, memory_limit_gb * 1e9)
    slots = max(*batch_sizes, *streams, 1)
    how: dict[str, Any] = {
        "linears": linears,
        "num_slots": slots,
        "decoder": decoder,
        "prompt_graphs": prompt_graphs,
        "encoder_on_host": low_memory,
        "codec_graphs": codec_graphs,
        "prompts_together": prompts_together,
    }
    arms = [_load(name, folder, target, dtype, how) for name, folder in folders.items()]
    requests = [Request(text=text, seed=seed, max_frames=num_frames, ignore_end=True) for seed in range(slots)]
    for arm in arms:
        _check_room(arm.engine, requests[0])
    prompt = arms[0].engine.spoken_sequence(requests[0], [])
    if against is not None:
        check_upstream(against, arms[0].folder, prompt.shape[1] + num_frames)
    total, done = len(batch_sizes) * (1 + repeats) * len(arms), 0
    for batch_size in batch_sizes:
        for turn in range(1 + repeats):  # turn 0 is the warm-up
            for arm in arms if turn % 2 else reversed(arms):
                progress(f"{arm.name}, batch {batch_size}", done, total)
                _round(arm, requests[:batch_size], arms, timed=turn > 0)
                done += 1
    voiced = {arm.name: (arm.engine, arm.folder) for arm in arms}
    engines = {arm.name: arm.engine for arm in arms}
    rows = [_row(arm, size, arms[0], num_frames) for size in batch_sizes for arm in arms]
    return {
        "version": SPEED_VERSION,
        "device": device_name(target),
        "dtype": str(dtype).removeprefix("torch."),
        "decoder": arms[0].engine.decoder,
        "prompt_graphs": arms[0].engine.decoder == "fast" and arms[0].engine.prompt_graphs,
        "memory_limit_gb": memory_limit_gb,
        "low_memory": low_memory,
        "codec_graphs": arms[0].engine.codec_graphs,
        "prompts_together": arms[0].engine.prompts_together,
        "text": text,
        "num_frames": num_frames,
        "repeats": repeats,
        "warmup_s": sum(arm.warmup_s for arm in arms),
        "arms": {arm.name: _facts(arm) for arm in arms},
        "rows": rows,
        "first_audio": [] if voice is None else measure_first_audio(voiced, requests[0], voice, repeats, progress),
        "streams": measure_streams(engines, requests, streams, repeats, progress) if streams else [],
        "upstream": [] if against is None else _against(against, arms[0], requests[0], rows, repeats, dtype, progress),
    }


def _against(
    against: Upstream,
    arm: _Arm,
    request: Request,
    rows: Sequence[Mapping[str, Any]],
    repeats: int,
    dtype: torch.dtype,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Time fish-speech on an arm's checkpoint and prompt, and say how it compares."""
    engine = arm.engine
    assert engine.codec is not None
    progress("fish-speech", 0, 1)
    greedy = dataclasses.replace(request, sampling=Sampling(top_k=1), max_frames=1)
    best = int(engine.speak(greedy).codes[0, 0])
    found = measure_upstream(
        against,
        arm.folder,
        engine.spoken_sequence(request, []),
        num_frames=request.max_frames,
        repeats=repeats,
        device=str(engine.device),
        dtype=str(dtype).removeprefix("torch."),
        frame_s=engine.codec.frame_size / engine.codec.sample_rate,
    )
    alone = {row["arm"]: row["ms_per_frame"] for row in rows if row["concurrency"] == 1}
    for row in found:
        row["same_first_code"] = row["best_first_code"] == best
        row["ratios"] = {name: row["ms_per_frame"] / ours for name, ours in alone.items()}
    return found


def _checked(
    folders: Mapping[str, Path],
    num_frames: int,
    repeats: int,
    batch_sizes: Sequence[int],
    streams: Sequence[int],
    device: str | torch.device,
) -> torch.device:
    faults = [] if folders else ["no checkpoint"]
    if num_frames < 2:
        faults.append(f"num_frames is {num_frames}, not 2 or more")
    if repeats < 1:
        faults.append(f"repeats is {repeats}, not positive")
    if not batch_sizes or min(batch_sizes) < 1:
        faults.append(f"batch sizes are {list(batch_sizes)}, not all positive")
    if len(set(batch_sizes)) < len(batch_sizes):
        faults.append(f"batch sizes are {list(batch_sizes)}, one of them twice")
    if len(set(streams)) < len(streams) or min(streams, default=1) < 1:
        faults.append(f"streams are {list(streams)}, not all positive and different")
    if faults:
        raise UserError(shorten_list(faults), "something to be timed", "correct the numbers")
    return parse_device(device)


def _check_room(engine: Engine, request: Request) -> None:
    """Refuse a text that could not be followed by so many frames, or that is spoken in several batches."""
    positions = engine.config.slow.max_seq_len
    room = positions - engine.spoken_sequence(request, []).shape[1]
    if room < request.max_frames or len(engine.prepare(request)) > 1:
        raise UserError(
            f"{request.max_frames} frames of a text that leaves room for {room}",
            f"text and frames within {positions} positions, spoken in one batch",
            "time a shorter text or fewer frames",
        )


def _load(name: str, folder: Path, device: torch.device, dtype: torch.dtype, how: Mapping[str, Any]) -> _Arm:
    before = _allocated(device)
    started = time.perf_counter()
    engine = load_engine(folder, device, dtype, **how)
    wait_for(device)
    load_s = time.perf_counter() - started
    after = _allocated(device)
    loaded = None if after is None or before is None else after - before
    return _Arm(name=name, folder=folder, engine=engine, load_s=load_s, loaded_bytes=loaded)


def _round(arm: _Arm, requests: Sequence[Request], arms: Sequence[_Arm], timed: bool) -> None:
    """Take every measure of one arm at one batch size once."""
    device, batch_size = arm.engine.device, len(requests)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    arm.engine.prefixes.clear()
    prefill_s, ar_s, speeches = _speak(arm.engine, requests)
    codec_s = _seconds(device, lambda: [arm.engine.decode(speech.codes) for speech in speeches])
    if timed:
        _keep_peak(arm, batch_size, arms)  # of speaking and decoding: encoding a recording has one of its own
    encode_s = first_s = None
    if batch_size == 1:
        encode_s = _seconds(device, lambda: _encode(arm.engine))
        arm.engine.prefixes.clear()
        first_s = first_audio(arm.engine, requests[0])
    if not timed:
        arm.warmup_s += time.perf_counter() - began
        return
    for key, value in (("prefill_s", prefill_s), ("ar_s", ar_s), ("codec_s", codec_s)):
        arm.samples[batch_size][key].append(value)
    if encode_s is not None and first_s is not None:
        arm.encode_s.append(encode_s)
        arm.first_audio_s.append(first_s)


def _speak(engine: Engine, requests: Sequence[Request]) -> tuple[float, float, list[Speech]]:
    """Speak all requests together: seconds until each has its first frame, seconds of the frames after, speeches."""
    waiting = set(range(len(requests)))
    speeches: list[Speech] = []
    wait_for(engine.device)
    started = first = time.perf_counter()
    for event in engine.events(requests):
        if isinstance(event, Speech):
            speeches.append(event)
        elif event[0] in waiting:
            waiting.remove(event[0])
            first = time.perf_counter()
    wait_for(engine.device)
    ended = time.perf_counter()
    return first - started, ended - first, speeches


def _encode(engine: Engine) -> None:
    """Encode a recording of noise."""
    codec = engine.codec
    assert codec is not None
    codec.encode(noise(codec.sample_rate)[None, None].to(codec.device))


def _seconds(device: torch.device, work: Callable[[], Any]) -> float:
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started


def _allocated(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _keep_peak(arm: _Arm, batch_size: int, arms: Sequence[_Arm]) -> None:
    """Note the most memory of this arm: what the other arms have loaded is not counted."""
    device = arm.engine.device
    if device.type != "cuda":
        arm.peak_bytes[batch_size] = arm.reserved_bytes[batch_size] = None
        return
    others = sum(other.loaded_bytes or 0 for other in arms if other is not arm)
    peak = torch.cuda.max_memory_allocated(device) - others
    arm.peak_bytes[batch_size] = max(peak, arm.peak_bytes.get(batch_size) or 0)
    arm.reserved_bytes[batch_size] = torch.cuda.max_memory_reserved(device)


def _facts(arm: _Arm) -> dict[str, Any]:
    engine = arm.engine
    backends = {module.backend for module in engine.model.modules() if hasattr(module, "backend")}
    return {
        "folder_bytes": sum(path.stat().st_size for path in arm.folder.rglob("*") if path.is_file()),
        "load_s": arm.load_s,
        "loaded_bytes": arm.loaded_bytes,
        "warmup_s": arm.warmup_s,
        "backends": sorted(backends),
        "decoding": describe_decoding(engine.model, engine.decoder, engine.residual_size),
    }


def _row(arm: _Arm, batch_size: int, first: _Arm, num_frames: int) -> dict[str, Any]:
    codec = arm.engine.codec
    assert codec is not None
    samples = {key: list(values) for key, values in arm.samples[batch_size].items()}
    prefill_s, ar_s, codec_s = (statistics.median(samples[key]) for key in ("prefill_s", "ar_s", "codec_s"))
    audio_s = num_frames * codec.frame_size / codec.sample_rate
    whole_s = prefill_s + ar_s + codec_s
    pairs = zip(samples["ar_s"], first.samples[batch_size]["ar_s"], strict=True)
    alone = batch_size == 1
    return {
        "concurrency": batch_size,
        "arm": arm.name,
        "ms_per_frame": 1e3 * ar_s / (num_frames - 1),
        "rtf": whole_s / audio_s,
        "ar_rtf": (prefill_s + ar_s) / audio_s,
        "first_audio_s": statistics.median(arm.first_audio_s) if alone else None,
        "frames_per_s": batch_size * (num_frames - 1) / ar_s,
        "audio_s_per_s": batch_size * audio_s / whole_s,
        "peak_device_bytes": arm.peak_bytes[batch_size],
        "peak_reserved_bytes": arm.reserved_bytes[batch_size],
        "stages_s": {
            "encode": statistics.median(arm.encode_s) if alone else None,
            "prefill": prefill_s,
            "ar": ar_s,
            "codec": codec_s,
        },
        "ratio": statistics.median(mine / its for mine, its in pairs),
        "samples": samples,
    }
