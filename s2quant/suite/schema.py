"""The suite's own file: seeds, sampling, metrics, recognizer, normalizer, similarity back end, margins and gates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from s2quant.errors import UserError, shorten_list
from s2quant.files import read_text, sha256_text
from s2quant.sampling import Sampling, sampling_faults
from s2quant.suite.texts import Utterance, read_texts, read_voices, unknown_keys

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
_WORD = re.compile(r"[a-z0-9][a-z0-9.-]*")


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
        unknown_keys(data, _KEYS, "", faults)
    values = _scalars(data, faults) | _back_ends(data, path.parent, faults)
    voices = read_voices(data.get("voices", {}), path.parent, faults)
    utterances, texts_sha256 = read_texts(data.get("texts"), path.parent, texts, voices, faults)
    _languages(utterances, str(values["normalizer"]), faults)
    if "similarity_to_prompt" in values["margins"] and utterances and not any(one.prompt_audio for one in utterances):
        faults.append("margins.similarity_to_prompt, and no text has a voice: it would never be judged")
    if faults:
        raise UserError(f"suite {path}:\n{shorten_list(faults)}", "a suite as in eval/README.md", "mend the suite")
    hashes = [sha256_text(source), texts_sha256, *(voices[name].sha256 for name in sorted(voices))]
    whole = sha256_text("\n".join(hashes))
    return Suite(utterances=utterances, texts_sha256=texts_sha256, sha256=whole, path=path.resolve(), **values)


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
    unknown_keys(table, {"temperature", "top_p", "top_k"}, "sampling", faults)
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
    unknown_keys(table, set(known), where, faults)
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
        unknown_keys(table, {"kind", "model"}, key, faults)
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


def _languages(utterances: Sequence[Utterance], normalizer: str, faults: list[str]) -> None:
    allowed = NORMALIZER_LANGUAGES.get(normalizer)
    if allowed and (other := sorted({one.lang for one in utterances} - set(allowed))):
        faults.append(f"normalizer {normalizer} is for {', '.join(allowed)}; the texts have {', '.join(other)}")
