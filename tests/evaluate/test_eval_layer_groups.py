"""Token damage by group of layers: all groups are the model, one without a quantized module adds exactly nothing."""

import copy
import csv
import json
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from run_cases import run, write_suite
from token_cases import pooled, quantized, token_metrics

from s2quant.checkpoint.reader import open_checkpoint
from s2quant.cli import main
from s2quant.errors import UserError
from s2quant.evaluate.layer_groups import count_quantized, group_arms, make_groups, swapped
from s2quant.evaluate.token_cache import Arm, measure_arms
from s2quant.evaluate.token_summary import summarise_groups

FIELDS = ("kl", "agree", "delta_nll", "end_model", "residual_kl", "residual_agree", "shared_kl")


def names(groups):
    return [group.name for group in groups]


def test_groups_hold_every_block_once_and_differ_by_one_at_most():
    assert names(make_groups(36, 4, 4)) == ["slow 0-8", "slow 9-17", "slow 18-26", "slow 27-35", "fast"]
    assert names(make_groups(4, 2, 4)) == ["slow 0", "slow 1", "slow 2", "slow 3", "fast"]
    assert names(make_groups(5, 2, 1)) == ["slow 0-4", "fast"]
    for count in range(1, 12):
        *slow, _ = make_groups(11, 3, count)
        assert [index for group in slow for index in group.layers] == list(range(11))
        sizes = [len(group.layers) for group in slow]
        assert max(sizes) - min(sizes) <= 1 and len(slow) == count
    for count in (0, -1, 5):
        with pytest.raises(UserError, match="1 to 4, the blocks of the Slow AR"):
            make_groups(4, 2, count)


def test_all_groups_at_once_are_the_model(baseline, sequences, size):
    model = quantized(baseline, 3)
    expected = token_metrics(baseline, model, sequences[:2], size)
    mixed = copy.deepcopy(baseline)
    with ExitStack() as stack:
        for group in make_groups(len(mixed.slow.layers), len(mixed.fast.layers), 3):
            stack.enter_context(swapped(mixed, model, group))
        found = token_metrics(baseline, mixed, sequences[:2], size)
    for name in FIELDS:
        assert np.array_equal(pooled(found, name), pooled(expected, name)), name
    assert pooled(found).mean() > 1e-3
    assert not pooled(token_metrics(baseline, mixed, sequences[:2], size)).any()  # and it was undone


def test_a_swap_is_undone_after_an_error(baseline):
    other = copy.deepcopy(baseline)
    before = [*baseline.slow.layers, baseline.fast]
    for group in make_groups(len(baseline.slow.layers), len(baseline.fast.layers), 2):
        with pytest.raises(RuntimeError, match="stop"), swapped(baseline, other, group):
            assert [*baseline.slow.layers, baseline.fast] != before
            raise RuntimeError("stop")
        assert [*baseline.slow.layers, baseline.fast] == before


def test_each_group_alone_and_one_without_damage_is_exactly_nothing(baseline, sequences, size, tmp_path):
    """Only one block and nothing of the Fast AR is quantized: that block's group is the model, all others are 0."""
    model = copy.deepcopy(baseline)
    model.slow.layers[2] = quantized(baseline, 2, ["slow"]).slow.layers[2]
    groups = make_groups(len(baseline.slow.layers), len(baseline.fast.layers), len(baseline.slow.layers))
    loaded = []

    def load(one, name):
        loaded.append(name)
        return one

    base = Arm(key="base", load=lambda: load(baseline, "base"))
    arm = Arm(key="low", load=lambda: load(model, "low"))
    before = list(baseline.slow.layers)
    with group_arms(base, arm, groups) as arms:
        assert list(arms) == names(groups) and len({one.key for one in arms.values()}) == len(groups)
        found = measure_arms(base, {"model": arm, **arms}, sequences[:2], size, tmp_path)
    assert list(baseline.slow.layers) == before
    assert loaded == ["base", "low", "base", "low"]  # both once for all groups together
    rows = summarise_groups(groups, [0, 0, 5, 0, 0], [found[group.name] for group in groups])
    for row, group in zip(rows, groups, strict=True):
        changed = group.name == "slow 2"
        assert (row["kl_semantic"] > 1e-3) == changed == (row["num_quantized"] > 0)
        if not changed:
            assert row["kl_semantic"] == row["kl_residual_mean"] == 0 and row["kl_residual"] == [0] * 9
            assert row["top1_agreement"] == 1
            assert row["im_end"]["model_at_end"] == row["im_end"]["baseline_at_end"]
    for name in FIELDS:
        assert np.array_equal(pooled(found["slow 2"], name), pooled(found["model"], name)), name
    with group_arms(base, arm, groups) as arms:
        assert measure_arms(base, arms, sequences[:2], size, tmp_path).keys() == arms.keys()
    assert len(loaded) == 4  # all of it from the cache


def test_the_fast_part_alone(baseline, sequences, size, tmp_path):
    groups = make_groups(len(baseline.slow.layers), len(baseline.fast.layers), 1)
    base = Arm(key="base", load=lambda: baseline)
    low = quantized(baseline, 3)
    low.fast.output.weight = torch.nn.Parameter(low.fast.output.weight * 1.1, requires_grad=False)
    with group_arms(base, Arm(key="low", load=lambda: low), groups) as arms:
        found = measure_arms(base, arms, sequences[:2], size, tmp_path)
    assert not pooled(found["fast"]).any() and pooled(found["slow 0-3"]).mean() > 1e-3
    mixed = copy.deepcopy(baseline)
    mixed.fast = low.fast  # its head counts too
    expected = token_metrics(baseline, mixed, sequences[:2], size)
    assert np.array_equal(pooled(found["fast"], "residual_kl"), pooled(expected, "residual_kl"))


def test_a_run_with_layer_groups_and_without_gives_the_same_apart_from_them(tiny_folder, tiny_quantized, tmp_path):
    suite = write_suite(tmp_path / "suite", metrics=["tokens"])
    whole = run(suite, tiny_quantized, tmp_path / "whole", tiny_folder, limit=2, seeds=(0,))
    split = run(suite, tiny_quantized, tmp_path / "split", tiny_folder, limit=2, seeds=(0,), layer_groups=2)
    rows = split["tokens"].pop("layer_groups")
    assert whole["tokens"].pop("layer_groups") is None
    assert whole["tokens"] == split["tokens"]
    checkpoint = open_checkpoint(tiny_quantized)
    groups = make_groups(4, checkpoint.config.fast.n_layer, 2)
    assert [row["name"] for row in rows] == names(groups) == ["slow 0-1", "slow 2-3", "fast"]
    assert [row["num_quantized"] for row in rows] == count_quantized(checkpoint, groups)
    assert rows[2]["num_quantized"] == 0 == rows[2]["kl_semantic"] == rows[2]["kl_residual_mean"]
    for row in rows[:2]:
        assert row["num_quantized"] > 0 and row["kl_semantic"] > 0 and row["kl_residual_mean"] > 0
        assert row["n"] == split["tokens"]["num_positions"]
    # asked for later, of a run that has its clips already: the same figures
    again = run(
        suite, tiny_quantized, tmp_path / "whole", tiny_folder, limit=2, seeds=(0,), layer_groups=2, resume=True
    )
    assert again["tokens"]["layer_groups"] == rows
    read = (tmp_path / "split" / "summary.csv").read_text("utf-8").splitlines()
    found = {row["name"]: row["model"] for row in csv.DictReader(read)}
    assert float(found["kl_semantic of layers slow 0-1"]) == pytest.approx(rows[0]["kl_semantic"])


def test_the_command_shows_them_in_the_report(tiny_folder, tiny_quantized, tmp_path):
    suite, out = write_suite(tmp_path / "suite", ["Good morning."], metrics=["tokens"]), tmp_path / "run"
    words = ["eval", str(suite), "--model", str(tiny_quantized), "--baseline", str(tiny_folder), "--out", str(out)]
    more = ["--seeds", "0", "--dtype", "float32", "--quiet"]
    assert main([*words, *more, "--layer-groups", "4"]) == 0
    rows = json.loads((out / "results.json").read_text("utf-8"))["tokens"]["layer_groups"]
    page = (out / "report.md").read_text("utf-8")
    table = page.split("Token damage by group of layers")[1]
    for name, row in zip(("Slow 0", "Slow 1", "Slow 2", "Slow 3", "Fast"), rows, strict=True):
        assert f"| {name} | {row['num_quantized']} |" in table
    assert f"| All | {sum(row['num_quantized'] for row in rows)} |" in table
    assert "Damage by group of layers" in (out / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--layer-groups", "5"], "--layer-groups 5"),
        (["--layer-groups", "0"], "--layer-groups 0"),
        (["--layer-groups", "2", "--metrics", "failures"], "--layer-groups 2 without --metrics tokens"),
    ],
)
def test_wrong_groups_are_refused_before_anything_is_made(tiny_folder, tiny_quantized, tmp_path, capsys, more, text):
    suite, out = write_suite(tmp_path / "suite", metrics=["tokens"]), tmp_path / "run"
    words = ["eval", str(suite), "--model", str(tiny_quantized), "--out", str(out), "--quiet"]
    assert main([*words, "--baseline", str(tiny_folder), *more]) == 2
    assert text in capsys.readouterr().err and not out.exists()
    assert main([*words, "--layer-groups", "2"]) == 2
    assert "--layer-groups 2 without --baseline" in capsys.readouterr().err and not out.exists()
