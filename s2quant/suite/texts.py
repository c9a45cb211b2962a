"""What a suite has its models say and in whose voices: pinned JSONL, or a list in the format of seed-tts-eval.

Source: BytedanceSpeech/seed-tts-eval at 752f4297f090c46bb1a55a1f7439e5944ddefe8d, get_wav_res_ref_text.py (lists).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2quant.errors import UserError, shorten_list
from s2quant.files import read_text, sha256_file, sha256_text

_TEXT_KEYS = {"file", "sha256", "format", "lang", "num_utterances"}
_ROW_KEYS = ("id", "lang", "text", "voice")
_VOICE_KEYS = {"audio", "text", "sha256"}
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One text that both arms speak.

    Args:
        id: Unique in the suite; letters, digits, `.`, `_` and `-`, so that files can be called by it.
        text: What is spoken, with inline [tags] and speaker marks as the model takes them.
        lang: ISO 639 code such as "en".
        prompt_id: Name of the voice, or None for the model's own choice; utterances of one voice are not independent.
        prompt_audio: Recording of the voice.
        prompt_text: What is said in the recording.
    """

    id: str
    text: str
    lang: str
    prompt_id: str | None = None
    prompt_audio: Path | None = None
    prompt_text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A recording whose voice an utterance is spoken in.

    Args:
        audio: The recording.
        text: What is said in it.
        sha256: Hash of the recording.
    """

    audio: Path
    text: str
    sha256: str


def read_seed_tts_list(path: Path, lang: str = "en") -> tuple[Utterance, ...]:
    """Read a list in the format of seed-tts-eval.

    A line has 2 to 5 fields between `|`: `id|text`, `id|text|voice`, `id|voice text|voice|text` or
    `id|voice text|voice|text|recording of the text`. With 3 fields a `.wav` at the end of the id is cut. A voice
    that is not absolute lies in the list's folder.

    Args:
        path: The list.
        lang: Language of its texts.

    Returns:
        The utterances in the order of the list; `prompt_id` is the name of the voice's file without its suffix.

    Raises:
        UserError: A line has another number of fields, an id or a text is missing or an id comes twice, or a voice's
            file is absent; every offender is listed.
    """
    faults: list[str] = []
    utterances: list[Utterance] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        fields = line.strip().split("|")
        if not 2 <= len(fields) <= 5:
            faults.append(f"line {number}: {len(fields)} fields")
            continue
        name, prompt_text, voice, text = _seed_tts_fields(fields)
        audio = path.parent / voice if voice else None  # an absolute path stays as it is
        if audio is not None and not audio.is_file():
            faults.append(f"line {number}: no file {audio}")
        utterances.append(
            Utterance(
                id=name,
                text=text,
                lang=lang,
                prompt_id=audio.stem if audio else None,
                prompt_audio=audio,
                prompt_text=prompt_text,
            )
        )
    faults += _id_faults(utterances)
    if faults or not utterances:
        raise UserError(
            f"list {path}:\n{shorten_list(faults or ['no lines'])}",
            "lines of 2 to 5 fields between '|', as seed-tts-eval has them, with the recordings beside the list",
            "check that the copy is whole",
        )
    return tuple(utterances)


def _seed_tts_fields(fields: Sequence[str]) -> tuple[str, str | None, str | None, str]:
    """Give id, text of the voice, voice and text of a line."""
    if len(fields) == 2:
        return fields[0], None, None, fields[1]
    if len(fields) == 3:
        return fields[0].removesuffix(".wav"), None, fields[2], fields[1]
    return fields[0], fields[1], fields[2], fields[3]


def unknown_keys(table: Mapping[Any, Any], known: set[str], where: str, faults: list[str]) -> None:
    """Name the keys that a mapping should not have.

    Args:
        table: The mapping.
        known: What it may have.
        where: The mapping's place in the suite; empty for the suite itself.
        faults: Gets a sentence for each, in place.
    """
    prefix = f"{where}: " if where else ""
    faults += [f"{prefix}unknown key {key!r} (known: {', '.join(sorted(known))})" for key in table if key not in known]


def read_voices(table: Any, folder: Path, faults: list[str]) -> dict[str, Voice]:
    """Read the voices of a suite.

    Args:
        table: Its `voices`.
        folder: Where the suite lies.
        faults: Gets what is wrong, in place.

    Returns:
        Those that are right, by name.
    """
    if not isinstance(table, Mapping):
        faults.append(f"voices is {table!r}, not a mapping of names")
        return {}
    voices = {}
    for name, row in table.items():
        where = f"voices.{name}"
        if not isinstance(name, str) or not _ID.fullmatch(name) or not isinstance(row, Mapping):
            faults.append(f"{where} is not a name with a mapping of {', '.join(sorted(_VOICE_KEYS))}")
            continue
        unknown_keys(row, _VOICE_KEYS, where, faults)
        wrong = [key for key in sorted(_VOICE_KEYS) if not isinstance(row.get(key), str) or not row[key].strip()]
        faults += [f"{where}.{key} is {row.get(key)!r}, not text" for key in wrong]
        if wrong:
            continue
        audio = folder / row["audio"]
        if _pinned(audio, row["sha256"], where, faults):
            voices[name] = Voice(audio=audio.resolve(), text=row["text"], sha256=row["sha256"])
    return voices


def _pinned(path: Path, sha256: Any, where: str, faults: list[str]) -> bool:
    """Tell whether a file is the one that was pinned; if not, say so in `faults`."""
    if not path.is_file():
        faults.append(f"{where}: no file {path}")
    elif not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        faults.append(
            f"{where}: sha256 is {sha256!r}, not 64 hexadecimal digits (that of {path} is {sha256_file(path)})"
        )
    elif sha256_file(path) != sha256:
        faults.append(
            f"{where}: {path} has sha256 {sha256_file(path)}, not {sha256}; a changed text needs a new version"
        )
    else:
        return True
    return False


def read_texts(
    table: Any, folder: Path, given: Path | None, voices: Mapping[str, Voice], faults: list[str]
) -> tuple[tuple[Utterance, ...], str]:
    """Read the texts of a suite.

    Args:
        table: Its `texts`.
        folder: Where the suite lies.
        given: The user's copy of the list, for the format `seed-tts`.
        voices: The suite's voices.
        faults: Gets what is wrong, in place.

    Returns:
        The utterances that are right, and the texts' hash.
    """
    if not isinstance(table, Mapping):
        faults.append("texts is missing: file and sha256, or format seed-tts")
        return (), ""
    unknown_keys(table, _TEXT_KEYS, "texts", faults)
    kind = table.get("format", "jsonl")
    if kind not in ("jsonl", "seed-tts"):
        faults.append(f"texts.format is {kind!r}, not 'jsonl' or 'seed-tts'")
        return (), ""
    utterances, sha256 = _listed(table, given, faults) if kind == "seed-tts" else _rows(table, folder, voices, faults)
    if kind == "jsonl" and given is not None:
        faults.append(f"texts {given}, but the suite has texts of its own")
    wanted = table.get("num_utterances")
    if wanted is not None and utterances and wanted != len(utterances):
        faults.append(f"texts: {len(utterances)} utterances, not {wanted}")
    return utterances, sha256


def _listed(table: Mapping[str, Any], given: Path | None, faults: list[str]) -> tuple[tuple[Utterance, ...], str]:
    lang = table.get("lang")
    if "file" in table:
        faults.append("texts.file: the list is the user's own, named on the command line")
    if not isinstance(lang, str) or not _LANGUAGE.fullmatch(lang):
        faults.append(f"texts.lang is {lang!r}, not a language code such as 'en'")
        return (), ""
    if given is None:
        faults.append("texts: a list of seed-tts-eval, which does not come with s2quant; name your copy with --texts")
        return (), ""
    pin = table.get("sha256")
    if pin is not None and not _pinned(given, pin, "texts", faults):
        return (), ""
    return read_seed_tts_list(given, lang), sha256_text(read_text(given))


def _rows(
    table: Mapping[str, Any], folder: Path, voices: Mapping[str, Voice], faults: list[str]
) -> tuple[tuple[Utterance, ...], str]:
    """Read pinned JSONL; a row without a voice takes the next one in turn."""
    if not isinstance(table.get("file"), str):
        faults.append(f"texts.file is {table.get('file')!r}, not a path")
        return (), ""
    if "lang" in table:
        faults.append("texts.lang: the rows name their languages")
    path = folder / table["file"]
    if not _pinned(path, table.get("sha256"), "texts", faults):
        return (), ""
    utterances: list[Utterance] = []
    names = list(voices)
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            faults.append(f"{path.name} line {number}: not JSON ({error.msg} at column {error.colno})")
            continue
        wrong = _row_faults(row, voices)
        faults += [f"{path.name} line {number}: {fault}" for fault in wrong]
        if wrong:
            continue
        name = row.get("voice") or (names[len(utterances) % len(names)] if names else None)
        voice = voices[name] if name else None
        prompt: dict[str, Any] = {"prompt_audio": voice.audio, "prompt_text": voice.text} if voice else {}
        utterances.append(Utterance(id=row["id"], text=row["text"], lang=row["lang"], prompt_id=name, **prompt))
    faults += [f"{path.name}: {fault}" for fault in _id_faults(utterances)]
    if not utterances:
        faults.append(f"{path.name}: no texts")
    return tuple(utterances), str(table["sha256"])


def _row_faults(row: Any, voices: Mapping[str, Voice]) -> list[str]:
    if not isinstance(row, dict):
        return [f"a JSON {type(row).__name__}, not an object"]
    faults = [f"unknown key {key!r}" for key in row if key not in _ROW_KEYS]
    needed = [key for key in _ROW_KEYS if key != "voice" or "voice" in row]
    faults += [
        f"{key} is {row.get(key)!r}, not text"
        for key in needed
        if not isinstance(row.get(key), str) or not row[key].strip()
    ]
    if not faults and not _LANGUAGE.fullmatch(row["lang"]):
        faults.append(f"lang is {row['lang']!r}, not a language code such as 'en'")
    if not faults and "voice" in row and row["voice"] not in voices:
        faults.append(f"voice {row['voice']!r} (voices: {', '.join(voices) or 'none'})")
    return faults


def _id_faults(utterances: Sequence[Utterance]) -> list[str]:
    faults, seen = [], set()
    for one in utterances:
        if not _ID.fullmatch(one.id):
            faults.append(f"id {one.id!r}, not letters, digits, '.', '_' and '-'")
        elif one.id in seen:
            faults.append(f"id {one.id!r} comes twice")
        if not one.text.strip():
            faults.append(f"id {one.id!r} has no text")
        seen.add(one.id)
    return faults
