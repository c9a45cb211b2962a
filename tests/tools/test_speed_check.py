"""The speed check's own parts: what is left out is said, what fails is kept, the page reads what there is."""

import argparse
import json
import re
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def check(tmp_path):
    from tools.speed.check import PARTS, Check

    options = argparse.Namespace(
        out=tmp_path, only=list(PARTS), size="tiny", device="cpu", seconds=100.0, how="best", go_on=False, preload=[],
        variants="", models="", cases="",
    )  # fmt: skip
    return Check(options)


def test_every_part_is_bounded_and_what_one_leaves_goes_to_the_others(check):
    from tools.speed.check import PARTS, SHARES, WHOLE_S

    assert sum(SHARES.values()) <= WHOLE_S <= 400
    for part in PARTS:
        check.begin(part)
        assert check.deadline <= check.until
    check.begin("bandwidth")
    assert check.deadline - time.perf_counter() < 100 * 2 * SHARES["bandwidth"] / sum(SHARES.values())


def test_what_there_is_no_time_for_is_recorded_and_every_item_written(check):
    seen = []
    for name, found in check.items("frames", ["a", "b", "c"]):
        found.append({"name": name})
        seen.append(name)
        if name == "b":
            check.deadline = 0.0
    assert seen == ["a", "b"]
    assert json.loads((check.options.out / "speed.json").read_text())["frames"] == [
        {"name": "a"}, {"name": "b"}, {"left_out": "c"}
    ]  # fmt: skip


def test_a_failure_is_kept_beside_what_was_known(check):
    row = check.tried({"model": "m"}, lambda: {}["missing"])
    assert row["model"] == "m" and row["failed"].startswith("KeyError")


def test_variants_leave_out_one_thing_each(check):
    from tools.speed.check import for_slots
    from tools.speed.parts import variants_of

    listed = variants_of(check)
    for job in {row[:2] for row in listed}:
        ways = {way: how for *its, way, how in listed if tuple(its) == job}
        assert len(set(ways.values())) == len(ways) and ways["as used"] == for_slots(check.how, job[1])
        assert ("without flat" in ways) == ("without many_rows" not in ways) == (job[1] <= 16)
        if "without many_rows" in ways:
            assert not ways["without many_rows"].many_rows and ways["without many_rows"].long_stretches
            assert not ways["without long_stretches"].long_stretches and ways["without long_stretches"].many_rows
            assert "without shared_shifts" in ways
        else:
            assert not ways["without flat"].flat and ways["without flat"].live_rows
            assert "without shared_shifts" not in ways
        for way, how in ways.items():
            if re.fullmatch(r"with(out)? \w+", way):
                word, name = way.split()
                assert how != ways["as used"] and how == replace(ways["as used"], **{name: word == "with"})
    assert {("w4a16", 1), ("w4a16", 64), ("bf16", 64)} <= {row[:2] for row in listed}


def test_wrong_products_of_many_rows_leave_the_other_kernel_as_it_is(check, monkeypatch):
    from tools.speed import linears
    from tools.speed.parts import ROWS, kernels_part

    def errors(case, rows, device, how):
        return {"out": 1.0 if how.many_rows and rows == max(ROWS["tiny"]) else 0.0}

    monkeypatch.setattr(linears, "errors", errors)
    kernels_part(check)
    assert not check.how.many_rows and check.how.flat and check.how.loads_first
    assert all(row["right"] for row in check.facts["kernels"]) and check.facts["kernels_wrong"]
    assert "many rows" in check.facts["fell_back"]


def test_a_trial_that_is_wrong_is_not_timed_and_changes_nothing_else(check, monkeypatch):
    from tools.speed import linears
    from tools.speed.parts import kernels_part, trials, variants_of

    seen, before = set(), check.how

    def errors(case, rows, device, how):
        seen.add((case.kind, rows, how))
        return {"out": 0.0 if how.shared_shifts else 1.0}

    monkeypatch.setattr(linears, "errors", errors)
    kernels_part(check)
    assert before.shared_shifts
    ways = {"without shared_shifts": replace(before, shared_shifts=False)}
    assert trials(check) == ways
    tried = {(kind, 17, way) for kind in ("w4", "w8") for way in ways.values()}
    assert {job for job in seen if job[2] != before} == tried
    assert check.how == before and "fell_back" not in check.facts
    titles = {row[2] for row in variants_of(check)}
    assert "without many_rows" in titles and "without shared_shifts" not in titles
    wrong = [row["case"] for row in check.facts["kernels"] if not row["right"]]
    assert wrong and all(name.endswith(" without shared_shifts") for name in wrong)


def test_first_ways_leave_out_all_that_came_later(check):
    from tools.speed.check import as_first

    first = as_first(check.how)
    assert first.early and not (
        first.many_rows or first.long_stretches or first.flat or first.live_rows or first.loads_first or first.narrow
    )
    assert not (first.holds or first.attention_adds) and (first.attention_warps, first.attention_stages) == (4, 3)


def test_attention_is_timed_with_other_warps_and_blocks(check):
    from tools.speed.parts import variants_of

    for batch, others in ((1, (1, 4, 8)), (64, (2, 8))):
        ways = {way: how for *its, way, how in variants_of(check) if tuple(its) == ("w4a16", batch)}
        used = ways["as used"]
        assert {way for way in ways if way.endswith(" warps")} == {f"attention of {warps} warps" for warps in others}
        for warps in others:
            assert ways[f"attention of {warps} warps"] == replace(used, attention_warps=warps) != used
        if batch > 16:
            for stages in (1, 3):
                assert ways[f"attention of {stages} stages"] == replace(used, attention_stages=stages) != used


def test_only_the_cases_that_are_asked_for_are_tuned(check, monkeypatch):
    from s2quant.runtime.kernels import shapes
    from tools.speed import linears
    from tools.speed.parts import tune_part

    seen = []

    def tune(case, rows, *_):
        seen.append((case.kind, case.name, rows))
        raise RuntimeError("seen")

    for tables in ("TUNED", "TUNED_MANY"):
        monkeypatch.setattr(shapes, tables, dict(getattr(shapes, tables)))
    monkeypatch.setattr(linears, "tune", tune)
    check.facts["device"] = "none"
    tune_part(check)
    every = list(seen)
    seen.clear()
    check.options.cases = r"w4 w1.w3 M=1$"
    tune_part(check)
    assert seen == [("w4", "w1+w3", 1)] and set(seen) < set(every)


def test_a_switch_of_the_compile_check_is_turned_or_given_a_number(check):
    from tools.compile_check import switched

    assert switched(check.how, "early") == ("early", not check.how.early)
    assert switched(check.how, "attention_warps=4") == ("attention_warps", 4)


def test_bandwidth_counts_what_is_moved():
    from tools.speed.timing import bandwidth

    found = bandwidth(torch.device("cpu"), 1 << 22)
    assert set(found) == {"copy_bytes_per_s", "read_bytes_per_s", "memcpy_bytes_per_s"} and min(found.values()) > 1e7


def test_the_page_says_what_is_known():
    from tools.speed.page import markdown

    frame = {"model": "w4a16", "fused": True, "ms_loop": 2.0, "rtf": 0.05, "audio_s_per_s": 20.0, "ready_s": 1.0}
    page = markdown(
        {
            "device": "d", "torch": "1", "triton": "2", "bandwidth": {"read_bytes_per_s": 4e12},
            "kernels": [{"case": "w4 wo", "rows": 1, "right": True, "errors": {"out": 0.0}}],
            "frames": [frame | {"batch": 1, "ms": 2.0}, {"batch": 8, "failed": "no"}],
            "variants": [
                {"model": "w4a16", "batch": 1, "how": "as used", "ms": 2.0},
                {"model": "w4a16", "batch": 1, "how": "without flat", "ms": 2.25},
            ],
            "linears": [{"case": "w4 wo", "rows": 1, "bytes": 4_000_000, "ours_us": 2.0}, {"left_out": "x"}],
        }
    )  # fmt: skip
    assert "1 of 1 products right" in page and "read 4.00" in page
    assert "| w4a16 | 1 | without flat | 2.250 | +0.250 |" in page
    assert "| w4 wo | 1 | 2.0 | 1.0 |" in page and "failed" not in page


def test_what_makes_a_frame_fastest_is_kept(monkeypatch):
    from s2quant.runtime.kernels import shapes
    from s2quant.runtime.kernels.launch import MEASURED
    from s2quant.runtime.kernels.weights import Block, Shape
    from tools.speed import linears
    from tools.speed.settle import Choice, choices, settle

    few, many = ("bf16", 64, 32, False, 1), ("w4", 128, 32, False, 64)
    slow, fast = (Shape(warps=4, tiles=1, depth=depth, columns=1) for depth in (1, 2))
    block, other = (Block(tiles=8, splits=splits, stages=3, warps=4) for splits in (1, 2))
    monkeypatch.setattr(shapes, "TUNED", {few: slow})
    monkeypatch.setattr(shapes, "TUNED_MANY", {many: block})

    def milliseconds():
        return 3.0 - (shapes.TUNED[few] == fast) - 0.001 * (shapes.TUNED_MANY[many] == other)

    found = settle([Choice(few, (slow, fast)), Choice(many, (block, other))], milliseconds, lambda: True)
    assert {few: fast} == shapes.TUNED and {many: block} == shapes.TUNED_MANY  # what may be chance is not kept
    assert [row["kept"] for row in found] == [[4, 1, 2, 1], [8, 1, 3, 4]]
    assert [way[0] for way in found[0]["tried"]] == [3.0, 2.0]
    assert settle([Choice(few, (fast, slow))], milliseconds, lambda: False) == []

    case = linears.Case(name="wo", kind="bf16", out_features=64, in_features=32, epilogue="residual")
    tuned = [{"key": list(few), "tried": [[1.0, 4, 1, 2, 1], [2.0, 4, 1, 1, 1]]}, {"left_out": "x"}]
    listed = choices([(case, 1, slow, MEASURED), (case, 8, slow, MEASURED)], tuned)
    assert listed == [Choice(few, (slow, fast))]
