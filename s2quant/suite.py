"""A suite: what the evaluation says, hears and asks for.

A suite is a YAML file in `eval/suites`, data that can be read, diffed and shared; its schema stands in
`eval/README.md`. Its texts are a JSONL file pinned by sha256, or a list in the format of seed-tts-eval of which the
user has a copy. Everything that can move a number stands in it: texts, voices, seeds, sampling, recognizer,
normalizer, similarity back end, margins, gates. Unknown keys, values out of range, files that are absent or are not
those that were pinned, and contradictions are refused; every offender is named in one message.

Source: BytedanceSpeech/seed-tts-eval at 752f4297f090c46bb1a55a1f7439e5944ddefe8d, get_wav_res_ref_text.py (lists).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from s2quant.errors import UserError, shorten_list
from s2quant.files import read_text, sha256_file, sha256_text
from s2quant.sampling import Sampling, sampling_faults

METRICS = ("wer", "similarity", "failures", "tokens", "speed")
ASR_KINDS = ("whisper", "pocketsphinx")
SIMILARITY_KINDS = ("wavlm-xvector", "wavlm-ecapa", "resemblyzer")
NORMALIZERS = ("whisper-english", "whisper-basic", "seed-tts")
# Languages a normalizer is made for; None for any.
NORMALIZER_LANGUAGES: Mapping[str, tuple[str, ...] | None] = {
    "whisper-english": ("en",),
    "whisper-basic": None,
    "seed-tts": ("en", "zh"),
}
MARGINS = ("wer", "wer_mean", "similarity_to_prompt")
GATES = (
    "wer_max",
    "wer_delta_max",
    "similarity_delta_min",
    "similarity_to_baseline_min",
    "failure_rate_max",
    "failure_delta_max",
    "error_rate_max",
    "kl_semantic_max",
    "top1_agreement_min",
    "rtf_ratio_max",
)
FAIL_ON = ("inferior", "inconclusive")
_KEYS = {
    "name", "version", "description", "texts", "voices", "seeds", "floor_seeds", "sampling", "max_frames", "metrics",
    "asr", "normalizer", "similarity", "margins", "fail_on", "gates",
}  # fmt: skip
_TEXT_KEYS = {"file", "sha256", "format", "lang", "num_utterances"}
_ROW_KEYS = ("id", "lang", "text", "voice")
_VOICE_KEYS = {"audio", "text", "sha256"}
_WORD = re.compile(r"[a-z0-9][a-z0-9.-]*")
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


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A whole suite, checked.

    Args:
        name: Short name.
        version: Raised by every change that can move a number.
        description: What it is for.
        utterances: What is spoken, in the order of the texts.
        seeds: Seeds that both arms are sampled with.
        floor_seeds: Seeds of the noise floor, the baseline against itself; as many as `seeds`, none in both. Empty
            for no floor.
        sampling: How speech is sampled.
        max_frames: Most frames of an utterance.
        metrics: Some of METRICS.
        asr: One of ASR_KINDS.
        asr_model: File of the recognizer, `official:NAME` for one that its package may fetch, or None for the model
            that comes with the package.
        normalizer: One of NORMALIZERS.
        similarity: One of SIMILARITY_KINDS.
        similarity_model: Its file or folder, or None for the one that comes with the package.
        margins: Largest loss against the baseline that still is called none, by metric: fractions and cosines.
        fail_on: Whether only "inferior" or also "inconclusive" is a failure.
        gates: Limits by name, a measured number beyond one of them is a failure.
        texts_sha256: Hash of the texts as read.
        sha256: Hash of everything: the suite's own file, the texts and the voices.
        path: Where the suite was read.
    """

    name: str
    version: int
    description: str
    utterances: tuple[Utterance, ...]
    seeds: tuple[int, ...]
    floor_seeds: tuple[int, ...]
    sampling: Sampling
    max_frames: int
    metrics: tuple[str, ...]
    asr: Literal["whisper", "pocketsphinx"]
    asr_model: str | None
    normalizer: Literal["whisper-english", "whisper-basic", "seed-tts"]
    similarity: Literal["wavlm-xvector", "wavlm-ecapa", "resemblyzer"]
    similarity_model: str | None
    margins: Mapping[str, float]
    fail_on: Literal["inferior", "inconclusive"]
    gates: Mapping[str, float]
    texts_sha256: str
    sha256: str
    path: Path


def load_suite(path: Path, texts: Path | None = None) -> Suite:
    """Read and check a suite with its texts and voices.

    Args:
        path: The YAML file.
        texts: The user's copy of the list, for a suite whose texts have the format `seed-tts`; else None.

    Returns:
        The suite.

    Raises:
        UserError: A file is unreadable or not what was pinned, or the suite is wrong; every offender is listed.
    """
    source = read_text(path)
    try:
        data = yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {error}", "a YAML suite", "mend the syntax") from error
    faults: list[str] = []
    if not isinstance(data, Mapping):
        faults.append("the file holds no mapping")
        data = {}
    else:
        _unknown(data, _KEYS, "", faults)
    values = _scalars(data, faults) | _back_ends(data, path.parent, faults)
    voices = _voices(data.get("voices", {}), path.parent, faults)
    utterances, texts_sha256 = _texts(data.get("texts"), path.parent, texts, voices, faults)
    _languages(utterances, str(values["normalizer"]), faults)
    if "similarity_to_prompt" in values["margins"] and utterances and not any(one.prompt_audio for one in utterances):
        faults.append("margins.similarity_to_prompt, and no text has a voice: it would never be judged")
    if faults:
        raise UserError(f"suite {path}:\n{shorten_list(faults)}", "a suite as in eval/README.md", "mend the suite")
    hashes = [sha256_text(source), texts_sha256, *(voices[name].sha256 for name in sorted(voices))]
    whole = sha256_text("\n".join(hashes))
    return Suite(utterances=utterances, texts_sha256=texts_sha256, sha256=whole, path=path.resolve(), **values)


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


def _unknown(table: Mapping[Any, Any], known: set[str], where: str, faults: list[str]) -> None:
    prefix = f"{where}: " if where else ""
    faults += [f"{prefix}unknown key {key!r} (known: {', '.join(sorted(known))})" for key in table if key not in known]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _scalars(data: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """Take everything but texts, voices and back ends from a suite."""
    values: dict[str, Any] = {"description": "", "max_frames": 2048, "fail_on": "inferior", "metrics": list(METRICS)}
    values |= {key: data[key] for key in ("name", "version", *values) if key in data}
    if not isinstance(values.get("name"), str) or not _WORD.fullmatch(values["name"]):
        faults.append(f"name is {values.get('name')!r}, not a word of lower-case letters, digits, '-' and '.'")
    for key in ("version", "max_frames"):
        if not _whole(values.get(key), 1):
            faults.append(f"{key} is {values.get(key)!r}, not a positive whole number")
    if not isinstance(values["description"], str):
        faults.append(f"description is {values['description']!r}, not text")
    if values["fail_on"] not in FAIL_ON:
        faults.append(f"fail_on is {values['fail_on']!r}, not one of {FAIL_ON}")
    metrics = values["metrics"]
    if not isinstance(metrics, list) or not metrics or any(name not in METRICS for name in metrics):
        faults.append(f"metrics is {metrics!r}, not some of {METRICS}")
    else:
        values["metrics"] = tuple(name for name in METRICS if name in metrics)
    values["sampling"] = _sampling(data.get("sampling", {}), faults)
    values["margins"] = _limits(data.get("margins", {}), "margins", MARGINS, faults)
    values["gates"] = _limits(data.get("gates", {}), "gates", GATES, faults)
    faults += [f"margins.{key} is {limit}, not positive" for key, limit in values["margins"].items() if limit <= 0]
    return values | _seeds(data, faults)


def _seeds(data: Mapping[str, Any], faults: list[str]) -> dict[str, tuple[int, ...]]:
    values: dict[str, tuple[int, ...]] = {}
    for key in ("seeds", "floor_seeds"):
        seeds = data.get(key, [] if key == "floor_seeds" else None)
        if not isinstance(seeds, list) or not all(_whole(seed, 0) for seed in seeds) or len(set(seeds)) < len(seeds):
            faults.append(f"{key} is {seeds!r}, not a list of different whole numbers from 0")
            seeds = []
        elif not seeds and key == "seeds":
            faults.append("seeds is empty: at least one is needed")
        values[key] = tuple(seeds)
    if both := sorted(set(values["seeds"]) & set(values["floor_seeds"])):
        faults.append(f"seeds and floor_seeds share {both}: the floor would be compared with itself")
    if values["floor_seeds"] and values["seeds"] and len(values["floor_seeds"]) != len(values["seeds"]):
        counts = f"{len(values['floor_seeds'])} floor_seeds for {len(values['seeds'])} seeds"
        faults.append(f"{counts}: as many are needed, the floor is paired seed by seed")
    return values


def _sampling(table: Any, faults: list[str]) -> Sampling:
    if not isinstance(table, Mapping):
        faults.append(f"sampling is {table!r}, not a mapping")
        return Sampling()
    _unknown(table, {"temperature", "top_p", "top_k"}, "sampling", faults)
    wrong = [f"sampling.{key} is {table[key]!r}, not a number" for key in table if not _number(table[key])]
    if "top_k" in table and _number(table["top_k"]) and not isinstance(table["top_k"], int):
        wrong.append(f"sampling.top_k is {table['top_k']!r}, not a whole number")
    if wrong:
        faults += wrong
        return Sampling()
    sampling = Sampling(**{key: table[key] for key in ("temperature", "top_p", "top_k") if key in table})
    faults += sampling_faults(sampling, "sampling")
    return sampling


def _limits(table: Any, where: str, known: Sequence[str], faults: list[str]) -> dict[str, float]:
    if not isinstance(table, Mapping):
        faults.append(f"{where} is {table!r}, not a mapping")
        return {}
    _unknown(table, set(known), where, faults)
    faults += [f"{where}.{key} is {value!r}, not a number" for key, value in table.items() if not _number(value)]
    return {key: float(table[key]) for key in known if key in table and _number(table[key])}


def _back_ends(data: Mapping[str, Any], folder: Path, faults: list[str]) -> dict[str, Any]:
    """Take the recognizer, the normalizer and the similarity back end."""
    values: dict[str, Any] = {}
    for key, kinds in (("asr", ASR_KINDS), ("similarity", SIMILARITY_KINDS)):
        table = data.get(key)
        if not isinstance(table, Mapping):
            faults.append(f"{key} is {table!r}, not a mapping with a kind and perhaps a model")
            table = {}
        _unknown(table, {"kind", "model"}, key, faults)
        kind, model = table.get("kind"), table.get("model")
        if kind not in kinds:
            faults.append(f"{key}.kind is {kind!r}, not one of {kinds}")
        if model is not None and not isinstance(model, str):
            faults.append(f"{key}.model is {model!r}, not a path")
            model = None
        official = model is not None and model.startswith("official:")
        values[key] = kind
        values[f"{key}_model"] = model if model is None or official else str((folder / model).resolve())
    values["normalizer"] = data.get("normalizer")
    if values["normalizer"] not in NORMALIZERS:
        faults.append(f"normalizer is {values['normalizer']!r}, not one of {NORMALIZERS}")
    return values


def _voices(table: Any, folder: Path, faults: list[str]) -> dict[str, Voice]:
    if not isinstance(table, Mapping):
        faults.append(f"voices is {table!r}, not a mapping of names")
        return {}
    voices = {}
    for name, row in table.items():
        where = f"voices.{name}"
        if not isinstance(name, str) or not _ID.fullmatch(name) or not isinstance(row, Mapping):
            faults.append(f"{where} is not a name with a mapping of {', '.join(sorted(_VOICE_KEYS))}")
            continue
        _unknown(row, _VOICE_KEYS, where, faults)
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


def _texts(
    table: Any, folder: Path, given: Path | None, voices: Mapping[str, Voice], faults: list[str]
) -> tuple[tuple[Utterance, ...], str]:
    """Read the texts of a suite; gives them with their hash."""
    if not isinstance(table, Mapping):
        faults.append("texts is missing: file and sha256, or format seed-tts")
        return (), ""
    _unknown(table, _TEXT_KEYS, "texts", faults)
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


def _languages(utterances: Sequence[Utterance], normalizer: str, faults: list[str]) -> None:
    allowed = NORMALIZER_LANGUAGES.get(normalizer)
    if allowed and (other := sorted({one.lang for one in utterances} - set(allowed))):
        faults.append(f"normalizer {normalizer} is for {', '.join(allowed)}; the texts have {', '.join(other)}")
