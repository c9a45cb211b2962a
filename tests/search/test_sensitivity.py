"""Sensitivity on the tiny checkpoint: whole models are the oracle, and a stopped run is the whole run."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from folder_cases import listing
from safetensors.torch import load_file
from search_cases import (
    BLOCKS,
    NUM_HELD,
    NUM_SEQUENCES,
    hidden_error,
    measure,
    spoken,
    whole_model_damage,
    write_recipe,
)
from torch import Tensor

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.reader import open_checkpoint
from s2quant.cli import main
from s2quant.errors import UserError
from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint
from s2quant.export.random import tiny_config
from s2quant.files import read_json, write_json
from s2quant.model import module_name
from s2quant.quantize.plan import make_plan
from s2quant.quantize.store import StageStore
from s2quant.recipe import load_recipe
from s2quant.report.sensitivity import write_sensitivity_report
from s2quant.runtime.load import load_model
from s2quant.search import sensitivity
from s2quant.search.damage import held_sequences, hold, measure_model, summarise
from s2quant.search.store import link_candidates
from s2quant.search.table import load_sensitivity
from s2quant.search.units import find_units

UNITS = (
    f"{BLOCKS}.0.attention.wqkv",
    f"{BLOCKS}.1.feed_forward.w1+w3",
    f"{BLOCKS}.3.feed_forward.w2",
    "audio_decoder.layers.1.attention.wo",
    "audio_decoder.output",
)


def only(path: Path, unit: str, **quantize: Any) -> Path:
    """A recipe that quantizes one unit alone."""
    pattern = unit.replace("w1+w3", "{w1,w3}")
    return write_recipe(path, [{"quantize": pattern}, {"keep": "**"}], **quantize)


def record(folder: Path, unit: str, bits: int) -> dict[str, Any]:
    rows = [row for row in read_json(folder / "sensitivity.json")["units"] if row["name"] == unit]
    return next(one for one in rows[0]["candidates"] if one["bits"] == bits)


@pytest.mark.parametrize("unit", UNITS)
def test_damage_and_weights_are_those_of_the_folder_that_quantize_makes(
    unit: str, measured: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Quantizing with a recipe for this unit alone gives the same packed tensors, and whole models the same damage."""
    folder = tmp_path / "quantized"
    quantize_checkpoint(
        QuantizeOptions(
            recipe=only(tmp_path / "one.yaml", unit), model=tiny_folder, out=folder, num_sequences=NUM_SEQUENCES
        )
    )
    ours = load_file(measured / "candidates" / f"{unit}@4.safetensors")
    theirs = load_file(folder / "model.safetensors")
    assert {name for name in theirs if "qweight" in name} == {name for name in ours if "qweight" in name}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    models = [load_model(one, dtype=torch.float32) for one in (tiny_folder, folder)]
    sequences = spoken(measured, tiny_folder)
    found = record(measured, unit, 4)
    expected = whole_model_damage(models[0], models[1], sequences)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert found["kl"] > 0
    assert found["hidden_error"] == pytest.approx(hidden_error(models[0], models[1], sequences), rel=1e-6, abs=1e-12)
    assert (found["hidden_error"] == 0) == unit.startswith("audio_decoder")


def test_combinations_are_measured_as_a_whole(measured: Path, tiny_folder: Path) -> None:
    """The recipe's own row, from a whole model with all of its linears replaced."""
    table = read_json(measured / "sensitivity.json")
    baseline, model = (load_model(tiny_folder, dtype=torch.float32) for _ in range(2))
    chosen = [unit for unit in table["units"] if unit["recipe_bits"] is not None]
    assert len(chosen) == 4 * 4 - 3  # tiny-w4a16 keeps two w2 and one wo of four blocks
    for unit in chosen:
        store = load_file(measured / "candidates" / f"{unit['name']}@4.safetensors")
        for name in unit["modules"]:
            model.get_submodule(module_name(name)).weight = torch.nn.Parameter(unpacked(store, name))
    row = next(row for row in table["together"] if row["name"] == "the recipe")
    expected = whole_model_damage(baseline, model, spoken(measured, tiny_folder))
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert row["kl_sum"] == pytest.approx(sum(record(measured, unit["name"], 4)["kl"] for unit in chosen))
    assert [row["name"] for row in table["together"]] == [
        "the recipe", "Slow AR in 8 bit", "all in 8 bit", "Slow AR in 4 bit", "all in 4 bit",
    ]  # fmt: skip
    plan = make_plan(load_recipe(measured / "recipe.yaml"), S2Config.from_json(tiny_config()))
    assert table["dense_bytes"] - row["bytes_saved"] == plan.num_bytes


def unpacked(tensors: dict[str, Tensor], name: str) -> Tensor:
    """A v1 symmetric 4-bit weight by the definition of the format, element by element."""
    qweight, scales, g_idx = (tensors[f"{name}.{part}"] for part in ("qweight", "scales", "g_idx"))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = ((qweight[:, None, :] >> shifts[None, :, None]) & 15).flatten(0, 1)  # [K, M]
    return ((codes.float() - 8) * scales.float()[g_idx.long()]).T.contiguous()


def test_more_bits_do_less_and_everything_is_in_the_table(measured: Path, tiny_folder: Path) -> None:
    table = read_json(measured / "sensitivity.json")
    checkpoint = open_checkpoint(tiny_folder)
    assert len(table["units"]) == 4 * 4 + 2 * 4 + 1
    modules = [name for unit in table["units"] for name in unit["modules"]]
    assert sorted(modules) == sorted(m.name for m in checkpoint.modules.values() if m.kind == "linear")
    for unit in table["units"]:
        four, eight = unit["candidates"]
        assert (four["bits"], eight["bits"], four["method"]) == (4, 8, "gptq")
        assert 0 < eight["kl"] < four["kl"]
        assert four["num_bytes"] < eight["num_bytes"] < unit["dense_bytes"]
        assert four["fallback"] is None
        assert four["kl_standard_error"] > 0
    assert (table["calibration"]["num_used"], table["calibration"]["num_held"]) == (NUM_SEQUENCES - NUM_HELD, NUM_HELD)
    assert table["floor"]["kl"] > 0  # bfloat16 against float32
    frame = pandas.read_csv(measured / "sensitivity.csv")
    assert len(frame) == 2 * len(table["units"])
    assert frame.kl.sum() == pytest.approx(sum(one["kl"] for unit in table["units"] for one in unit["candidates"]))
    assert {"report.html", "report.md", "manifest.json", "recipe.yaml", "config.json"} <= listing(measured)
    page = (measured / "report.html").read_text("utf-8")
    assert page.count('<rect class="heat') == 2 * len(table["units"])


def test_the_unchanged_model_has_no_damage(measured: Path, tiny_folder: Path) -> None:
    held = hold(load_model(tiny_folder, dtype=torch.float32), spoken(measured, tiny_folder), 1024)
    for block in range(5):
        for part in ("slow", "fast", "both") if block == 0 else ("slow",):
            found = summarise(held.measure(part))
            assert (found["kl"], found["hidden_error"], found["num_not_finite"]) == (0, 0, 0), (block, part)
        if block < 4:
            held.advance()


def test_another_model_reads_every_sequence_once(
    measured: Path, tiny_folder: Path, tiny_quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = spoken(measured, tiny_folder)
    baseline, model = (load_model(folder, dtype=torch.float32) for folder in (tiny_folder, tiny_quantized))
    held = hold(baseline, sequences, 1024)
    forward, read = model.slow.forward_hidden, []
    monkeypatch.setattr(model.slow, "forward_hidden", lambda tokens: read.append(tokens.shape[2]) or forward(tokens))
    found = measure_model(held, model)
    assert read == [one.tokens.shape[1] for one in sequences]
    assert found["hidden_error"] == pytest.approx(hidden_error(baseline, model, sequences), rel=1e-6)


def test_a_stopped_run_ends_with_the_same_bytes(measured: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Stopped in the Slow AR, in the middle of a unit, and in the Fast AR: the folder is that of the unbroken run."""
    out = tmp_path / "run"
    for stop in (5, 12, 45):

        def report(phase: str, done: int, total: int, stop: int = stop) -> None:
            if phase.startswith(("text_model", "audio_decoder")) and done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure(tiny_folder, out, report=report, resume=stop != 5)
        assert not out.exists()
        assert len(list((tmp_path / "run.partial" / "stages").glob("*"))) == stop
    with pytest.raises(UserError, match="go on with --resume"):
        measure(tiny_folder, out)
    with pytest.raises(UserError, match="bits: \\[4, 8\\], now \\[4\\]"):
        measure(tiny_folder, out, bits=(4,), resume=True)

    def late(phase: str, done: int, total: int) -> None:
        if phase == "combinations":  # every linear is finished
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tiny_folder, out, report=late, resume=True)
    table = measure(tiny_folder, out, resume=True)
    assert listing(out) == listing(measured)
    told = [read_json(folder / "manifest.json") for folder in (out, measured)]
    took = [manifest.pop("process") for manifest in told]
    assert told[0] == told[1]
    num_candidates = sum(len(unit["candidates"]) for unit in table["units"])
    assert [one["num_measured"] for one in took] == [0, num_candidates]
    for one in took:
        assert set(one["seconds"]) == set(one["peak_device_bytes"]) == {"calibration", "linears", "combinations"}
        assert min(one["seconds"].values()) > 0 and one["peak_host_bytes"] > 1e8
    for path in (path for path in out.rglob("*") if path.is_file() and path.name != "manifest.json"):
        assert path.read_bytes() == (measured / path.relative_to(out)).read_bytes(), path
    assert table == read_json(measured / "sensitivity.json")
    assert listing(tmp_path) == {"run"} | {f"run/{name}" for name in listing(measured)}
    (tmp_path / "run.partial").mkdir()  # killed in its last step
    assert measure(tiny_folder, out, resume=True) == read_json(out / "sensitivity.json")
    assert not (tmp_path / "run.partial").exists()
    with pytest.raises(UserError, match="made from other input"):
        measure(tiny_folder, out, bits=(4,), resume=True)
    with pytest.raises(UserError, match="exists already"):
        measure(tiny_folder, out)


def test_round_to_nearest_and_bfloat16(tiny_folder: Path, tmp_path: Path) -> None:
    """The recipe's method and groups are kept; in bfloat16 the whole-model oracle runs in bfloat16, too."""
    unit = f"{BLOCKS}.2.attention.wo"
    recipe = only(tmp_path / "rtn.yaml", unit, method="rtn", group_size=64)
    out = tmp_path / "run"
    table = measure(tiny_folder, out, recipe, bits=(3,), dtype="bfloat16", keep_weights=False)
    assert table["floor"] is None
    assert "candidates" not in listing(out)
    folder = tmp_path / "quantized"
    three = only(tmp_path / "three.yaml", unit, method="rtn", group_size=64, bits=3)
    quantize_checkpoint(QuantizeOptions(recipe=three, model=tiny_folder, out=folder, num_sequences=NUM_SEQUENCES))
    models = [load_model(one) for one in (tiny_folder, folder)]
    expected = whole_model_damage(models[0], models[1], spoken(out, tiny_folder))
    found = record(out, unit, 3)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert (found["method"], found["loss"], found["num_tokens"]) == ("rtn", None, 0)


def test_clips_that_failed_are_told(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sensitivity.calibration_set
    monkeypatch.setattr(
        sensitivity, "calibration_set", lambda *a, **k: replace(made(*a, **k), dropped={"no end of speech": 2})
    )
    recipe = only(tmp_path / "rtn.yaml", f"{BLOCKS}.3.attention.wo", method="rtn", group_size=64)
    table = measure(tiny_folder, tmp_path / "run", recipe, bits=(4,), keep_weights=False)
    assert table["calibration"]["clips_dropped"] == {"no end of speech": 2}
    page = (tmp_path / "run" / "report.md").read_text("utf-8")
    assert "others, 2 clips dropped; " in page and "| Clips dropped, no end of speech | 2 |" in page


def test_a_folder_that_an_earlier_version_finished(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(measured, tmp_path / "old"))
    table = read_json(folder / "sensitivity.json")
    words = ["sensitivity", "recipe", "--model", "m", "--out", str(folder), "--resume"]
    monkeypatch.setattr(sensitivity, "measure_sensitivity", lambda options, report: table)
    assert main(words) == 0
    assert f"\n{len(table['units']) * len(table['bits'])} candidates measured, " in capsys.readouterr().out
    manifest = read_json(folder / "manifest.json")
    del manifest["process"]
    del table["calibration"]["clips_dropped"]
    for name, value in (("manifest.json", manifest), ("sensitivity.json", table)):
        write_json(folder / name, value)
    assert main(words) == 0
    assert "candidates measured" not in capsys.readouterr().out
    write_sensitivity_report(folder)
    assert "dropped" not in (folder / "report.md").read_text("utf-8")


def test_fused_linears_must_agree(tmp_path: Path) -> None:
    rules = [{"keep": f"{BLOCKS}.1.feed_forward.w3"}, {"quantize": f"{BLOCKS}.*.**.w*"}, {"keep": "**"}]
    plan = make_plan(load_recipe(write_recipe(tmp_path / "odd.yaml", rules)), S2Config.from_json(tiny_config()))
    with pytest.raises(UserError, match="w3 are quantized differently, or only one of them is"):
        find_units(plan, (4,))


def test_what_cannot_be_packed_is_left_out_with_its_reason(tmp_path: Path) -> None:
    """A Fast AR of another width has a projection with a bias; groups of 128 do not divide 192 inputs."""
    raw = json.loads(json.dumps(tiny_config()))
    raw["audio_decoder_config"]["dim"] = 64
    recipe = load_recipe(write_recipe(tmp_path / "g128.yaml", [{"keep": "**"}], group_size=128))
    units, left_out = find_units(make_plan(recipe, S2Config.from_json(raw)), (4,))
    assert "a bias" in left_out["audio_decoder.project_in"]
    assert "128 does not divide its 192" in left_out[f"{BLOCKS}.0.feed_forward.w2"]
    assert {unit.kind for unit in units if unit.part == "slow"} == {"wqkv", "wo", "w1+w3"}


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"num_held": 10}, "--held 10 of --sequences 10"),
        ({"num_held": 0}, "--held 0"),
        ({"bits": (4, 5)}, "--bits 4,5"),
        ({"bits": (8, 4)}, "rising numbers"),
        ({"bits": ()}, "for example --bits 4,8"),
        ({"recipe": Path("recipes/tiny-w4a16-text.yaml")}, "the damage is measured on speech"),
        ({"num_sequences": 99}, "99 lines wanted from"),
        ({"calibration": Path("recipes/README.md")}, "README.md"),
        ({"device": "abacus"}, "device 'abacus'"),
    ],
)
def test_bad_options_leave_nothing(
    change: dict[str, Any], fragment: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(UserError) as caught:
        measure(tiny_folder, tmp_path / "run", **change)
    assert fragment in str(caught.value)
    assert listing(tmp_path) == set()


def test_a_quantized_model_is_refused(tiny_quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is quantized already"):
        measure(tiny_quantized, tmp_path / "run")


def test_sequences_that_cannot_be_scored_are_dropped_and_counted() -> None:
    config = S2Config.from_json(tiny_config())

    def made(num_frames: int, num_text: int = 3, code: int = 5, end: bool = True) -> Tensor:
        frames = torch.full((11, num_frames), code)
        frames[0] = config.semantic_begin_id + code
        last = torch.zeros(11, int(end), dtype=torch.int64)
        last[0] = config.im_end_id
        return torch.cat([torch.zeros(11, num_text, dtype=torch.int64), frames, last], dim=1)

    voice = torch.cat([made(4, end=False), made(2)], dim=1)  # a recording's frames, text, what was drawn
    sequences = [made(2), made(9), made(2, end=False), voice, made(0), made(2, code=700)]
    found, dropped = held_sequences("abcdef", sequences, config, 512, require_end=False, max_frames=9)
    assert [(one.id, one.num_frames, one.ended) for one in found] == [
        ("a", 2, True), ("b", 9, False), ("c", 2, False), ("d", 2, True),
    ]  # fmt: skip
    assert all(int(one.tokens[0, -1]) == config.im_end_id for one in found)
    assert dropped == {"no frames at its end": 1, "a code that the codec does not have": 1}
    found, _ = held_sequences("b", [made(9)], config, 512, require_end=True, max_frames=9)
    assert found[0].ended


def test_a_damaged_table_is_one_clear_error(measured: Path, tmp_path: Path) -> None:
    whole = read_json(measured / "sensitivity.json")

    def refused(change: Any) -> str:
        table = json.loads(json.dumps(whole))
        change(table)
        (tmp_path / "sensitivity.json").write_text(json.dumps(table), "utf-8")
        with pytest.raises(UserError) as caught:
            load_sensitivity(tmp_path)
        return str(caught.value)

    assert "schema_version 9" in refused(lambda t: t.update(schema_version=9))
    assert "no units" in refused(lambda t: t.update(units=[]))
    assert "fixed_bytes is -1" in refused(lambda t: t.update(fixed_bytes=-1))
    assert "comes twice" in refused(lambda t: t["units"].append(t["units"][0]))
    assert "kl -1" in refused(lambda t: t["units"][3]["candidates"][0].update(kl=-1))
    assert "KeyError 'modules'" in refused(lambda t: t["units"][2].pop("modules"))
    assert "settings" in refused(lambda t: t["units"][2]["settings"].update(colour="red"))


def test_candidates_are_copied_where_the_disk_has_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StageStore.open(tmp_path / "run.partial", {}, resume=False)
    for name in ("a@4", "a@8"):
        (store.stages / f"{name}.safetensors").write_bytes(name.encode())

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "out").mkdir()
    link_candidates(store, tmp_path / "out", {"a": (4, 8)})
    copies = sorted((tmp_path / "out" / "candidates").iterdir())
    assert [path.read_bytes() for path in copies] == [b"a@4", b"a@8"]
