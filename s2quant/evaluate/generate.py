"""Speak a plan: every utterance and seed of every arm, with the same voices, seeds and limits.

A voice is encoded once, by the codec of the plan's first arm, and all arms read the same codes. The baseline and its
noise floor share one engine; an arm with nothing left to do is not even loaded. What is on disk is not spoken again,
but what failed is tried again. An utterance that cannot be spoken is a clip with its error, and never ends the run:
when a batch breaks, its unfinished utterances are spoken one by one, and the error stays with the one that raises it.

Jobs are spoken in groups, each by itself, and processes share groups, not jobs. Who else is in progress can move the
last bit of a sum, on a GPU above all, and so a code: with groups that depend on the plan and the slots alone, a clip
comes out alike whoever speaks it.

Samples that are not finite get no sound file: a clip with such samples is a failure, and no player or recognizer
should take a repaired one for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from s2quant.errors import OutOfMemory, UserError
from s2quant.evaluate.failures import find_failures
from s2quant.evaluate.plan import EvalPlan, Job
from s2quant.evaluate.ranks import Ranks
from s2quant.evaluate.store import Clip, Store, load_array, save_array, voice_id
from s2quant.files import atomic_file
from s2quant.prompt import Voice
from s2quant.runtime.audio import write_wav
from s2quant.runtime.engine import Engine
from s2quant.runtime.memory import release_memory
from s2quant.runtime.speech import Request, Speech
from s2quant.suite import Utterance

Progress = Callable[[str, int, int], None]
"""(phase, things done, things in all) -> None."""
Loader = Callable[[], Engine]
GROUP_ROUNDS = 4  # jobs of a group for each slot: fewer leave slots empty at its end, more leave processes idle
SOUND_KINDS = ("repeated_codes", "long_silence", "clipping", "not_finite")


@dataclass(frozen=True, kw_only=True)
class VoiceCodes:
    """Voices of a plan, or why one cannot be had.

    Args:
        voices: By `voice_id`.
        errors: Sentences by `voice_id`.
    """

    voices: Mapping[str, Voice]
    errors: Mapping[str, str]


def generate(
    plan: EvalPlan,
    loaders: Mapping[str, Loader],
    store: Store,
    ranks: Ranks,
    num_slots: int,
    progress: Progress = lambda phase, done, total: None,
) -> None:
    """Speak what has not been spoken yet, this process's part of it.

    Args:
        plan: The plan.
        loaders: How to load the engines of "baseline" (if the plan has it) and "model".
        store: The run's folder.
        ranks: This process among all.
        num_slots: Of the engines.
        progress: Told of every clip.

    Raises:
        UserError: An engine cannot be loaded, or the disk refuses.
    """
    clips = store.clips()
    ranks.wait()  # every process has read the same before any writes
    todo = [job for job in plan.jobs() if not _is_done(job, clips.get(job.key), store)]
    if not todo:
        return
    mine = ranks.share([(name, group) for name in loaders for group in _groups(todo, name, num_slots)])
    total, done = sum(len(group) for _, group in mine), 0
    engine: Engine | None = None
    for name, load in loaders.items():
        first = name == next(iter(loaders))
        groups = [group for owner, group in mine if owner == name]
        if groups or (first and _voices_missing(plan, store)):
            engine = load()
        if first:
            if engine is not None:
                _encode_voices(plan, engine, store, ranks)
            ranks.wait()
            voices = _read_voices(plan, store)
        for group in groups:
            assert engine is not None
            for clip in speak_jobs(group, engine, plan, voices, store):
                done += 1
                progress(f"speaking, {clip.arm}", done, total)
        engine = None
        release_memory()


def _groups(jobs: Sequence[Job], engine: str, num_slots: int) -> list[Sequence[Job]]:
    """Cut the jobs of one engine, "baseline" or "model", into groups."""
    own = [job for job in jobs if (job.arm == "model") == (engine == "model")]
    size = GROUP_ROUNDS * num_slots
    return [own[start : start + size] for start in range(0, len(own), size)]


def _is_done(job: Job, clip: Clip | None, store: Store) -> bool:
    """Tell whether a clip is on disk, with all its files."""
    if clip is None or clip.error is not None or not store.codes(job).is_file():
        return False
    if job.arm == "baseline" and not store.sequence(job).is_file():
        return False
    return store.wav(job).is_file() or not clip.has_audio


# ---- voices --------------------------------------------------------------------------------------------------------


def _voiced(plan: EvalPlan) -> list[Utterance]:
    """Give one utterance for each voice of the plan."""
    found = {voice_id(one): one for one in plan.utterances if one.prompt_audio is not None}
    return list(found.values())


def _voices_missing(plan: EvalPlan, store: Store) -> bool:
    return any(not store.voice(one).is_file() for one in _voiced(plan))


def _encode_voices(plan: EvalPlan, engine: Engine, store: Store, ranks: Ranks) -> None:
    """Encode this process's share of the voices; of one that cannot be used, write why."""
    for utterance in ranks.share(_voiced(plan)):
        path, copy = store.voice(utterance), store.prompt_audio(utterance)
        if path.is_file() or utterance.prompt_audio is None or copy is None:
            continue
        with atomic_file(copy, overwrite=True) as partial:
            shutil.copyfile(utterance.prompt_audio, partial)
        try:
            voice = engine.voice(utterance.prompt_audio, utterance.prompt_text or "")
        except OutOfMemory:  # says nothing about the recording
            raise
        except UserError as error:
            with atomic_file(_voice_error(path), overwrite=True) as partial:
                partial.write_text(one_sentence(error), encoding="utf-8")
            continue
        save_array(path, voice.codes)


def _voice_error(path: Path) -> Path:
    return path.with_suffix(".error.txt")


def _read_voices(plan: EvalPlan, store: Store) -> VoiceCodes:
    voices: dict[str, Voice] = {}
    errors: dict[str, str] = {}
    for utterance in _voiced(plan):
        path, name = store.voice(utterance), voice_id(utterance)
        if path.is_file():
            voices[name] = Voice(text=utterance.prompt_text or "", codes=load_array(path))
        else:
            errors[name] = f"voice {utterance.prompt_id}: {_voice_error(path).read_text('utf-8')}"
    return VoiceCodes(voices=voices, errors=errors)


# ---- clips ---------------------------------------------------------------------------------------------------------


def speak_jobs(jobs: Sequence[Job], engine: Engine, plan: EvalPlan, voices: VoiceCodes, store: Store) -> Iterator[Clip]:
    """Speak jobs of one engine and write what comes of them.

    Args:
        jobs: The jobs.
        engine: The engine.
        plan: The plan.
        voices: The voices.
        store: Where to write.

    Yields:
        Every clip when it is on disk.

    Raises:
        UserError: The disk refuses.
    """
    ready: list[tuple[Job, Request]] = []
    for job in jobs:
        try:
            request = _request(job, plan, voices)
            engine.prepare(request)
        except UserError as error:
            yield _failed(job, error, store)
        else:
            ready.append((job, request))
    waiting = dict(enumerate(ready))
    try:
        for speech in engine.generate([request for _, request in ready]):
            job, request = waiting[speech.index]
            clip = _write(job, request, speech, engine, store)
            del waiting[speech.index]
            yield clip
    except (RuntimeError, OutOfMemory) as error:  # of torch: out of memory, a kernel that fails
        reason = error
    else:
        return
    if len(ready) == 1:
        yield _failed(ready[0][0], reason, store)
        return
    release_memory()
    for job, _ in waiting.values():
        yield from speak_jobs([job], engine, plan, voices, store)


def _request(job: Job, plan: EvalPlan, voices: VoiceCodes) -> Request:
    """Compose a request; a voice that cannot be used is a `UserError`."""
    chosen: tuple[Voice, ...] = ()
    if job.utterance.prompt_audio is not None:
        name = voice_id(job.utterance)
        if name in voices.errors:
            raise UserError(voices.errors[name], "a usable recording with its transcript", "use another recording")
        chosen = (voices.voices[name],)
    return Request(
        text=job.utterance.text,
        voices=chosen,
        seed=job.seed,
        sampling=plan.suite.sampling,
        max_frames=plan.suite.max_frames,
    )


def _failed(job: Job, error: Exception, store: Store) -> Clip:
    clip = Clip(arm=job.arm, utt=job.utterance.id, seed=job.seed, error=one_sentence(error))
    store.add_clip(clip)
    return clip


def one_sentence(error: Exception) -> str:
    """Say in one line what happened.

    Args:
        error: The error.

    Returns:
        What was got, of a `UserError`; else the error's kind and the first line of its message.
    """
    text = error.got if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(text.strip().splitlines()[0].split()) if text.strip() else type(error).__name__


@torch.inference_mode()
def _write(job: Job, request: Request, speech: Speech, engine: Engine, store: Store) -> Clip:
    """Decode a speech and write its files, the line about it last."""
    assert engine.codec is not None
    rate = engine.codec.sample_rate
    audio = engine.decode(speech.codes)
    found = find_failures(stop_reason=speech.stop_reason, codes=speech.codes, audio=audio, sample_rate=rate)
    has_audio = len(audio) > 0 and not found.flags["not_finite"]
    if has_audio:
        write_wav(store.wav(job), audio, rate, overwrite=True)
    save_array(store.codes(job), speech.codes)
    batches = [int(frames) for frames in speech.batch_frames]
    if job.arm == "baseline":
        parts = list(speech.codes.split(batches, dim=1)) if batches else []
        save_array(store.sequence(job), engine.spoken_sequence(request, parts))
    clip = Clip(
        arm=job.arm,
        utt=job.utterance.id,
        seed=job.seed,
        has_audio=has_audio,
        num_frames=speech.codes.shape[1],
        audio_s=len(audio) / rate,
        stop_reason=speech.stop_reason,
        num_prompt_tokens=speech.num_prompt_tokens,
        wall_s=speech.seconds,
        last_frames=batches[-1] if batches else 0,
        flags={kind: found.flags[kind] for kind in SOUND_KINDS},
    )
    store.add_clip(clip)
    return clip
