"""Listen to what was spoken: transcripts, voice embeddings, and one record per clip from all that is known of it.

Neither recognizer nor speaker model is in memory together with a speech model or with one another. Recognizers take
clips in groups that depend on the plan alone, not on the number of processes or on what a stopped run had done. What
was heard is known by the hash of the sounds that were given together, so it is never taken for that of other sounds.

A clip without sound, because it is empty, failed or not finite, is scored with an empty transcript: all its words are
deleted. It has no voice: its cosines are None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor

from s2quant.errors import UserError
from s2quant.evaluate.asr import RATE_HZ, Asr
from s2quant.evaluate.failures import Heard, find_failures
from s2quant.evaluate.plan import EvalPlan, Job, Key
from s2quant.evaluate.ranks import Ranks
from s2quant.evaluate.similarity import SpeakerModel, cosine
from s2quant.evaluate.store import Clip, Store, load_array, voice_id
from s2quant.evaluate.text import has_tags, strip_marks
from s2quant.evaluate.token_summary import utterance_summary
from s2quant.evaluate.tokens import TokenDamage
from s2quant.evaluate.wer import score
from s2quant.files import sha256_text
from s2quant.records import UtteranceRecord
from s2quant.runtime.audio import read_reference
from s2quant.runtime.memory import release_memory
from s2quant.suite import Utterance

ASR_BATCH = 8
PROMPT = "prompt"
Progress = Callable[[str, int, int], None]
_Place = tuple[str, str, int]  # (arm, utterance id, seed), or (PROMPT, voice id, 0)


@dataclass(frozen=True, kw_only=True)
class Backends:
    """Names of what listens, as its numbers carry them; None where that is not wanted.

    Args:
        asr: The recognizer's.
        similarity: The speaker model's.
    """

    asr: str | None = None
    similarity: str | None = None


def read_clip(path: Path) -> tuple[Tensor, int]:
    """Read a clip of the run.

    Args:
        path: The sound file.

    Returns:
        float32 [S], mono, and its rate in Hz.

    Raises:
        UserError: The file is absent or damaged.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path}: {error}", "a clip of this run", "remove it: --resume makes it again") from error
    return torch.from_numpy(samples.mean(axis=1)), int(rate)


# ---- listening -----------------------------------------------------------------------------------------------------


def transcribe(
    plan: EvalPlan,
    load: Callable[[], Asr],
    backend: str,
    store: Store,
    ranks: Ranks,
    progress: Progress = lambda phase, done, total: None,
) -> None:
    """Write down all clips that have not been heard yet, this process's part of them.

    Args:
        plan: The plan.
        load: Loads the recognizer.
        backend: Its name.
        store: The run's folder.
        ranks: This process among all.
        progress: Told of every group of clips.

    Raises:
        UserError: The recognizer cannot be loaded, a clip cannot be read, or the disk refuses.
    """
    clips, heard = store.clips(), store.transcripts(backend)
    ranks.wait()
    groups = _heard_together(plan, clips)
    mine = ranks.share(
        [(group, given) for group, given in groups if any((job.key, given) not in heard for job in group)]
    )
    if not mine:
        return
    asr = load()
    total, done = sum(len(group) for group, _ in mine), 0
    for group, given in mine:
        sounds = [read_clip(store.wav(job)) for job in group]
        for job, text in zip(group, _hear(asr, sounds, group[0].utterance.lang), strict=True):
            names = {"arm": job.arm, "utt": job.utterance.id, "seed": job.seed}
            store.append("transcripts", names | {"backend": backend, "given": given, "hypothesis": text})
        done += len(group)
        progress("transcribing", done, total)
    del asr
    release_memory()


def _heard_together(plan: EvalPlan, clips: Mapping[Key, Clip]) -> list[tuple[list[Job], str]]:
    """Cut the clips with sound into groups of one arm and language, each with the hash of its sounds."""
    found = []
    for arm in plan.arms:
        jobs = [job for job in plan.jobs(arm) if job.key in clips and clips[job.key].has_audio]
        for lang in sorted({job.utterance.lang for job in jobs}):
            some = [job for job in jobs if job.utterance.lang == lang]
            for group in (some[start : start + ASR_BATCH] for start in range(0, len(some), ASR_BATCH)):
                found.append((group, sha256_text(" ".join(str(clips[job.key].sound) for job in group))[:24]))
    return found


def _hear(asr: Asr, sounds: Sequence[tuple[Tensor, int]], lang: str) -> list[str]:
    rates = {rate for _, rate in sounds}
    if len(rates) == 1:
        return asr.transcribe_batch([sound for sound, _ in sounds], rates.pop(), lang)
    return [asr.transcribe(sound, rate, lang) for sound, rate in sounds]


def embed(
    plan: EvalPlan,
    load: Callable[[], SpeakerModel],
    backend: str,
    store: Store,
    ranks: Ranks,
    progress: Progress = lambda phase, done, total: None,
) -> None:
    """Embed all clips and voices that have not been embedded yet, this process's part of them.

    Args:
        plan: The plan.
        load: Loads the speaker model.
        backend: Its name.
        store: The run's folder.
        ranks: This process among all.
        progress: Told of every clip.

    Raises:
        UserError: The speaker model cannot be loaded, a clip cannot be read, or the disk refuses.
    """
    clips, known = store.clips(), store.embeddings(backend)
    ranks.wait()
    wanted = _embedded(plan, clips)
    mine = ranks.share([item for item in wanted.items() if item[0] not in known])
    if not mine:
        return
    model = load()
    for done, ((key, given), what) in enumerate(mine, 1):
        sound = _voice_sound(what) if isinstance(what, Utterance) else read_clip(store.wav(what))
        found = None if sound is None else model.embed(*sound)
        names = dict(zip(("arm", "utt", "seed"), key, strict=True))
        row = {"backend": backend, "given": given, "embedding": None if found is None else found.float().tolist()}
        store.append("embeddings", names | row)
        progress("comparing voices", done, len(mine))
    del model
    release_memory()


def _embedded(plan: EvalPlan, clips: Mapping[Key, Clip]) -> dict[tuple[_Place, str], Job | Utterance]:
    """Give what is embedded, voices and clips with sound, by its place and the hash of its sound."""
    found: dict[tuple[_Place, str], Job | Utterance] = {}
    for one in plan.utterances:
        if one.prompt_audio is not None:
            found[(PROMPT, voice_id(one), 0), voice_id(one)] = one
    for job in plan.jobs():
        sound = clips[job.key].sound if job.key in clips else None
        if sound is not None:
            found[job.key, sound] = job
    return found


def _voice_sound(utterance: Utterance) -> tuple[Tensor, int] | None:
    """Read a voice's recording; None for one that cannot be used, which its clips' errors say."""
    assert utterance.prompt_audio is not None
    try:
        return read_reference(utterance.prompt_audio, RATE_HZ), RATE_HZ
    except UserError:
        return None


# ---- records -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Known:
    """Everything that was found out about the clips of a plan."""

    plan: EvalPlan
    store: Store
    backends: Backends
    clips: Mapping[Key, Clip]
    transcripts: Mapping[Key, str]
    embeddings: Mapping[_Place, Tensor | None]
    damages: Mapping[tuple[str, int], TokenDamage]


def make_records(
    plan: EvalPlan, store: Store, backends: Backends, damages: Mapping[tuple[str, int], TokenDamage]
) -> list[UtteranceRecord]:
    """Put together the records of a run that has spoken and listened.

    Args:
        plan: The plan.
        store: The run's folder.
        backends: What listened.
        damages: The model's token metrics by (utterance, seed).

    Returns:
        One record per clip, in the order of the plan.

    Raises:
        UserError: A file of the run is damaged, or a package for scoring is missing.
    """
    clips = store.clips()
    transcripts: dict[Key, str] = {}
    if backends.asr:
        heard = store.transcripts(backends.asr)
        transcripts = {job.key: heard[job.key, given] for jobs, given in _heard_together(plan, clips) for job in jobs}
    embeddings: dict[_Place, Tensor | None] = {}
    if backends.similarity:
        found = store.embeddings(backends.similarity)
        embeddings = {key: found[key, given] for key, given in _embedded(plan, clips)}
    known = _Known(
        plan=plan,
        store=store,
        backends=backends,
        clips=clips,
        transcripts=transcripts,
        embeddings=embeddings,
        damages=damages,
    )
    return [_record(group, known) for group in _by_job(plan)]


def _by_job(plan: EvalPlan) -> list[list[Job]]:
    """Give for each job of the plan, in order: the job, and the baseline's of the same text and place."""
    baseline = {(job.utterance.id, job.pair): job for job in plan.jobs("baseline")} if "baseline" in plan.arms else {}
    return [
        [job, baseline[job.utterance.id, job.pair]] if baseline and job.arm != "baseline" else [job]
        for job in plan.jobs()
    ]


def _record(group: Sequence[Job], known: _Known) -> UtteranceRecord:
    """Make the record of `group[0]`, compared with the baseline's clip `group[1]`, if there is one."""
    job = group[0]
    utterance, clip, store = job.utterance, known.clips[job.key], known.store
    other = known.clips[group[1].key] if len(group) > 1 else None
    asr = _asr(utterance, clip, known)
    failures, ratio = _failures(job, clip, other, asr, known)
    prompt = store.prompt_audio(utterance)
    damage = known.damages.get((utterance.id, job.seed)) if job.arm == "model" else None
    return UtteranceRecord(
        suite=known.plan.suite.name,
        suite_version=known.plan.suite.version,
        arm=job.arm,
        utt=utterance.id,
        seed=job.seed,
        lang=utterance.lang,
        text=utterance.text,
        reference=strip_marks(utterance.text),
        has_tags=has_tags(utterance.text),
        prompt_id=utterance.prompt_id,
        prompt_audio=store.relative(prompt) if prompt is not None and prompt.is_file() else None,
        audio=store.relative(store.wav(job)) if clip.has_audio else None,
        codes=store.relative(store.codes(job)) if clip.error is None else None,
        num_frames=clip.num_frames,
        audio_s=clip.audio_s,
        stop_reason=clip.stop_reason,  # type: ignore[arg-type]
        num_prompt_tokens=clip.num_prompt_tokens,
        wall_s=clip.wall_s,
        error=clip.error,
        asr=asr,
        sim=_similarity(group, known),
        failures=failures,
        duration_ratio=ratio,
        tokens=None if damage is None else utterance_summary(damage),
    )


def _asr(utterance: Utterance, clip: Clip, known: _Known) -> dict[str, Any] | None:
    if known.backends.asr is None:
        return None
    text = known.transcripts[clip.key] if clip.has_audio else ""
    normalizer = known.plan.suite.normalizer
    found = score(utterance.text, text, normalizer, utterance.lang)
    return {
        "backend": known.backends.asr,
        "normalizer": normalizer,
        "unit": found.unit,
        "hypothesis": text,
        "reference_norm": found.reference_norm,
        "hypothesis_norm": found.hypothesis_norm,
        "hits": found.hits,
        "substitutions": found.substitutions,
        "deletions": found.deletions,
        "insertions": found.insertions,
        "alignment": [[kind, list(said), list(heard)] for kind, said, heard in found.alignment],
    }


def _similarity(group: Sequence[Job], known: _Known) -> dict[str, Any] | None:
    if known.backends.similarity is None:
        return None
    job = group[0]
    own = known.embeddings.get(job.key)
    voice, baseline = None, None
    if job.utterance.prompt_audio is not None:
        voice = known.embeddings.get((PROMPT, voice_id(job.utterance), 0))
    if len(group) > 1:
        baseline = known.embeddings.get(group[1].key)
    to_prompt, to_baseline = cosine(own, voice), cosine(own, baseline)
    if to_prompt is None and to_baseline is None:
        return None
    return {"backend": known.backends.similarity, "to_prompt": to_prompt, "to_baseline": to_baseline}


def _failures(
    job: Job, clip: Clip, other: Clip | None, asr: Mapping[str, Any] | None, known: _Known
) -> tuple[dict[str, bool | None] | None, float | None]:
    """Give the flags of a clip, and its frames over those of the baseline's."""
    if clip.error is not None:
        return None, None
    assert clip.stop_reason is not None and clip.flags is not None
    found = find_failures(
        stop_reason=clip.stop_reason,
        codes=load_array(known.store.codes(job)),
        audio_s=clip.audio_s,
        heard=None if asr is None else Heard.of(asr),
        has_tags=has_tags(job.utterance.text),
        baseline_frames=None if other is None else other.num_frames,
    )
    if "failures" not in known.plan.metrics:
        return None, found.duration_ratio
    return dict(found.flags) | dict(clip.flags), found.duration_ratio
