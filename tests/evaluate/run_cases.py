"""Runs on the tiny random checkpoint: small suites, damaged copies, listeners that know undamaged speech."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from folder_cases import change_tensors, link_copy

from s2quant.evaluate.plan import EvalOptions
from s2quant.evaluate.run import run_eval
from s2quant.quantize.rtn import rtn_quantize
from s2quant.recipe import LinearSettings

TEXTS = (
    "Good morning to all of you here today.",
    "[slow] The train leaves at nine from the old station.",
    "Please close the door behind you when you go.",
)
LINEAR = (".attention.wqkv.weight", ".attention.wo.weight", ".w1.weight", ".w2.weight", ".w3.weight")


def write_suite(folder: Path, texts: Sequence[str] = TEXTS, **changes: Any) -> Path:
    """A suite of some texts; a change of None takes the key out."""
    rows = [{"id": f"utt-{i}", "lang": "en", "text": text} for i, text in enumerate(texts)]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.jsonl").write_text(content, encoding="utf-8")
    data: dict[str, Any] = {
        "name": "tiny",
        "version": 1,
        "texts": {"file": "texts.jsonl", "sha256": hashlib.sha256(content.encode()).hexdigest()},
        "seeds": [0, 1],
        "floor_seeds": [100, 101],
        "max_frames": 40,
        "asr": {"kind": "pocketsphinx"},
        "normalizer": "whisper-english",
        "similarity": {"kind": "resemblyzer"},
        "metrics": ["wer", "similarity", "failures", "tokens"],
    } | changes
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}), encoding="utf-8")
    return path


def damaged(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a dense checkpoint with other weights."""
    link_copy(source, target)
    change_tensors(target, change)
    return target


def rounded(bits: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """Round the linears of all layers to nearest in groups of 32."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        settings = LinearSettings(method="rtn", bits=bits, group_size=32)
        for name in tensors:
            if name.endswith(LINEAR):
                tensors[name] = rtn_quantize(tensors[name], settings)[0].dequantize(torch.bfloat16)

    return change


def run(suite: Path, model: Path, out: Path, baseline: Path | None = None, **more: Any) -> dict[str, Any]:
    options = {"dtype": "float32", "num_slots": 3} | more
    progress = options.pop("progress", lambda phase, done, total: None)
    found = run_eval(EvalOptions(suite=suite, model=model, out=out, baseline=baseline, **options), progress)
    assert found is not None
    return found


def records(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "wall_s"} for row in rows]


def metric(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in results["metrics"] if row["name"].startswith(name))


def failures(results: dict[str, Any], kind: str, arm: str = "model") -> int:
    return next(row for row in results["failures"] if row["kind"] == kind)["arms"][arm]["count"]


def samples(audio: Any) -> np.ndarray:
    return np.round(np.asarray(audio, dtype=np.float64) * 32767).astype(np.int64)


class KnowingAsr:
    """Hears the words of a clip as far as it is, sample by sample, one that an undamaged model spoke.

    Random weights say nothing, so what counts is how long a clip goes along with the best of the undamaged ones.
    """

    name = "knowing:1"

    def __init__(self) -> None:
        self.known: list[tuple[str, np.ndarray]] = []

    def learn(self, out: Path) -> None:
        for row in records(out):
            if row["arm"] != "model" and row["audio"]:
                self.known.append((row["reference"], samples(soundfile.read(out / row["audio"])[0])))

    def transcribe(self, audio: Any, sample_rate: int, lang: str) -> str:
        clip, best, heard = samples(audio), -1.0, ""
        for text, sound in self.known:
            length = min(len(clip), len(sound))
            wrong = np.flatnonzero(clip[:length] != sound[:length])
            same = int(wrong[0]) if len(wrong) else length
            words = text.split()
            if same / max(1, len(sound)) > best:
                best = same / max(1, len(sound))
                heard = " ".join(word if i < round(best * len(words)) else "mumble" for i, word in enumerate(words))
        return heard

    def transcribe_batch(self, clips: Sequence[Any], sample_rate: int, lang: str) -> list[str]:
        return [self.transcribe(clip, sample_rate, lang) for clip in clips]


class SpectrumModel:
    """Embeds a clip as its coarse spectrum."""

    name = "spectrum:1"

    def embed(self, audio: Any, sample_rate: int) -> torch.Tensor | None:
        spectrum = np.abs(np.fft.rfft(np.asarray(audio, dtype=np.float64)))
        return torch.tensor([float(part.mean()) for part in np.array_split(spectrum, 24)])
