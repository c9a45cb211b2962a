"""Speak a plan: every utterance and seed of every arm, with the same voices, seeds and limits.

A voice is encoded once, by the codec of the plan's first arm, and all arms read the same codes. The baseline and its
noise floor share one engine; an arm with nothing left to do is not even loaded.

Jobs are spoken in groups (`groups.py`), and processes share groups, not jobs. A group is finished as a whole or spoken
anew as a whole, so that a run that was stopped in its middle ends with the codes of one that was not. What a group had
done when it was stopped is lost, some seconds on a GPU: a run that is always stopped sooner does not get ahead.

An utterance that cannot be spoken is a clip with its error, and never ends the run. One that is refused before
anything is computed (its text, its voice) takes no part in its group; it is tried again with every go, but does not
have the others spoken anew as long as it is refused. One that fails later has its whole group spoken anew in the next
go. When a batch breaks, its unfinished utterances are spoken one by one, and the error stays with the one that raises
it; those are alone then, not in their group's company, and in bfloat16 their codes may be others than in a run whose
batch does not break, for want of memory say. They are equal where it breaks at the same clip.

Samples that are not finite get no sound file: a clip with such samples is a failure, and no player or recognizer
should take a repaired one for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from s2quant.errors import OutOfMemory, UserError
from s2quant.evaluate.failures import find_failures
from s2quant.evaluate.groups import Group, cut_groups
from s2quant.evaluate.plan import EvalPlan, Job, Key
from s2quant.evaluate.ranks import Ranks
from s2quant.evaluate.store import Clip, Store, load_array, save_array, voice_id
from s2quant.files import atomic_file, sha256_file
from s2quant.prompt import Voice
from s2quant.runtime.audio import write_wav
from s2quant.runtime.engine import Engine
from s2quant.runtime.memory import release_memory
from s2quant.runtime.speech import Request, Speech
from s2quant.suite import Utterance

Progress = Callable[[str, int, int], None]
"""(phase, things done, things in all) -> None."""
Loader = Callable[[], Engine]
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
    """Speak the groups in which something is left to do, this process's part of them.

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
    left = [group for group in cut_groups(plan, loaders, num_slots) if _is_left(group.jobs, group, clips, store)]
    ranks.wait()  # every process has read the same before any writes
    if not left:
        return
    mine = ranks.share(left)
    total, done = sum(len(group.jobs) for group in mine), 0
    engine: Engine | None = None
    for name, load in loaders.items():
        first = name == next(iter(loaders))
        groups = [group for group in mine if group.engine == name]
        if groups or (first and _voices_missing(plan, store)):
            engine = load()
        if first:
            if engine is not None:
                _encode_voices(plan, engine, store, ranks)
            ranks.wait()
            voices = _read_voices(plan, store)
        for group in groups:
            assert engine is not None
            for number, clip in enumerate(speak_group(group, engine, plan, voices, store, clips), 1):
                progress(f"speaking, {clip.arm}", done + number, total)
            done += len(group.jobs)
        engine = None
        release_memory()


def _is_left(jobs: Iterable[Job], group: Group, clips: Mapping[Key, Clip], store: Store) -> bool:
    """Tell whether one of some jobs of a group is not done."""
    return not all(store.has_clip(job, clips.get(job.key), group.name) for job in jobs)


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


def speak_group(
    group: Group, engine: Engine, plan: EvalPlan, voices: VoiceCodes, store: Store, clips: Mapping[Key, Clip]
) -> Iterator[Clip]:
    """Speak a group and write what comes of it.

    Args:
        group: The group.
        engine: Its engine.
        plan: The plan.
        voices: The voices.
        store: Where to write.
        clips: What was there before; nothing is spoken when it is all that can be.

    Yields:
        Every clip when it is on disk.

    Raises:
        UserError: The disk refuses.
    """
    ready: list[tuple[Job, Request]] = []
    for job in group.jobs:
        try:
            request = _request(job, plan, voices)
            engine.prepare(request)
        except UserError as error:
            yield _failed(job, error, group, store)
        else:
            ready.append((job, request))
    if not _is_left([job for job, _ in ready], group, clips, store):
        return
    for job, _ in ready:
        store.remove_clip(job)
    yield from _speak(ready, group, engine, store)


def _speak(ready: Sequence[tuple[Job, Request]], group: Group, engine: Engine, store: Store) -> Iterator[Clip]:
    """Speak together; when that breaks, speak each of what is left alone."""
    waiting = dict(enumerate(ready))
    try:
        for speech in engine.generate([request for _, request in ready]):
            job, request = waiting[speech.index]
            clip = _write(job, request, speech, group, engine, store)
            del waiting[speech.index]
            yield clip
    except (RuntimeError, OutOfMemory) as error:  # of torch: out of memory, a kernel that fails
        reason = error
    else:
        return
    if len(ready) == 1:
        yield _failed(ready[0][0], reason, group, store)
        return
    release_memory()
    for one in waiting.values():
        yield from _speak([one], group, engine, store)


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


def _failed(job: Job, error: Exception, group: Group, store: Store) -> Clip:
    clip = Clip(arm=job.arm, utt=job.utterance.id, seed=job.seed, group=group.name, error=one_sentence(error))
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
def _write(job: Job, request: Request, speech: Speech, group: Group, engine: Engine, store: Store) -> Clip:
    """Decode a speech and write its files and the line about it; last its codes, without which it is not there."""
    assert engine.codec is not None
    rate = engine.codec.sample_rate
    audio = engine.decode(speech.codes)
    found = find_failures(stop_reason=speech.stop_reason, codes=speech.codes, audio=audio, sample_rate=rate)
    has_audio = len(audio) > 0 and not found.flags["not_finite"]
    if has_audio:
        write_wav(store.wav(job), audio, rate, overwrite=True)
    batches = [int(frames) for frames in speech.batch_frames]
    if job.arm == "baseline":
        parts = list(speech.codes.split(batches, dim=1)) if batches else []
        save_array(store.sequence(job), engine.spoken_sequence(request, parts))
    clip = Clip(
        arm=job.arm,
        utt=job.utterance.id,
        seed=job.seed,
        group=group.name,
        sound=sha256_file(store.wav(job)) if has_audio else None,
        num_frames=speech.codes.shape[1],
        audio_s=len(audio) / rate,
        stop_reason=speech.stop_reason,
        num_prompt_tokens=speech.num_prompt_tokens,
        wall_s=speech.seconds,
        last_frames=batches[-1] if batches else 0,
        flags={kind: found.flags[kind] for kind in SOUND_KINDS},
    )
    store.add_clip(clip)
    save_array(store.codes(job), speech.codes)
    return clip
