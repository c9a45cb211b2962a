"""The table of recipes on the tiny random checkpoint: sizes, damage, pairs, what is kept, and what the page says."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipes_figures
import recipes_page
import recipes_table
import soundfile
import torch
import yaml

from s2quant.checkpoint.config import S2Config
from s2quant.errors import UserError
from s2quant.evaluate import run as run_module
from s2quant.evaluate.stats import paired_bootstrap
from s2quant.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = ("tiny-w4a16", "tiny-w4a16-text", "tiny-w8a16")


class Ears:
    """Hears as many words as a clip has tenths of a second, and embeds a spectrum; counts what it hears."""

    name = "ears:1"
    heard = 0

    def transcribe_batch(self, clips: Any, sample_rate: int, lang: str) -> list[str]:
        Ears.heard += len(clips)
        return ["the horse " * (len(clip) * 10 // sample_rate) for clip in clips]

    def transcribe(self, audio: Any, sample_rate: int, lang: str) -> str:
        return ""

    def embed(self, audio: Any, sample_rate: int) -> torch.Tensor:
        spectrum = np.abs(np.fft.rfft(np.asarray(audio, dtype=np.float64)))
        return torch.tensor([float(part.mean()) for part in np.array_split(spectrum, 24)])


def write_suite(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    texts = ("The horse ran.", "A horse is here today.", "Where is the horse?")
    rows = "".join(json.dumps({"id": f"u{i}", "lang": "en", "text": text}) + "\n" for i, text in enumerate(texts))
    (folder / "texts.jsonl").write_text(rows)
    soundfile.write(folder / "tone.wav", 0.2 * np.sin(np.arange(16000) * 0.05), 16000)
    suite = {
        "name": "tiny", "version": 1, "seeds": [0, 1], "floor_seeds": [100, 101], "max_frames": 16,
        "texts": {"file": "texts.jsonl", "sha256": hashlib.sha256(rows.encode()).hexdigest()},
        "voices": {"tone": {
            "audio": "tone.wav", "text": "A tone.",
            "sha256": hashlib.sha256((folder / "tone.wav").read_bytes()).hexdigest(),
        }},
        "asr": {"kind": "pocketsphinx"}, "normalizer": "whisper-english", "similarity": {"kind": "resemblyzer"},
        "margins": {"wer": 0.02, "similarity_to_prompt": 0.02},
    }  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite | changes))
    return folder / "suite.yaml"


def options(model: Path, folder: Path, **more: Any) -> recipes_table.Options:
    values: dict[str, Any] = {
        "recipes": tuple(RECIPES / f"{name}.yaml" for name in NAMES), "reference": "tiny-w4a16", "limit": 2,
        "seeds": (0,), "dtype": "float32", "num_sequences": 6, "num_slots": 4,
    }  # fmt: skip
    return recipes_table.Options(model=model, out=folder / "out", work=folder / "work", **(values | more))


@pytest.fixture
def ears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "load_asr", lambda *_: Ears())
    monkeypatch.setattr(run_module, "load_similarity", lambda *_: Ears())
    Ears.heard = 0


def test_the_table_of_three_recipes(tiny_folder: Path, tmp_path: Path, ears: None) -> None:
    chosen = options(tiny_folder, tmp_path, suite=write_suite(tmp_path / "suite"))
    table = recipes_table.run(chosen)
    assert Ears.heard == 2 * (2 + 3)  # bf16 and its floor once, and each recipe
    rows = {row["name"]: row for row in table["recipes"]}
    assert list(rows) == list(NAMES)  # by size, then name
    four, text, eight = rows.values()
    assert four["tensor_bytes"] == text["tensor_bytes"] < eight["tensor_bytes"] < table["baseline"]["tensor_bytes"]
    assert 4 < four["bits_per_linear_weight"] < eight["bits_per_linear_weight"] < 16
    assert 4 < four["bits_per_weight"] < 16
    for figure in ("kl_semantic", "kl_residual"):
        assert 0 < eight["own"][figure]["value"] < four["own"][figure]["value"]
        low, high = four["own"][figure]["interval"]
        assert low <= four["own"][figure]["value"] <= high and four["own"][figure]["se"] > 0
        against = eight["against"][figure]
        assert against["delta"] == pytest.approx(eight["own"][figure]["value"] - four["own"][figure]["value"])
    assert text["own"]["kl_semantic"]["value"] != four["own"]["kl_semantic"]["value"]  # other calibration
    assert four["against"] is None
    for row in rows.values():
        results = json.loads((tmp_path / "work/runs" / row["name"] / "results.json").read_text())
        books, wer = results["tokens"]["codebooks"], results["metrics"][0]
        assert row["own"]["kl_semantic"]["value"] == pytest.approx(books[0]["kl_mean"])
        assert row["own"]["kl_residual"]["value"] == pytest.approx(sum(book["kl_mean"] for book in books[1:]))
        assert row["own"]["top1"]["value"] == pytest.approx(books[0]["top1_agreement"])
        assert row["own"]["wer"]["value"] == pytest.approx(wer["model"]) and row["own"]["wer"]["delta"] == wer["delta"]
        end = results["tokens"]["im_end"]
        if end["n"]:
            assert row["own"]["end_delta"]["value"] == pytest.approx(end["model_at_end"] - end["baseline_at_end"])
        assert row["speed"]["rtf"] > 0 and row["speed"]["ar_ratio_range"][0] <= row["speed"]["ar_ratio"]
        assert row["own"]["failures"]["arms"]["model"]["n"] == 2
    # on disk
    assert json.loads((tmp_path / "out/recipes.json").read_text("utf-8")) == json.loads(json.dumps(table))
    with (tmp_path / "out/recipes.csv").open(newline="") as file:
        cells = {row["name"]: row for row in csv.DictReader(file)}
    assert float(cells["tiny-w8a16"]["kl_semantic_value"]) == eight["own"]["kl_semantic"]["value"]
    assert cells["tiny-w4a16"]["wer_less_reference"] == ""
    page = (tmp_path / "out/recipes.md").read_text("utf-8")
    assert page.count("\n| tiny-w8a16 |") == 2 and page.count("\n| tiny-w4a16 |") == 1
    assert "\nNothing: intervals of fewer than 50 texts" in page and "\n| bf16 |" in page
    many = recipes_page.page(table | {"statistics": {"clusters": 50}})
    assert "\n- tiny-w4a16-text: equal bytes; " in many and "\nNothing" not in many
    understood = json.loads(json.dumps(table | {"statistics": {"clusters": 50}}))
    for row in understood["recipes"]:
        row["own"]["wer"]["baseline"] = 0.1
        if row["against"]:
            row["against"]["wer"]["interval"] = [0.1, 0.2]
    assert "WER" in recipes_page.page(understood).split("more: ")[1].partition(";")[0]
    for row in understood["recipes"]:
        row["own"]["wer"]["baseline"] = 0.6
    assert "bf16 is not understood (WER above 50 %)" in recipes_page.page(understood)
    assert "WER" not in recipes_page.page(understood).split("more: ")[1].partition(";")[0]
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 2  # two whole tables
    # again: nothing is made anew; more texts: no checkpoint is
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work/checkpoints").rglob("*.safetensors")}
    assert recipes_table.run(chosen) == table and Ears.heard == 2 * 5
    more = recipes_table.run(replace(chosen, limit=3))
    assert [row["own"]["wer"]["n"] for row in more["recipes"]] == [3, 3, 3]
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "work/checkpoints").rglob("*.safetensors")}
    goes = [path.read_text().count("\n") for path in sorted((tmp_path / "work/runs/tiny-w8a16/work").glob("clips-*"))]
    assert goes == [3 * 2, 3 * 3]  # of two texts; nothing again; of three, whose groups are others
    assert len(list((tmp_path / "work").glob("calibration-*.safetensors"))) == 2  # speech, shared, and text


def test_what_cannot_be_compared_is_refused_before_anything_is_made(tiny_folder: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite", metrics=["wer", "tokens"])
    config = S2Config.load(tiny_folder)
    twice = (RECIPES / "tiny-w4a16.yaml",) * 2
    with pytest.raises(UserError) as caught:
        recipes_table.check(options(tiny_folder, tmp_path, suite=suite, recipes=twice, reference="other"), config)
    for text in ("a second recipe called tiny-w4a16", "no recipe called other", "similarity, failures, speed"):
        assert text in str(caught.value)
    with pytest.raises(UserError, match="matches no module"):
        wrong = (RECIPES / "s2-pro-w4a16.yaml",)
        recipes_table.check(options(tiny_folder, tmp_path, suite=suite, recipes=wrong), config)
    assert not (tmp_path / "work").exists()


def test_every_recipe_of_s2_mini_is_taken_and_can_be_the_reference() -> None:
    found = sorted(RECIPES.glob("s2-mini-*.yaml"))
    names = [load_recipe(path).name for path in found]
    assert len(names) == 5 and recipes_table.REFERENCE in names and "s2-mini-w4a16-text" in names


def test_standard_errors_are_those_of_a_mean() -> None:
    values = np.random.default_rng(0).standard_normal(50)
    found = paired_bootstrap([f"u{i}" for i in range(50)], [0.0] * 50, values.tolist())
    assert recipes_figures._standard_error(found) == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    assert recipes_figures._standard_error(replace(found, sd=None)) is None


@pytest.mark.parametrize(
    ("interval", "word"),
    [(None, "not decided"), ([0, 0], "the same"), ([0.1, 0.2], "more"), ([-2, -1], "less"), ([-1, 0], "not decided")],
)
def test_words_say_what_an_interval_decides(interval: list[float] | None, word: str) -> None:
    assert recipes_page.direction(interval) == word
