"""Damage by method and bits, on the tiny random checkpoint: order, floor, what is kept, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mini import damage, damage_report
from mini.speech import SAMPLE_RATE
from token_cases import token_metrics

from s2quant.errors import UserError
from s2quant.recipe import BITS, METHODS, load_recipe
from s2quant.runtime.load import load_model

REPOSITORY = Path(__file__).resolve().parents[2]


class Deaf:
    """Hears the same words in every clip; what it is asked for is counted."""

    name = "deaf:1"
    heard = 0

    def transcribe_batch(self, clips: Any, sample_rate: int, lang: str) -> list[str]:
        Deaf.heard += len(clips)
        return ["the horse"] * len(clips)

    def transcribe(self, audio: Any, sample_rate: int, lang: str) -> str:
        return "the horse"


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No flite and no recognizer: tones speak, and nothing is understood."""
    tone = 0.2 * np.sin(np.arange(SAMPLE_RATE) * 0.05).astype(np.float32)
    monkeypatch.setattr(damage.speech, "speak", lambda line, folder: (tone[: 8000 + 100 * len(line.text)], []))
    monkeypatch.setattr(damage, "load_asr", lambda *_: Deaf())


def options(model: Path, folder: Path, **more: Any) -> damage.Options:
    values: dict[str, Any] = {
        "recipe": REPOSITORY / "recipes" / "tiny-w4a16.yaml", "limit": 2, "seeds": (0,), "bits": (2, 4),
        "max_frames": 16, "num_sequences": 6, "dtype": "float32", "num_slots": 4,
    }  # fmt: skip
    return damage.Options(
        model=model, asr_model=folder / "none.pt", out=folder / "out", report=folder / "report", **(values | more)
    )


def test_the_whole_run_its_order_and_what_is_kept(tiny_folder: Path, tmp_path: Path, quiet: None) -> None:
    Deaf.heard = 0
    found = damage.run(options(tiny_folder, tmp_path, layer_groups=2))
    arms = found["arms"]
    assert list(arms) == ["bf16", "floor", "rtn-2", "gptq-2", "rtn-4", "gptq-4"]
    kl = {name: row["tokens"]["kl_semantic"]["value"] for name, row in arms.items() if row["tokens"]}
    assert kl["rtn-2"] > kl["gptq-2"] > kl["gptq-4"] > 10 * kl["floor"] > 0 and kl["rtn-2"] > kl["rtn-4"]
    for name, row in arms.items():
        assert row["num_clips"] == 2 and row["num_errors"] == 0
        assert row["wer"]["deaf:1"]["baseline"] == arms["bf16"]["wer"]["deaf:1"]["model"] > 0.5
        if name not in ("bf16", "floor"):
            low, high = row["tokens"]["kl_semantic"]["interval"]
            assert low <= kl[name] <= high
            *slow, fast = row["layer_groups"]
            assert [group["name"] for group in slow] == ["slow 0-1", "slow 2-3"]
            assert all(group["kl_semantic"] > 0 for group in slow) and fast["kl_semantic"] == 0 == fast["num_quantized"]
    assert arms["rtn-2"]["tensor_bytes"] < arms["rtn-4"]["tensor_bytes"] < arms["bf16"]["tensor_bytes"]
    deaf = [row for row in found["statements"] if "deaf" in row["sentence"]]
    assert deaf and all(row["holds"] is None for row in deaf)
    assert json.loads((tmp_path / "report" / "damage.json").read_text("utf-8")) == json.loads(json.dumps(found))
    assert Deaf.heard == 2 * 6
    page = (tmp_path / "report" / "damage.md").read_text("utf-8")
    assert page.count("\n| rtn-2 |") == 1 and "## gptq-4 by group of layers" in page
    # the same figures as the package's own, on the same codes
    model = load_model(tmp_path / "out" / "checkpoints" / "gptq-4", dtype=torch.float32)
    store = damage.Store(folder=tmp_path / "out" / "speech" / "bf16")
    plan = damage.load_plan(options(tiny_folder, tmp_path))
    sequences = damage.read_sequences(plan, store)
    size = damage.residual_size(tiny_folder)
    direct = token_metrics(load_model(tiny_folder, dtype=torch.float32), model, sequences, size)
    assert kl["gptq-4"] == pytest.approx(float(np.concatenate([one.kl for one in direct]).mean()), rel=1e-5)
    # again: nothing is made anew; one clip more: its group is
    assert damage.run(options(tiny_folder, tmp_path, layer_groups=2)) == found and Deaf.heard == 2 * 6
    assert damage.run(options(tiny_folder, tmp_path, limit=3))["arms"]["gptq-4"]["num_clips"] == 3
    spoken = {
        path.parent.parent.name: path.read_text("utf-8") for path in (tmp_path / "out").glob("speech/*/work/clips-*")
    }
    assert {name: text.count("\n") for name, text in spoken.items()} == {
        name: 2 + 3 for name in arms if name != "floor"
    } | {"bf16": 4 + 6}
    (tmp_path / "out" / "speech" / "rtn-2" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="spoken by something else"):
        damage.run(options(tiny_folder, tmp_path))


def test_a_model_that_says_nothing_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    chosen = options(tiny_folder, tmp_path)
    plan = SimpleNamespace(jobs=lambda arm: [])
    with pytest.raises(UserError, match="spoke not one frame"):
        damage.measure_tokens(chosen, plan, damage.Store(folder=tmp_path), {})


def test_every_method_and_bits_make_a_recipe_that_loads(tmp_path: Path) -> None:
    chosen = options(tmp_path, tmp_path, recipe=damage.RECIPE)
    for method in METHODS:
        for bits in BITS:
            recipe = load_recipe(damage.write_recipe(chosen, method, bits))
            assert (recipe.name, recipe.base.method, recipe.base.bits) == (f"{method}-{bits}", method, bits)
            assert all(rule.settings is None or rule.settings.bits == bits for rule in recipe.rules)
            assert Path(recipe.calibration.source).is_absolute()
    original = yaml.safe_load(damage.RECIPE.read_text("utf-8"))
    written = yaml.safe_load((tmp_path / "out" / "recipes" / "gptq-4.yaml").read_text("utf-8"))
    changed = {key for key in original if original[key] != written[key]}
    assert changed == {"name", "description", "calibration"}


def test_what_cannot_be_done_is_refused_before_anything_is_made(tiny_folder: Path, tmp_path: Path, quiet: None) -> None:
    for more, text in (
        ({"layer_groups": 9}, "--layer-groups 9"),
        ({"bits": (5,)}, "bits"),
        ({"recipe": damage.RECIPE}, "rtn-2"),
    ):
        with pytest.raises(UserError, match=text):
            damage.run(options(tiny_folder, tmp_path, **more))
    words = ["--model", str(tmp_path / "absent"), "--asr-model", "x", "--out", str(tmp_path / "out")]
    assert damage.main(words) == 2
    assert not (tmp_path / "out" / "checkpoints").exists() and not (tmp_path / "report").exists()


def row(baseline: float, delta: float, low: float, high: float) -> dict[str, Any]:
    return {"baseline": baseline, "model": baseline + delta, "delta": delta, "interval": [low, high], "mde": 0.01}


@pytest.mark.parametrize(
    ("rtn_2", "gptq_4", "difference", "bf16", "expected"),
    [
        (row(0.01, 0.9, 0.8, 1.0), row(0.01, 0.0, -0.005, 0.005), row(0, 0.1, 0.05, 0.2), 0.01, (True, True, True)),
        (row(0.01, 0.1, 0.0, 0.2), row(0.01, 0.1, 0.05, 0.2), row(0, -0.1, -0.2, -0.05), 0.01, (False, False, False)),
        (row(0.01, 0.5, 0.3, 0.7), row(0.01, 0.02, 0.0, 0.04), row(0, 0.0, -0.1, 0.1), 0.01, (None, None, None)),
        (row(0.8, 0.9, 0.8, 1.0), row(0.8, 0.0, 0.0, 0.0), row(0, 0.1, 0.05, 0.2), 0.8, (None, None, None)),
    ],
)
def test_statements_follow_from_intervals_and_nothing_is_said_of_a_model_that_does_not_speak(
    rtn_2: dict[str, Any], gptq_4: dict[str, Any], difference: dict[str, Any], bf16: float, expected: tuple[Any, ...]
) -> None:
    tokens = {"kl_semantic": {"value": 0.1}}
    result = {
        "recognizers": ["r"],
        "arms": {
            "bf16": {"wer": {"r": row(bf16, 0, 0, 0)}},
            "rtn-2": {"wer": {"r": rtn_2}, "tokens": tokens},
            "gptq-4": {"wer": {"r": gptq_4}, "tokens": tokens},
        },
        "pairs": [
            {"rtn": "rtn-4", "gptq": "gptq-4", "kl_semantic": row(0.1, 0.1, 0.1, 0.1), "kl_residual": row(0, 0, -1, 1),
             "wer": {"r": difference}}
        ],
    }  # fmt: skip
    found = {one["sentence"]: one["holds"] for one in damage_report.statements(result)}
    assert found["rtn-2 is not understood (WER above 50 %), by r"] is expected[0]
    assert found["gptq-4 is at or near bf16: at most 2 points more words are wrong, by r"] is expected[1]
    assert found["rtn-4 is not better than gptq-4 in words, by r"] is expected[2]
    assert found["rtn-4 is not better than gptq-4 in kl_semantic"] is True
    assert found["rtn-4 is not better than gptq-4 in kl_residual"] is None
