"""Runs of `s2quant sensitivity` on the tiny checkpoint, and oracles that use whole models only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from folder_cases import REPOSITORY
from token_cases import token_metrics

from s2quant.checkpoint.reader import open_checkpoint
from s2quant.evaluate.tokens import TokenDamage, TokenSequence
from s2quant.model import DualAR
from s2quant.search.sensitivity import SensitivityOptions, measure_sensitivity

RECIPES = REPOSITORY / "recipes"
RECIPE = RECIPES / "tiny-w4a16.yaml"
BLOCKS = "text_model.model.layers"
NUM_SEQUENCES, NUM_HELD = 10, 3


def measure(model: Path, out: Path, recipe: Path = RECIPE, bits: tuple[int, ...] = (4, 8), **more: Any) -> Any:
    """Run with few sequences."""
    report = more.pop("report", lambda phase, done, total: None)
    options = {"num_sequences": NUM_SEQUENCES, "num_held": NUM_HELD} | more
    return measure_sensitivity(SensitivityOptions(recipe=recipe, model=model, out=out, bits=bits, **options), report)


def write_recipe(path: Path, rules: list[dict[str, Any]], **quantize: Any) -> Path:
    """A recipe with the tiny one's calibration, three tenths of it held out as in `measure`."""
    raw = yaml.safe_load(RECIPE.read_text("utf-8"))
    calibration = raw["calibration"] | {"source": str(RECIPES / raw["calibration"]["source"])}
    calibration["holdout"] = NUM_HELD / NUM_SEQUENCES
    text = {"name": path.stem, "quantize": raw["quantize"] | quantize, "rules": rules, "calibration": calibration}
    path.write_text(yaml.safe_dump(text, sort_keys=False), "utf-8")
    return path


def spoken(folder: Path, model: Path) -> list[TokenSequence]:
    """The held-out sequences of a run, put together from its calibration set by hand."""
    from safetensors.torch import load_file

    config = open_checkpoint(model).config
    tensors = load_file(folder / "calibration.safetensors")
    made = []
    for name in sorted(tensors)[-NUM_HELD:]:
        tokens = tensors[name].long()
        assert int(tokens[0, -1]) == config.im_end_id
        num_frames, position = 0, tokens.shape[1] - 2
        while config.semantic_begin_id <= int(tokens[0, position]) <= config.semantic_end_id:
            num_frames, position = num_frames + 1, position - 1
        made.append(TokenSequence(id=name, tokens=tokens, num_frames=num_frames, ended=num_frames < 96))
    return made


def whole_model_damage(baseline: DualAR, model: DualAR, sequences: list[TokenSequence]) -> dict[str, float]:
    """Damage from two whole models, pooled by plain numpy."""
    found: list[TokenDamage] = token_metrics(baseline, model, sequences, 1024)
    semantic = np.concatenate([one.kl for one in found]).astype(np.float64).mean()
    residual = np.concatenate([one.residual_kl for one in found]).astype(np.float64).mean(axis=0).sum()
    ended = [one for one in found if one.ended]
    moved = [one.end_model - one.end_baseline for one in ended]
    values = {"kl_semantic": semantic, "kl_residual": residual, "kl": semantic + residual}
    if ended:
        values |= {
            "end_delta": np.mean([m[-1] for m in moved]),
            "end_drift": np.mean([abs(m[-1]) for m in moved]),
            "end_before_drift": np.abs(np.concatenate([m[-4:-1] for m in moved])).mean(),
        }
    return {name: float(value) for name, value in values.items()}


def hidden_error(baseline: DualAR, model: DualAR, sequences: list[TokenSequence]) -> float:
    """Relative error of the final hidden state before each frame, from whole forward passes."""
    above, below = 0.0, 0.0
    with torch.inference_mode():
        for one in sequences:
            rows = slice(one.tokens.shape[1] - 2 - one.num_frames, -2)
            before, after = (m.slow.forward_hidden(one.tokens[None])[0, rows].double() for m in (baseline, model))
            above += float((after - before).square().sum())
            below += float(before.square().sum())
    return float((above / below) ** 0.5)
