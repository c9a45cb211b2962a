"""The folder of a run while it is being made: what is on disk already is not made again.

    out/run.json                         what the clips depend on; a run goes on only with the same
    out/audio/<arm>/<utt>-<seed>.wav     sound; beside it .npy, the codes, int64 [N, F]
    out/audio/prompt/<name>.<suffix>     recordings of the voices
    out/work/clips-<go>-<rank>.jsonl        a line per clip that was spoken, or that failed
    out/work/transcripts-<go>-<rank>.jsonl  a line per clip that was heard, with the recognizer's name
    out/work/embeddings-<go>-<rank>.jsonl   a line per clip or voice that was embedded, with the back end's name
    out/work/voices/<hash>.npy           codes of a voice, the same for all arms
    out/work/sequences/<utt>-<seed>.npy  what the baseline read and spoke, int64 [1+N, T], for the token metrics
    out/work/tokens/                     token metrics by hash
    out/work/speed.json                  the timings
    out/records.jsonl, results.json, summary.csv, manifest.json, at the end

Every process appends to files of its own and reads those of all, so several may work side by side. A run that goes on
begins new files, a go later in the order of names: of several lines about one clip the last one counts, whoever wrote
the earlier ones. A clip is there when its line is and its codes are, which are written last and removed first.

Transcripts and embeddings carry the hash of the sound they are of, and count for nothing else: a clip that was spoken
anew is heard anew, unless it sounds as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2quant.errors import UserError
from s2quant.evaluate.plan import Job, Key
from s2quant.files import atomic_file, disk_errors, sha256_file, sha256_text
from s2quant.records import Arm, append_line, read_lines
from s2quant.suite import Utterance


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What came of one job: a line of work/clips-<go>-<rank>.jsonl.

    Args:
        arm: The arm.
        utt: The utterance's id.
        seed: Its seed.
        group: Name of the group that it was spoken in, see `Group`.
        error: Why there is nothing, in one sentence; None when it was spoken.
        sound: sha256 of the sound file; None when there is none: without frames, or with samples that are not finite.
        num_frames: F.
        audio_s: Length of the sound.
        stop_reason: See `Speech`.
        num_prompt_tokens: Positions prefilled.
        wall_s: Time from taking a slot to the end.
        last_frames: Frames of the last batch that was spoken.
        flags: Failures that the codes and the unrounded sound show.
    """

    arm: Arm
    utt: str
    seed: int
    group: str
    error: str | None = None
    sound: str | None = None
    num_frames: int | None = None
    audio_s: float | None = None
    stop_reason: str | None = None
    num_prompt_tokens: int | None = None
    wall_s: float | None = None
    last_frames: int | None = None
    flags: Mapping[str, bool | None] | None = None

    @property
    def key(self) -> Key:
        """Names the clip."""
        return (self.arm, self.utt, self.seed)

    @property
    def has_audio(self) -> bool:
        """Whether there is a sound file."""
        return self.sound is not None

    @classmethod
    def from_json(cls, row: Mapping[str, Any], path: Path) -> Clip:
        """Read a line.

        Args:
            row: The line's object.
            path: Where it stands, for messages.

        Returns:
            The clip.

        Raises:
            UserError: It has other fields than a clip.
        """
        names = {field.name for field in fields(cls)}
        if set(row) != names:
            raise UserError(
                f"{path}: a line with {sorted(set(row) ^ names)} too many or too few",
                "lines of this version of s2quant",
                "go on with the s2quant that began the run, or begin it anew",
            )
        return cls(**row)


@dataclass(frozen=True, kw_only=True)
class Store:
    """The folder of a run, as one process sees it.

    Args:
        folder: The folder.
        rank: Number of this process.
        go: How often the run had been begun or gone on with before.
    """

    folder: Path
    rank: int = 0
    go: int = 0

    @property
    def work(self) -> Path:
        """Where unfinished and intermediate things are."""
        return self.folder / "work"

    def relative(self, path: Path) -> str:
        """Give a path as records have it.

        Args:
            path: A path in the folder.

        Returns:
            Relative to the folder, with slashes.
        """
        return path.relative_to(self.folder).as_posix()

    def wav(self, job: Job) -> Path:
        """Name a clip's sound file."""
        return self.folder / "audio" / job.arm / f"{job.stem}.wav"

    def codes(self, job: Job) -> Path:
        """Name the file of a clip's codes."""
        return self.folder / "audio" / job.arm / f"{job.stem}.npy"

    def sequence(self, job: Job) -> Path:
        """Name the file of what the baseline read and spoke."""
        return self.work / "sequences" / f"{job.stem}.npy"

    def voice(self, utterance: Utterance) -> Path:
        """Name the file of a voice's codes."""
        return self.work / "voices" / f"{voice_id(utterance)}.npy"

    def prompt_audio(self, utterance: Utterance) -> Path | None:
        """Name the copy of the voice's recording.

        Args:
            utterance: The utterance.

        Returns:
            The file, or None without a voice.
        """
        if utterance.prompt_audio is None:
            return None
        name = f"{utterance.prompt_id}-{voice_id(utterance)[:8]}{utterance.prompt_audio.suffix.lower()}"
        return self.folder / "audio" / "prompt" / name

    def append(self, kind: str, row: Mapping[str, Any]) -> None:
        """Append a line to this process's file.

        Args:
            kind: "clips", "transcripts" or "embeddings".
            row: The line's object.

        Raises:
            UserError: The disk refuses.
        """
        append_line(self.work / f"{kind}-{self.go:05d}-{self.rank:03d}.jsonl", row)

    def rows(self, kind: str) -> list[tuple[Path, dict[str, Any]]]:
        """Read the lines of all processes.

        Args:
            kind: As in `append`.

        Returns:
            (file, object), in order of the goes, then of the processes.

        Raises:
            UserError: A line is damaged.
        """
        return [(path, row) for path in sorted(self.work.glob(f"{kind}-*.jsonl")) for row in read_lines(path)]

    def add_clip(self, clip: Clip) -> None:
        """Note what came of a job.

        Args:
            clip: The clip.

        Raises:
            UserError: The disk refuses.
        """
        self.append("clips", asdict(clip))

    def clips(self) -> dict[Key, Clip]:
        """Read what came of the jobs so far.

        Returns:
            What was written last about each clip.

        Raises:
            UserError: A line is damaged.
        """
        found: dict[Key, Clip] = {}
        for path, row in self.rows("clips"):
            clip = Clip.from_json(row, path)
            found[clip.key] = clip
        return found

    def has_clip(self, job: Job, clip: Clip | None, group: str) -> bool:
        """Tell whether a clip is there as the plan wants it, with all its files.

        Args:
            job: The clip's job.
            clip: What is written about it, if anything is.
            group: Name of the group that it is to be spoken in.

        Returns:
            Not for one that failed, or that was spoken in another group.
        """
        if clip is None or clip.error is not None or clip.group != group:
            return False
        files = [self.codes(job)]
        files += [self.wav(job)] if clip.has_audio else []
        files += [self.sequence(job)] if job.arm == "baseline" else []
        return all(path.is_file() for path in files)

    def remove_clip(self, job: Job) -> None:
        """Remove a clip's files before it is spoken anew, so that files of two attempts never stand side by side.

        Args:
            job: The clip's job.

        Raises:
            UserError: The disk refuses.
        """
        with disk_errors(self.folder):
            for path in (self.codes(job), self.wav(job), *([self.sequence(job)] if job.arm == "baseline" else [])):
                path.unlink(missing_ok=True)

    def transcripts(self, backend: str) -> dict[tuple[Key, str], str]:
        """Read what a recognizer has heard so far.

        Args:
            backend: Its name.

        Returns:
            Transcript by clip and `given`, the hash of the sounds that the recognizer was given together.

        Raises:
            UserError: A line is damaged.
        """
        rows = (row for _, row in self.rows("transcripts") if row.get("backend") == backend)
        return {((row["arm"], row["utt"], row["seed"]), row["given"]): row["hypothesis"] for row in rows}

    def embeddings(self, backend: str) -> dict[tuple[tuple[str, str, int], str], Tensor | None]:
        """Read what a speaker model has embedded so far.

        Args:
            backend: Its name.

        Returns:
            float32 [E] by clip, or ("prompt", voice id, 0), and `given`, the hash of its sound; None for one without
            enough sound.

        Raises:
            UserError: A line is damaged.
        """
        rows = (row for _, row in self.rows("embeddings") if row.get("backend") == backend)
        return {
            ((row["arm"], row["utt"], row["seed"]), row["given"]): None
            if row["embedding"] is None
            else torch.tensor(row["embedding"], dtype=torch.float32)
            for row in rows
        }


def voice_id(utterance: Utterance) -> str:
    """Name a voice by its recording and transcript.

    Args:
        utterance: An utterance with a voice.

    Returns:
        Hexadecimal digits, of what the recording holds and not of where it lies.
    """
    assert utterance.prompt_audio is not None
    return _voice_id(utterance.prompt_audio, utterance.prompt_text or "")


@cache
def _voice_id(path: Path, text: str) -> str:
    return sha256_text(f"{sha256_file(path)}\n{text}")[:24]


def save_array(path: Path, values: Tensor) -> None:
    """Write whole numbers; the file appears when it is complete.

    Args:
        path: The .npy file, replaced if it exists.
        values: int64.

    Raises:
        UserError: The disk refuses.
    """
    with atomic_file(path, overwrite=True) as partial:
        np.save(partial, values.cpu().numpy())


def load_array(path: Path) -> Tensor:
    """Read what `save_array` wrote.

    Args:
        path: The file.

    Returns:
        int64.

    Raises:
        UserError: The file is absent or damaged.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: {error}", "codes of this run", "begin the run anew") from error
    return torch.from_numpy(values.astype(np.int64))
