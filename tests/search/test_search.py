"""`s2quant search` through the command line: from measurements to a recipe that is quantized, inspected and spoken."""

from __future__ import annotations

import json
import re
import shutil
import wave
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pandas
import pytest
import torch
import yaml
from folder_cases import REPOSITORY, change_json, link_copy, listing, replace_bytes
from safetensors.torch import load_file
from search_cases import BLOCKS, NUM_SEQUENCES, RECIPE, spoken, whole_model_damage, write_recipe

from s2quant.calibrate.sequences import load_set, save_set
from s2quant.checkpoint.config import S2Config
from s2quant.cli import main
from s2quant.export.profiles import export_checkpoint
from s2quant.export.random import tiny_config, write_random
from s2quant.files import read_json
from s2quant.model import module_name
from s2quant.packing import unpack
from s2quant.quantize.plan import make_plan
from s2quant.recipe import load_recipe
from s2quant.records import folder_hashes
from s2quant.runtime.load import load_model
from s2quant.search.check import check_origin
from s2quant.search.find import make_items
from s2quant.search.rules import source_from
from s2quant.search.sensitivity import _source
from s2quant.search.solve import least_damage
from s2quant.search.table import load_sensitivity

W4 = 13_481_216  # every linear of the tiny model in 4 bit; read off `quantize --plan`, and checked below
DENSE = 15_257_600


def find(folder: Path, out: Path, *words: str) -> tuple[int, Path]:
    return main(["search", str(folder), "--out", str(out), "--quiet", *words]), out


def bits_of(recipe: Path, folder: Path) -> dict[str, int | None]:
    plan = make_plan(load_recipe(recipe), S2Config.load(folder))
    return {m.name: m.settings.bits if m.settings else None for m in plan.modules if m.kind == "linear"}


def test_from_the_command_line_to_speech_in_three_widths(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sensitivity, search, curve, quantize, inspect, export to bf16, speak; every step a command."""
    run, recipe, out = tmp_path / "run", tmp_path / "found.yaml", tmp_path / "mixed"
    words = ["--sequences", "8", "--held", "2", "--bits", "4,8", "--quiet"]
    assert main(["sensitivity", str(RECIPE), "--model", str(tiny_folder), "--out", str(run), *words]) == 0
    printed = capsys.readouterr().out
    assert "all in 4 bit" in printed
    assert "25 units measured" in printed
    goal = ["--budget", "14,100,000", "--model", str(tiny_folder), "--curve"]
    assert find(run, recipe, *goal)[0] == 0
    printed = capsys.readouterr().out
    assert "measured as a whole: " in printed
    bits = bits_of(recipe, run)
    assert set(bits.values()) == {4, 8, None} or set(bits.values()) == {4, 8}
    assert main(["search", str(run), "--budget", "14,500,000", "--keep", f"{BLOCKS}.3.**", "--quiet",
                 "--out", str(tmp_path / "three.yaml")]) == 0  # fmt: skip
    three = tmp_path / "three.yaml"
    kept = bits_of(three, run)
    assert {kept[name] for name in kept if name.startswith(f"{BLOCKS}.3.")} == {None}
    mixed = tmp_path / "mix.yaml"  # with a budget between, and the last block kept, all three widths are there
    assert find(run, mixed, "--budget", "13,900,000", "--keep", f"{BLOCKS}.3.**")[0] == 0
    assert set(bits_of(mixed, run).values()) == {4, 8, None}
    quantize = ["quantize", str(mixed), "--model", str(tiny_folder), "--out", str(out), "--sequences", "8", "--quiet"]
    assert main(quantize) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert {m["name"]: m["bits"] for m in seen["modules"] if m["kind"] == "linear"} == bits_of(mixed, run)
    assert seen["tensor_bytes"] == int(re.search(r"size: ([\d,]+)", mixed.read_text("utf-8"))[1].replace(",", ""))  # type: ignore[index]
    config = read_json(out / "config.json")["quantization_config"]
    base = config["bits"]
    for name, bits_there in bits_of(mixed, run).items():  # readers look a module up in these patterns
        found = [(key[:2], value) for key, value in config["dynamic"].items() if re.match(key[2:], name)]
        other = {} if bits_there is None else {"bits": bits_there, "group_size": 32}
        assert found == ([] if bits_there == base else [("-:" if bits_there is None else "+:", other)])
    wav = tmp_path / "x.wav"
    speak = ["speak", "Hello there.", "--model", str(out), "--out", str(wav), "--seed", "1", "--max-frames", "8"]
    assert main([*speak, "--quiet"]) in (0, 1)  # 1: random weights did not end the sentence
    with wave.open(str(wav)) as file:
        assert file.getnframes() > 0
    assert main(["export", str(out), "--profile", "bf16", "--out", str(tmp_path / "dense"), "--quiet"]) == 0


@pytest.mark.parametrize("budget", [W4, 13_700_000, 14_100_000, 14_661_120, DENSE - 1])
def test_budget(budget: int, measured: Path, tmp_path: Path) -> None:
    """The recipe's plan is within the budget, has the size it says, and no other recipe is better at its size."""
    status, out = find(measured, tmp_path / "found.yaml", "--budget", str(budget))
    assert status == 0
    table = load_sensitivity(measured)
    solution = least_damage(make_items(table, None, ()), table.fixed_bytes, budget)
    plan = make_plan(load_recipe(out), S2Config.load(measured))
    assert plan.num_bytes == solution.num_bytes <= budget
    text = out.read_text("utf-8")
    assert f"# size: {plan.num_bytes:,} tensor bytes" in text
    assert f"predicted damage: {solution.damage:.6g} nats per frame" in text
    assert f"no choice allowed is below {solution.bound:.6g}" in text
    bits = bits_of(out, measured)
    damage = {name: rows for unit in table.units for name in unit.modules[:1] for rows in [table.damage[unit.name]]}
    total = sum(damage[name][width] or 0.0 for name, width in bits.items() if name in damage and width is not None)
    assert total == pytest.approx(solution.damage)
    assert all(bits[name] == bits[name.replace(".w1", ".w3")] for name in bits if name.endswith(".w1"))
    if budget == W4:
        assert set(bits.values()) == {4}


def test_target(measured: Path, tmp_path: Path) -> None:
    status, out = find(measured, tmp_path / "found.yaml", "--target-kl", "0.05")
    assert status == 0
    text = out.read_text("utf-8")
    predicted = float(re.search(r"predicted damage: (\S+)", text)[1])  # type: ignore[index]
    assert 0.02 < predicted <= 0.05
    assert "# Found by s2quant search: the least size it can find within 0.05 nats per frame." in text


def test_the_same_search_writes_the_same_bytes_and_no_date(measured: Path, tmp_path: Path) -> None:
    first = find(measured, tmp_path / "found.yaml", "--budget", "14000000")[1].read_bytes()
    (tmp_path / "found.yaml").unlink()
    again = find(measured, tmp_path / "found.yaml", "--budget", "14_000_000")[1].read_bytes()
    assert first == again
    assert not re.search(rb"20\d\d-\d\d", first)
    assert load_sensitivity(measured).sha256.encode() in first
    for name, digest in read_json(measured / "manifest.json")["inputs"]["model"]["sha256"].items():
        assert (digest.encode() in first) == (name in ("config.json", "model.safetensors"))


def test_what_was_allowed_is_said_with_the_bounds(measured: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(measured, tmp_path / "run"))
    keep = ("--keep", "audio_decoder.**", "--bits", "8", "--curve")
    status, out = find(run, tmp_path / "found.yaml", "--budget", "14900000", *keep)
    assert status == 0
    assert "# allowed: every linear in 8 bit or bf16; in bf16 by --keep: audio_decoder.**\n" in out.read_text("utf-8")
    page = (run / "report.md").read_text("utf-8")
    assert "nats per frame; allowed: every linear in 8 bit or bf16; in bf16 by --keep: audio\\_decoder" in page


def test_a_recipe_is_a_budget(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = find(measured, tmp_path / "found.yaml", "--budget", str(RECIPE), "--json")
    assert status == 0
    planned = make_plan(load_recipe(RECIPE), S2Config.load(measured)).num_bytes
    found = json.loads(capsys.readouterr().out)
    assert found["num_bytes"] <= planned
    assert found["dense_bytes"] == DENSE
    assert make_plan(load_recipe(out), S2Config.load(measured)).num_bytes == found["num_bytes"]
    origin = next(row for row in read_json(measured / "sensitivity.json")["together"] if row["name"] == "the recipe")
    assert found["kl"] < origin["kl_sum"]  # better at no greater size than what was chosen by hand
    assert yaml.safe_load(out.read_text("utf-8"))["calibration"]["num_sequences"] == 24
    assert load_recipe(out).calibration_path == (REPOSITORY / "recipes/calibration/tiny-en.jsonl").resolve()


def test_measured_as_a_whole_is_what_whole_models_say(
    measured: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goal = ("--budget", "14000000", "--model", str(tiny_folder), "--json")
    status, out = find(measured, tmp_path / "found.yaml", *goal)
    assert status == 0
    found = json.loads(capsys.readouterr().out)
    baseline, model = (load_model(tiny_folder, dtype=torch.float32) for _ in range(2))
    bits = bits_of(out, measured)
    for unit in load_sensitivity(measured).units:
        width = bits[unit.modules[0]]
        if width is None:
            continue
        tensors = load_file(measured / "candidates" / f"{unit.name}@{width}.safetensors")
        for name in unit.modules:
            parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
            weight = unpack(parts, width, 32).dequantize(torch.float32)
            model.get_submodule(module_name(name)).weight = torch.nn.Parameter(weight)
    expected = whole_model_damage(baseline, model, spoken(measured, tiny_folder))
    assert found["kl_together"] == pytest.approx(expected["kl"], rel=1e-6)
    assert f"# measured as a whole: {found['kl_together']:.6g} nats per frame" in out.read_text("utf-8")


def test_curve(measured: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """CSV, SVG and report; points fall, named recipes are not below the line, a `<` in a name is escaped."""
    run = link_copy(measured, tmp_path / "run")
    change_json(run, lambda t: t["recipe"].update(name="<b>bold</b>"), "sensitivity.json")
    assert main(["search", str(run), "--curve", "--quiet", "--model", str(tiny_folder)]) == 0
    frame = pandas.read_csv(run / "curve.csv")
    assert list(frame.columns) == ["num_bytes", "kl", "kl_together", "num_16_bit", "num_8_bit", "num_4_bit"]
    assert (frame.num_bytes.iloc[0], frame.num_bytes.iloc[-1], frame.kl.iloc[0]) == (DENSE, W4, 0)
    assert frame.num_bytes.is_monotonic_decreasing
    assert frame.kl.is_monotonic_increasing
    assert (frame.filter(like="_bit").sum(axis=1) == 25).all()
    assert frame.kl_together.notna().sum() == 8
    assert (frame.kl_together / frame.kl).dropna().between(0.5, 2).all()
    curve = read_json(run / "curve.json")
    for row in curve["named"]:
        assert row["kl"] >= row["kl_best"] * (1 - 1e-12)
    assert curve["named"][0]["name"] == "<b>bold</b>"
    svg = (run / "curve.svg").read_text("utf-8")
    ElementTree.fromstring(svg)
    page = (run / "report.html").read_text("utf-8")
    assert "<b>bold" not in svg + page
    assert page.count("&lt;b&gt;bold&lt;/b&gt;") >= 2
    assert "Size and damage" in page
    assert r"\<b\>bold" in (run / "report.md").read_text("utf-8")
    before = page
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text("utf-8") == before


def test_a_damage_that_is_not_finite_is_no_choice(measured: Path, tmp_path: Path) -> None:
    run = link_copy(measured, tmp_path / "run")
    name = "audio_decoder.output"

    def spoil(table: dict) -> None:  # type: ignore[type-arg]
        row = next(row for row in table["units"] if row["name"] == name)
        row["candidates"][0].update(kl=None)

    change_json(run, spoil, "sensitivity.json")
    status, out = find(run, tmp_path / "found.yaml", "--target-kl", "9")
    assert status == 0
    assert bits_of(out, run)[name] == 8
    assert main(["search", str(run), "--curve", "--quiet"]) == 0
    assert "not measured" in (run / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--budget", str(W4 - 1)], f"at least {W4:,} bytes: every linear at its smallest"),
        (["--budget", str(DENSE)], "a goal that every linear meets in bf16"),
        (["--target-kl", "0"], "raise --target-kl"),
        (["--target-kl", "-1"], "--target-kl -1.0"),
        (["--target-kl", "nan"], "--target-kl nan"),
        (["--budget", "4 GB"], "a number of bytes, or a recipe file"),
        (["--budget", "14000000", "--bits", "3,8"], "widths that were measured: 4, 8"),
        (["--budget", "14000000", "--bits", "four"], "--bits 'four'"),
        (["--budget", "14000000", "--keep", "layers"], "--keep matches none"),
        (["--budget", "14000000", "--model", "nowhere"], "nowhere is not a folder"),
        ([], "no goal"),
    ],
)
def test_what_cannot_be_is_one_clear_error(
    words: list[str], fragment: str, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find(measured, tmp_path / "found.yaml", *words)[0] == 2
    printed = capsys.readouterr()
    assert fragment in printed.err
    assert printed.err.count("s2quant search: error") == 1
    assert printed.out == ""
    assert listing(tmp_path) == set()


def test_outputs_and_inputs_that_do_not_fit(
    measured: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(fragment: str, folder: Path, out: Path, *words: str) -> None:
        assert find(folder, out, "--budget", "14000000", *words)[0] == 2
        assert fragment in capsys.readouterr().err

    (tmp_path / "there.yaml").write_text("mine", "utf-8")
    fails("there.yaml exists already", measured, tmp_path / "there.yaml")
    assert (tmp_path / "there.yaml").read_text("utf-8") == "mine"
    fails("a .yaml file named by lower-case letters", measured, tmp_path / "My Recipe.yaml")
    fails("a .yaml file named by lower-case letters", measured, tmp_path / "found.json")
    fails("nowhere is not a folder", tmp_path / "nowhere", tmp_path / "a.yaml")
    for goal in ("14000000", str(RECIPE)):  # a checkpoint, with a config.json that a recipe could be planned on
        assert find(tiny_folder, tmp_path / "a.yaml", "--budget", goal)[0] == 2
        printed = capsys.readouterr().err
        assert "has no sensitivity.json" in printed and "a folder that `s2quant sensitivity` made" in printed
        assert "permissions" not in printed
    other = link_copy(tiny_folder, tmp_path / "other")
    change_json(other, lambda t: t.update(dtype="float16"))
    fails("is not the model that was measured", measured, tmp_path / "a.yaml", "--model", str(other))
    bare = link_copy(measured, tmp_path / "bare")
    for path in (bare / "candidates").iterdir():
        path.unlink()
    fails("without --no-weights, or leave out --model", bare, tmp_path / "a.yaml", "--model", str(tiny_folder))
    change_json(bare, lambda t: t["recipe"].update(calibration_source="gone.jsonl"), "sensitivity.json")
    fails("name it with --source FILE", bare, tmp_path / "a.yaml")
    assert main(["search", str(measured), "--budget", "14000000", "--quiet"]) == 2
    assert "no --out" in capsys.readouterr().err
    assert not (tmp_path / "a.yaml").exists()


def test_quantized_folders_are_held_against_the_prediction(
    measured: Path, tiny_folder: Path, tiny_quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The damage is that of whole models; a folder calibrated on held-out lines, spoken otherwise, is told."""
    clean = tmp_path / "clean"
    recipe = write_recipe(tmp_path / "clean.yaml", yaml.safe_load(RECIPE.read_text("utf-8"))["rules"])
    words = ["--model", str(tiny_folder), "--out", str(clean), "--sequences", str(NUM_SEQUENCES), "--quiet"]
    assert main(["quantize", str(recipe), *words]) == 0
    run, flattered = link_copy(measured, tmp_path / "run"), link_copy(tiny_quantized, tmp_path / "flattered")
    speak_otherwise(flattered / "s2quant" / "calibration.safetensors")
    capsys.readouterr()
    check = ["--check", str(clean), "--check", str(flattered), "--check", str(tiny_folder)]
    assert main(["search", str(run), *check, "--model", str(tiny_folder), "--curve", "--json", "--quiet"]) == 0
    rows = json.loads(capsys.readouterr().out)["checked"]
    sequences = spoken(measured, tiny_folder)
    baseline = load_model(tiny_folder, dtype=torch.float32)
    origin = next(row for row in read_json(measured / "sensitivity.json")["together"] if row["name"] == "the recipe")
    for folder, row in zip((clean, flattered), rows, strict=False):
        model = load_model(folder, dtype=torch.float32)
        assert row["kl_together"] == pytest.approx(whole_model_damage(baseline, model, sequences)["kl"], rel=1e-6)
        assert row["kl"] == pytest.approx(origin["kl_sum"])
        ours = load_file(folder / "s2quant" / "calibration.safetensors")
        split = round(len(ours) * (0.7 if folder == clean else 0.875))
        used = [name.split("/")[1] for name in sorted(ours)[:split]]  # of one source, whose texts all differ
        assert row["num_seen"] == sum(one.id.split("/")[1] in used for one in sequences)
    assert rows[0]["num_seen"] == 0 < rows[1]["num_seen"]
    assert (rows[2]["kl"], rows[2]["kl_together"], rows[2]["num_seen"]) == (0, 0, None)
    names = [row["name"] for row in read_json(run / "curve.json")["named"]]
    assert names[-3:] == ["clean", "flattered", tiny_folder.name]
    assert main(["search", str(run), "--check", str(clean), "--quiet"]) == 2
    assert "--check without --model" in capsys.readouterr().err
    assert main(["search", str(run), *check, "--model", str(tiny_folder), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("really") == 3
    assert printed.count("flattered: it was calibrated on") == 1


def speak_otherwise(path: Path) -> None:
    """Change a residual code of every frame of a calibration set, as another seed would."""
    before = load_set(path, 10)
    spoken = [tokens.clone() for tokens in before.sequences]
    for tokens in spoken:
        tokens[2] ^= (tokens[1:] != 0).any(0).long()
    path.unlink()
    save_set(replace(before, sequences=tuple(spoken)), path)


def test_a_check_of_another_model_is_told_before_anything_is_measured(
    measured: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config()
    config["text_config"] |= {"n_layer": 1}
    config["audio_decoder_config"] |= {"n_layer": 1}
    write_random(config, tmp_path / "other", seed=0)
    words = ["--check", str(tmp_path / "other"), "--model", str(tiny_folder), "--quiet"]
    assert main(["search", str(measured), *words]) == 2
    printed = capsys.readouterr().err
    assert "is of another model than the one that was measured" in printed
    assert "text_config.n_layer is 1, not 4" in printed
    assert "audio_decoder_config.n_layer is 1, not " in printed
    assert f"a folder that was made from {tiny_folder.name}" in printed
    assert "tokenizer" not in printed


def test_a_check_of_other_weights_is_told_before_anything_is_measured(
    measured: Path, tiny_folder: Path, tiny_quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes are equal; the manifest knows from which weights the folder was made, an export's too."""
    model = ["--model", str(tiny_folder), "--quiet"]

    def fails(folder: Path) -> str:
        assert main(["search", str(measured), "--check", str(folder), *model]) == 2
        return capsys.readouterr().err

    write_random(tiny_config(), tmp_path / "other", seed=1)
    other = link_copy(tiny_quantized, tmp_path / "quantized")
    facts = {"folder": "other", "sha256": folder_hashes(tmp_path / "other")}
    change_json(other, lambda record: record["inputs"].update(model=facts), "manifest.json")
    printed = fails(other)
    assert f"{other} was made from other files (other) than those that were measured:\n" in printed
    assert "model.safetensors is another file, by the hash in manifest.json" in printed
    assert "config.json" not in printed and "README" not in printed
    assert f"a folder that was made from {tiny_folder.name}" in printed
    assert "leave it out of --check" in printed
    export_checkpoint(other, tmp_path / "export", "bf16")
    assert "was made from other files (other)" in fails(tmp_path / "export")

    table = load_sensitivity(measured)
    check_origin(table, tiny_quantized)
    facts["sha256"] = folder_hashes(tiny_folder) | {"README.md": "another card"}
    change_json(other, lambda record: record["inputs"].update(model=facts), "manifest.json")
    check_origin(table, other)
    for record in ({"inputs": []}, {"inputs": {"model": {"a.safetensors": "not ours"}}}, {"stage": "export"}):
        replace_bytes(other / "manifest.json", json.dumps(record).encode())
        check_origin(table, other)
    (other / "manifest.json").unlink()
    assert main(["search", str(measured), "--check", str(other), *model]) == 0
    assert "quantized: " in capsys.readouterr().out


def test_a_recipe_says_what_its_source_is_relative_to(measured: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deep", target_is_directory=True)
    out = find(measured, tmp_path / "link" / "found.yaml", "--budget", "14000000")[1]
    assert "\n# calibration.source is relative to this file" in out.read_text("utf-8")
    for path in (out, tmp_path / "deep" / "found.yaml"):
        assert load_recipe(path).calibration_path == (REPOSITORY / "recipes/calibration/tiny-en.jsonl").resolve()


def test_the_source_is_found_from_a_folder_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "one" / "two").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "one" / "two", target_is_directory=True)
    folder, recipe = tmp_path / "link" / "run", load_recipe(RECIPE)
    source = source_from(_source(recipe, folder), folder, tmp_path / "found.yaml", None)
    assert (tmp_path / source).resolve() == recipe.calibration_path
