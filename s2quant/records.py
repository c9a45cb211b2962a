"""Manifests and records: what went into an output, so that it can be made again and compared, and what came out.

Every output folder of s2quant holds a `manifest.json`: the stage, its inputs with sha256, the recipe, the seed,
versions of the libraries that can move a number, the device, and the commit of s2quant when it runs from a checkout.

An evaluation has one record per arm, utterance and seed, a line of JSON each. Lines are appended and brought to the
disk one by one, so a run that is killed keeps all but the line it was writing; such a torn last line is dropped.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from s2quant.errors import UserError
from s2quant.files import atomic_file, disk_errors, read_json, read_text, sha256_file, side_by_side

LIBRARIES = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "transformers",
    "gptqmodel",
    "datasets",
    "soundfile",
    "soxr",
    "triton",
)
RECORD_VERSION = 1
Arm = Literal["baseline", "model", "floor"]
ARMS: tuple[Arm, ...] = ("baseline", "model", "floor")


def versions(more: Sequence[str] = ()) -> dict[str, str | None]:
    """Name the versions of everything that can move a number.

    Args:
        more: Libraries beside those of every stage.

    Returns:
        Version by library; None for one that is not installed.
    """
    found: dict[str, str | None] = {"s2quant": _version("s2quant"), "python": platform.python_version()}
    return found | {name: _version(name) for name in (*LIBRARIES, *more)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Name the commit of the checkout that s2quant runs from.

    Returns:
        The commit, with "+dirty" when files differ from it; None outside a checkout.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+dirty" if status.strip() else "")


def hashed_files(folder: Path) -> list[Path]:
    """List what identifies a folder.

    Args:
        folder: The folder.

    Returns:
        The files directly in it, sorted by name, without hidden ones and the manifest.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return [path for path in files if path.name != "manifest.json"]


def folder_hashes(folder: Path) -> dict[str, str]:
    """Hash what identifies a folder.

    Args:
        folder: The folder.

    Returns:
        sha256 by file name, sorted: of `hashed_files`.
    """
    files = hashed_files(folder)
    return dict(zip([path.name for path in files], side_by_side(sha256_file, files), strict=True))


def manifest(stage: str, inputs: Mapping[str, Any], device: str, seed: int | None, **details: Any) -> dict[str, Any]:
    """Compose a manifest.

    Args:
        stage: What made the output: "quantize", "random", "export", ...
        inputs: What went in, with hashes.
        device: The device's name.
        seed: The seed, if any was used.
        **details: More facts of the stage.

    Returns:
        The object to write as manifest.json.
    """
    return {
        "manifest_version": 1,
        "stage": stage,
        "inputs": dict(inputs),
        "seed": seed,
        "device": device,
        "versions": versions(),
        "s2quant_commit": git_commit(),
        **details,
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest.

    Args:
        folder: The folder.

    Returns:
        The object; empty where there is none.

    Raises:
        UserError: The file is no JSON object.
    """
    path = folder / "manifest.json"
    return read_json(path) if path.is_file() else {}


def made_by(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the manifest of the stage that made the weights: an export has them from its source, and says how.

    Args:
        record: A manifest.

    Returns:
        The first one that is no export's, or the last one that is known.
    """
    while record.get("stage") == "export" and isinstance(record.get("source"), Mapping):
        record = record["source"]
    return record


def input_facts(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Look up what a manifest, ours or anybody's, says of an input.

    Args:
        record: A manifest.
        name: The input: "model", "recipe", ...

    Returns:
        The facts; empty where there are none.
    """
    inputs = record.get("inputs")
    found = inputs.get(name) if isinstance(inputs, Mapping) else None
    return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True, kw_only=True)
class UtteranceRecord:
    """One utterance of one arm with one seed: a line of records.jsonl. What was not measured is None, never 0.

    Args:
        suite: The suite's name.
        suite_version: Its version.
        arm: "baseline", "model", or "floor": the baseline with other seeds.
        utt: The utterance's id.
        seed: The seed it was sampled with.
        lang: ISO 639 code.
        text: What was spoken, with tags and speaker marks.
        reference: The text without them.
        has_tags: Whether the text has inline tags.
        prompt_id: The voice's name, or None without a voice.
        prompt_audio: The voice's recording, relative to the run's folder.
        audio: The sound, relative to the run's folder; None when there is none.
        codes: The codes, int64 [N, F], relative to the run's folder.
        num_frames: F.
        audio_s: Length of the sound.
        stop_reason: "end", "limit" or "full", see `Speech`.
        num_prompt_tokens: Positions prefilled.
        wall_s: Time from taking a slot to the end, shared with other utterances.
        error: Why there is no sound, in one sentence; None when there is.
        asr: Transcript and errors.
        sim: Cosines to the voice and to the baseline's clip.
        failures: Whether it failed, by kind; None for a kind that cannot be told.
        duration_ratio: Frames of the clip over those of the baseline's.
        tokens: Token metrics of the baseline's speech as this arm sees it.
    """

    suite: str
    suite_version: int
    arm: Arm
    utt: str
    seed: int
    lang: str
    text: str
    reference: str
    has_tags: bool
    prompt_id: str | None = None
    prompt_audio: str | None = None
    audio: str | None = None
    codes: str | None = None
    num_frames: int | None = None
    audio_s: float | None = None
    stop_reason: Literal["end", "limit", "full"] | None = None
    num_prompt_tokens: int | None = None
    wall_s: float | None = None
    error: str | None = None
    asr: Mapping[str, Any] | None = None
    sim: Mapping[str, Any] | None = None
    failures: Mapping[str, bool | None] | None = None
    duration_ratio: float | None = None
    tokens: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Compose the line's object.

        Returns:
            Plain values, with the version of the format.
        """
        return {"record_version": RECORD_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "record") -> UtteranceRecord:
        """Read a line's object.

        Args:
            data: What `to_json` made.
            where: Names it in messages.

        Returns:
            The record.

        Raises:
            UserError: It is of another version, or has other fields than a record.
        """
        names = {field.name for field in fields(cls)}
        faults = []
        if data.get("record_version") != RECORD_VERSION:
            faults.append(f"record_version is {data.get('record_version')!r}")
        faults += [f"no {name}" for name in sorted(names - set(data))]
        faults += [f"unknown field {name!r}" for name in sorted(set(data) - names - {"record_version"})]
        if data.get("arm") not in ARMS:
            faults.append(f"arm is {data.get('arm')!r}")
        if faults:
            raise UserError(
                f"{where}: {', '.join(faults)}",
                f"a record of version {RECORD_VERSION}",
                "run `s2quant eval --resume` again with the s2quant that made it",
            )
        return cls(**{name: data[name] for name in names})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines, without a last one that a killed run left torn.

    Args:
        path: The file; when it is absent there are no lines.

    Returns:
        The objects.

    Raises:
        UserError: A line that is not the last is no JSON object, or the file is unreadable.
    """
    if not path.exists():
        return []
    lines = _whole_lines(path).split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _no_object(path, number, str(error)) from error
        if not isinstance(row, dict):
            raise _no_object(path, number, f"a JSON {type(row).__name__}")
        found.append(row)
    return found


def _whole_lines(path: Path) -> str:
    """Read a file up to its last line break."""
    data = path.read_bytes()
    try:
        return data[: data.rfind(b"\n") + 1].decode("utf-8")
    except UnicodeDecodeError:
        return read_text(path)  # says what is wrong, and where


def _no_object(path: Path, number: int, reason: str) -> UserError:
    return UserError(
        f"{path}, line {number}: {reason}", "one JSON object per line", "remove the line: it is made again"
    )


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one object and bring it to the disk; a torn last line is cut off first.

    Args:
        path: The file; made when absent. One process writes to it at a time.
        row: What to write.

    Raises:
        UserError: The disk refuses.
        ValueError: A value is NaN or infinite: such a number is None in a record.
    """
    line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            _cut_torn(file)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _cut_torn(file: Any) -> None:
    """Truncate an open file behind its last line break."""
    end = size = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            end = start + place + 1
            break
        end = start
    if end < size:
        file.truncate(end)
    file.seek(end)


def write_records(path: Path, records: Iterable[UtteranceRecord]) -> None:
    """Write all records of a run; the file appears when it is complete.

    Args:
        path: The file, replaced if it exists.
        records: The records.

    Raises:
        UserError: The disk refuses.
    """
    with atomic_file(path, overwrite=True) as partial, partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False) + "\n")


def read_records(path: Path) -> list[UtteranceRecord]:
    """Read all records of a run.

    Args:
        path: The file.

    Returns:
        The records in the order of the lines.

    Raises:
        UserError: The file is absent, or a line is no record.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file", "the records of an evaluation", "run `s2quant eval` first")
    rows = enumerate(read_lines(path), 1)
    return [UtteranceRecord.from_json(row, f"{path}, line {number}") for number, row in rows]
