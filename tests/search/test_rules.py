"""Verdicts -> rules -> the recipe's own reader and plan: what comes out is what went in, for any verdicts."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from folder_cases import REPOSITORY

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.layout import linears
from s2quant.errors import UserError
from s2quant.export.random import s2_pro_config, tiny_config
from s2quant.quantize.plan import make_plan
from s2quant.recipe import LinearSettings, Recipe, load_recipe
from s2quant.search.rules import make_rules, recipe_text, source_from

BASE = LinearSettings()
EIGHT = replace(BASE, bits=8)
BLOCKS = "text_model.model.layers"


def origin() -> Recipe:
    return load_recipe(REPOSITORY / "recipes" / "tiny-w4a16.yaml")


def read_back(verdicts: dict[str, LinearSettings | None], config: S2Config, folder: Path) -> Recipe:
    path = folder / "found.yaml"
    path.write_text(recipe_text("found", "what", verdicts, origin(), "x.jsonl", ["why", "# and how: {}"]), "utf-8")
    recipe = load_recipe(path)
    plan = make_plan(recipe, config)  # refuses rules that match nothing or decide nothing
    assert {m.name: m.settings for m in plan.modules if m.kind == "linear"} == verdicts
    return recipe


def test_only_a_source_that_is_a_file_is_relative() -> None:
    verdicts = dict.fromkeys(linears(S2Config.from_json(tiny_config())), BASE)
    for source, count in (("../x.jsonl", 1), ("hf:owner/name", 0)):
        text = recipe_text("found", "what", verdicts, origin(), source, ["why"])
        assert text.startswith("# why\n")
        assert text.count("# calibration.source is relative to this file") == count


@pytest.mark.parametrize("seed", range(25))
def test_any_verdicts_survive(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    config = S2Config.from_json(tiny_config())
    pool = [None, BASE, EIGHT, replace(BASE, bits=3), replace(EIGHT, group_size=64, method="rtn")]
    some = pool[: rng.randint(2, len(pool))]
    weights = [rng.random() ** 3 for _ in some]
    verdicts = {name: rng.choices(some, weights)[0] for name in linears(config)}
    verdicts[next(iter(verdicts))] = BASE
    read_back(verdicts, config, tmp_path)


def test_the_release_comes_back_as_the_release(tmp_path: Path) -> None:
    """The release's verdicts need no more rules than the hand-written recipe has."""
    config = S2Config.from_json(s2_pro_config())
    release = load_recipe(REPOSITORY / "recipes" / "s2-pro-w4a16.yaml")
    verdicts = {m.name: m.settings for m in make_plan(release, config).modules if m.kind == "linear"}
    found = read_back(verdicts, config, tmp_path)
    assert len(found.rules) <= len(release.rules)
    assert make_rules(verdicts, BASE) == [
        {"keep": "audio_decoder.**"},
        {"keep": f"{BLOCKS}.{{34,35}}.attention.wo"},
        {"keep": f"{BLOCKS}.{{1,6,16,32,33,34,35}}.feed_forward.w2"},
        {
            "quantize": f"{BLOCKS}.*.{{attention.wqkv,attention.wo,feed_forward.w1,feed_forward.w3,feed_forward.w2}}",
        },
    ]


def test_calibration_and_strictness_are_the_origins(tmp_path: Path) -> None:
    config = S2Config.from_json(tiny_config())
    found = read_back(dict.fromkeys(linears(config), EIGHT), config, tmp_path)
    assert replace(found.calibration, source=origin().calibration.source) == origin().calibration
    assert (found.strict, found.base, found.name) == (origin().strict, EIGHT, "found")
    assert found.text.startswith("# why\n# # and how: {}\n")
    assert yaml.safe_load(found.text)["rules"] == [
        {"quantize": "audio_decoder.output"},
        {"quantize": f"{BLOCKS}.*.{{attention.wqkv,attention.wo,feed_forward.w1,feed_forward.w3,feed_forward.w2}}"},
        {
            "quantize": "audio_decoder.layers.*."
            "{attention.wqkv,attention.wo,feed_forward.w1,feed_forward.w3,feed_forward.w2}"
        },
    ]


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(UserError, match="lower --budget"):
        recipe_text("a", "", {"x": None}, origin(), "x", [])


def test_the_calibration_source_is_found_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "data" / "x.jsonl").write_text("{}", "utf-8")
    folder, out = tmp_path / "run", tmp_path / "recipes" / "deep" / "r.yaml"
    assert source_from("../data/x.jsonl", folder, out, None) == "../../data/x.jsonl"
    assert source_from("hf:some/set", folder, out, None) == "hf:some/set"
    assert source_from("gone.jsonl", folder, out, tmp_path / "data" / "x.jsonl") == "../../data/x.jsonl"
    with pytest.raises(UserError, match="--source FILE"):
        source_from("gone.jsonl", folder, out, None)
