"""Recipes: what is read, and that every offender is named in one message."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from s2quant.errors import UserError
from s2quant.recipe import (
    Calibration,
    LinearSettings,
    PositionWeights,
    Recipe,
    Rule,
    Sampling,
    default_recipe,
    expand_braces,
    load_recipe,
    pattern_to_regex,
    sampling_faults,
)

LEAST: dict[str, Any] = {"name": "least", "rules": [{"keep": "**"}], "calibration": {"source": "lines.jsonl"}}


def recipe_of(tmp_path: Path, **changes: Any) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(LEAST | changes), "utf-8")
    return load_recipe(path)


def refusal(tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        recipe_of(tmp_path, **changes)
    return str(error.value)


def test_defaults_are_those_of_the_release(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    assert recipe.rules == (Rule(pattern="**", settings=None),)
    assert recipe.strict is True
    assert recipe.calibration == Calibration(source="lines.jsonl")
    assert recipe.calibration.sampling == Sampling(temperature=0.8, top_p=0.8, top_k=30)
    settings = LinearSettings()
    assert (settings.method, settings.bits, settings.group_size) == ("gptq", 4, 32)
    assert (settings.sym, settings.desc_act, settings.act_group_aware) == (True, True, False)


def test_a_rule_overrides_the_base(tmp_path: Path) -> None:
    rules = [{"quantize": "**.w2", "bits": 8, "method": "rtn"}, {"quantize": "**.w1"}, {"keep": "**"}]
    recipe = recipe_of(tmp_path, rules=rules, quantize={"group_size": 64, "damp_percent": 1e-2})
    base = LinearSettings(group_size=64, damp_percent=0.01)
    assert [rule.settings for rule in recipe.rules] == [
        LinearSettings(group_size=64, damp_percent=0.01, bits=8, method="rtn"),
        base,
        None,
    ]


def test_the_text_is_kept_and_hashed(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, description="caf\u00e9")
    content = (tmp_path / "recipe.yaml").read_bytes()
    assert recipe.text.encode() == content
    assert recipe.sha256 == hashlib.sha256(content).hexdigest()
    assert recipe.calibration_path == (tmp_path / "lines.jsonl").resolve()


def test_the_release_recipe() -> None:
    recipe = load_recipe(default_recipe("s2-pro-w4a16"))
    settings = {rule.settings for rule in recipe.rules if rule.settings is not None}
    assert settings == {LinearSettings(damp_percent=0.05)}
    assert recipe.strict
    assert recipe.calibration.codes == "speak"


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("a.*.w2", "a.1.w2", True),
        ("a.*.w2", "a.1.x.w2", False),
        ("a.**.w2", "a.1.x.w2", True),
        ("a.**", "a", False),
        ("a.{1,16}.w", "a.1.w", True),
        ("a.{1,16}.w", "a.6.w", False),
        ("a.{1, 16}.w", "a.16.w", True),
        ("a.1.w", "a.1.w2", False),
        ("a.1.w", "b.a.1.w", False),
        ("a.1", "a11", False),
        ("a.[12]", "a.1", False),
        ("*.w{1,3}", "x.w3", True),
    ],
)
def test_patterns(pattern: str, name: str, matches: bool) -> None:
    assert Rule(pattern=pattern, settings=None).matches(name) is matches


def test_patterns_are_written_out() -> None:
    assert expand_braces("{a,b}.{c}") == ["a.c", "b.c"]
    assert pattern_to_regex("a.*.**") == r"a\.[^.]*\..*"


def test_every_fault_in_one_message(tmp_path: Path) -> None:
    message = refusal(
        tmp_path,
        name="No Good",
        colour="red",
        strict="yes",
        description=3,
        quantize={"bits": 5, "group_size": 48, "sym": False, "damp_percent": 1.0, "bit": 4, "method": "awq"},
        rules=[
            {"keep": "a", "quantize": "b"},
            "keep",
            {"keep": 3},
            {"keep": "a", "bits": 4},
            {"quantize": "b", "x": 1},
        ],
        calibration={"source": "x", "holdout": 1},
    )
    for fragment in (
        "name is 'No Good'",
        "unknown key 'colour' (known: calibration, description, name, quantize, rules, strict)",
        "strict is 'yes', not true or false",
        "description is 3, not text",
        "quantize.bits is 5, not one of (2, 3, 4, 8)",
        "quantize.group_size is 48, not one of (16, 32, 64, 128)",
        "quantize.sym is False, not one of (True,)",
        "quantize.method is 'awq'",
        "quantize.damp_percent is 1.0, not between 0 and 1",
        "quantize: unknown key 'bit'",
        "rules[0] is {'keep': 'a', 'quantize': 'b'}",
        "rules[1] is 'keep'",
        "rules[2] is {'keep': 3}",
        "rules[3] (keep): unknown key 'bits'",
    ):
        assert fragment in message, fragment
    assert "rules[4]: unknown key 'x'" in message
    assert message.count(" is 5") == 1  # a rule does not repeat the faults that it inherits


def test_every_fault_of_the_calibration(tmp_path: Path) -> None:
    table = {"source": "x", "codes": "sing", "num_sequences": 0, "batch_size": "8", "holdout": 1, "require_end": 1}
    message = refusal(tmp_path, calibration=table | {"sampling": {"top_p": 0, "top_q": 1, "temperature": float("nan")}})
    for fragment in (
        "calibration.codes is 'sing'",
        "calibration.num_sequences is 0, not positive",
        "calibration.batch_size is '8', not int",
        "calibration.holdout is 1.0, not a fraction below 1",
        "calibration.require_end is 1, not bool",
        "calibration.sampling: unknown key 'top_q'",
        "calibration.sampling.top_p is 0.0, not in (0, 1]",
        "calibration.sampling.temperature is nan",
    ):
        assert fragment in message, fragment


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"rules": []}, "rules is missing or empty"),
        ({"rules": {"keep": "**"}}, "rules is missing or empty"),
        ({"calibration": None}, "calibration.source is missing"),
        ({"calibration": {"source": 3}}, "calibration.source is missing"),
        ({"calibration": {"source": "x", "sampling": 3}}, "calibration.sampling is 3, not a mapping"),
        ({"quantize": [1]}, "quantize is [1], not a mapping"),
        ({"quantize": {"bits": True}}, "quantize.bits is True, not int"),
        ({"quantize": {"bits": 4.0}}, "quantize.bits is 4.0, not int"),
        ({"quantize": {"act_group_aware": True}}, "desc_act and act_group_aware exclude each other"),
        ({"name": None}, "name is None"),
        ({"name": "../x"}, "name is '../x'"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], fragment: str) -> None:
    assert fragment in refusal(tmp_path, **changes)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"rules: [", "expected the node content"),
        (b"- a\n- b\n", "holds no mapping"),
        (b"", "holds no mapping"),
        (b"name: \xff", "is not UTF-8"),
        (b"name: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
        (b"name: 2001-99-99", "month must be in 1..12"),
        (b"name: a\nstrict: true\nstrict: false\n", "key 'strict' comes twice"),
        (b"name: a\nquantize: {bits: 4, bits: 8}\n", "key 'bits' comes twice"),
        (b"? [a]\n: b\n", "unhashable key"),
        (b"[" * 5000, "a YAML recipe"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, fragment: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert fragment in str(error.value)
    assert str(tmp_path / "recipe.yaml") in error.value.got


def test_yaml_merge_keys_still_work(tmp_path: Path) -> None:
    text = (
        "name: a\nrules:\n- &w {quantize: '**.w1', bits: 8}\n- {<<: *w, quantize: '**.w3'}\ncalibration: {source: x}\n"
    )
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert [(rule.pattern, rule.settings and rule.settings.bits) for rule in recipe.rules] == [
        ("**.w1", 8),
        ("**.w3", 8),
    ]


def test_built_in_recipes_are_found_by_name() -> None:
    assert default_recipe("tiny-w4a16").is_file()
    with pytest.raises(UserError, match=r"s2-pro-w4a16, .*tiny-w4a16, "):
        default_recipe("no-such")


def test_weights(tmp_path: Path) -> None:
    table = {"source": "x.jsonl"}
    assert recipe_of(tmp_path).calibration.weights == PositionWeights(text=1.0, speech=1.0)
    recipe = recipe_of(tmp_path, calibration=table | {"weights": {"text": 0, "speech": 2}})
    assert recipe.calibration.weights == PositionWeights(text=0.0, speech=2.0)
    for weights, fault in (
        ({"text": -1}, "calibration.weights.text is -1.0, not a finite number of 0 or more"),
        ({"speech": float("inf")}, "calibration.weights.speech is inf, not a finite number"),
        ({"text": 0, "speech": 0}, "both are 0"),
        ({"audio": 1}, "calibration.weights: unknown key 'audio'"),
        ([1, 2], "calibration.weights is [1, 2], not a mapping"),
    ):
        assert fault in refusal(tmp_path, calibration=table | {"weights": weights})
    only_speech = {"codes": "none", "weights": {"text": 0}}
    assert "there are only text positions" in refusal(tmp_path, calibration=table | only_speech)


def test_ranges_of_sampling() -> None:
    assert sampling_faults(Sampling(temperature=2, top_p=1, top_k=1), "s") == []
    bad = sampling_faults(Sampling(temperature=2.1, top_p=1.1, top_k=0), "s")
    assert [fault.split()[0] for fault in bad] == ["s.temperature", "s.top_p", "s.top_k"]
