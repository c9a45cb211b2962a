"""The plan: first match wins, every linear matched, every offender in one message; the release's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from s2quant.checkpoint.config import S2Config
from s2quant.errors import UserError
from s2quant.export.random import s2_pro_config, tiny_config
from s2quant.quantize.plan import make_plan
from s2quant.recipe import Recipe, default_recipe, expand_braces, load_recipe

TINY = S2Config.from_json(tiny_config())
REAL = S2Config.from_json(s2_pro_config())
LINEARS = "text_model.model.layers.*"
REST = {"keep": "audio_decoder.**"}


def recipe_of(tmp_path: Path, rules: list[dict[str, object]], **more: object) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"name": "test", "rules": rules, "calibration": {"source": "lines.jsonl"}, **more}), "utf-8"
    )
    return load_recipe(path)


def test_release_recipe_at_the_real_size() -> None:
    plan = make_plan(load_recipe(default_recipe("s2-pro-w4a16")), REAL)
    kept = sorted(name for name in plan.dense_linears if name.startswith("text_model"))
    layers = "text_model.model.layers"
    assert kept == sorted(
        [f"{layers}.{i}.feed_forward.w2" for i in (1, 6, 16, 32, 33, 34, 35)]
        + [f"{layers}.{i}.attention.wo" for i in (34, 35)]
    )
    assert len(plan.quantized) == 171
    assert len(plan.dense_linears) == 9 + 21
    assert plan.num_tensors == 871
    assert plan.num_bytes == 4_238_063_616
    assert plan.dense_bytes == 9_123_704_832
    settings = {module.settings for module in plan.quantized.values()}
    assert {(s.method, s.bits, s.group_size, s.sym, s.desc_act) for s in settings if s} == {("gptq", 4, 32, True, True)}


def test_group_128_at_the_real_size(tmp_path: Path) -> None:
    text = default_recipe("s2-pro-w4a16").read_text("utf-8").replace("group_size: 32", "group_size: 128")
    (tmp_path / "g128.yaml").write_text(text, "utf-8")
    assert make_plan(load_recipe(tmp_path / "g128.yaml"), REAL).num_bytes == 4_036_617_216


PRO = {
    "s2-pro-w4a16": (171, 4_238_063_616),
    "s2-pro-w4a16-g128": (171, 4_036_617_216),
    "s2-pro-w8a16": (180, 5_578_641_408),
    "s2-pro-w4a16-fast8": (192, 3_833_937_920),
    "s2-pro-w4a16-text": (171, 4_238_063_616),
}


@pytest.mark.parametrize("name", PRO)
def test_the_readme_says_what_the_plan_says(name: str) -> None:
    path = default_recipe(name)
    plan = make_plan(load_recipe(path), REAL)
    assert (len(plan.quantized), plan.num_bytes) == PRO[name]
    row = next(line for line in (path.parent / "README.md").read_text("utf-8").splitlines() if f"`{name}.yaml`" in line)
    assert row.endswith(f"| {len(plan.quantized)} | {plan.num_bytes:,} |")


def test_every_kind_of_recipe_has_one_for_each_model() -> None:
    names = {path.stem for path in default_recipe("tiny-w4a16").parent.glob("*.yaml")}
    kinds = {name.removeprefix("s2-pro-") for name in names if name.startswith("s2-pro-")}
    assert kinds == {"w4a16", "w4a16-g128", "w8a16", "w4a16-fast8", "w4a16-text"}
    assert names == {f"{model}-{kind}" for model in ("s2-pro", "s2-mini") for kind in kinds} | {
        f"tiny-{kind.replace('g128', 'g64')}" for kind in kinds
    }


def test_every_recipe_loads() -> None:
    paths = sorted(default_recipe("tiny-w4a16").parent.glob("*.yaml"))
    assert len(paths) == 15
    for path in paths:
        recipe = load_recipe(path)
        assert recipe.name == path.stem
        assert recipe.calibration.source.startswith("hf:") or recipe.calibration_path.is_file()


def test_release_recipe_refuses_a_smaller_model() -> None:
    with pytest.raises(UserError) as error:
        make_plan(load_recipe(default_recipe("s2-pro-w4a16")), TINY)
    for layer in (6, 16, 32, 33, 34, 35):
        assert f"text_model.model.layers.{layer}.feed_forward.w2 matches no module" in str(error.value)
    assert "layers.1.feed_forward.w2 matches" not in str(error.value)


def test_first_match_wins_and_overrides(tmp_path: Path) -> None:
    rules = [
        {"quantize": f"{LINEARS}.attention.wo", "bits": 8, "group_size": 64},
        {"keep": "text_model.model.layers.0.**"},
        {"quantize": "text_model.model.layers.**.{wqkv,wo,w1,w2,w3}"},
        REST,
    ]
    plan = make_plan(recipe_of(tmp_path, rules), TINY)
    wo = plan.quantized["text_model.model.layers.0.attention.wo"].settings
    assert wo is not None
    assert (wo.bits, wo.group_size) == (8, 64)
    assert "text_model.model.layers.0.attention.wqkv" in plan.dense_linears
    assert "text_model.model.layers.1.attention.wqkv" in plan.quantized


@pytest.mark.parametrize(
    ("rules", "fragment"),
    [
        ([{"quantize": f"{LINEARS}.attention.*"}, REST], "no rule matches the linear text_model.model.layers.0.feed_f"),
        ([{"keep": "**"}, {"quantize": f"{LINEARS}.attention.wo"}], "decides nothing"),
        ([{"keep": "**.w4"}, {"keep": "**"}], "**.w4 matches no module"),
        ([{"quantize": "text_model.model.embeddings"}, {"keep": "**"}], "embeddings is no linear (embedding)"),
        ([{"quantize": "text_model.model.norm"}, {"keep": "**"}], "norm is no linear (norm)"),
    ],
)
def test_refusals(tmp_path: Path, rules: list[dict[str, object]], fragment: str) -> None:
    with pytest.raises(UserError) as error:
        make_plan(recipe_of(tmp_path, rules), TINY)
    assert fragment in str(error.value)


def test_group_that_does_not_divide_lists_every_offender(tmp_path: Path) -> None:
    raw = json.loads(json.dumps(tiny_config()))
    raw["text_config"]["intermediate_size"] = 160
    rules = [{"quantize": "text_model.model.layers.**.w2"}, {"keep": "**"}]
    with pytest.raises(UserError) as error:
        make_plan(recipe_of(tmp_path, rules, quantize={"group_size": 64}), S2Config.from_json(raw))
    assert str(error.value).count("does not divide its 160 inputs") == 4


def test_braces() -> None:
    assert expand_braces("a.{1,6}.{x,y}") == ["a.1.x", "a.1.y", "a.6.x", "a.6.y"]
    assert expand_braces("plain") == ["plain"]
