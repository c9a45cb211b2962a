"""`s2quant eval` and `s2quant report` as a user calls them, in one process and in two."""

import csv
import json
import os
import subprocess
import sys

import pytest
from folder_cases import REPOSITORY
from run_cases import records, write_suite

from s2quant.cli import main

GROUPS = ("--layer-groups", "2")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return write_suite(
        tmp_path_factory.mktemp("suite"),
        ["Good morning.", "No <|im_end|> here.", "The <b>train</b> [laughing] leaves at nine."],
        seeds=[0],
        floor_seeds=[100],
        margins={"wer": 0.05},
        gates={"error_rate_max": 0.4, "kl_semantic_max": 10.0},
    )


def words(suite, out, tiny_folder, tiny_quantized, *more):
    return [
        "eval", str(suite), "--model", str(tiny_quantized), "--baseline", str(tiny_folder), "--out", str(out),
        "--dtype", "float32", "--metrics", "wer,sim,failures,tokens", "--slots", "1", *more,
    ]  # fmt: skip  # with one slot four clips are a group, and there are groups for two processes


def call(arguments):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "s2quant.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(suite, tmp_path_factory, tiny_folder, tiny_quantized):
    """A run by pocketsphinx and resemblyzer, in one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    return out, call(words(suite, out, tiny_folder, tiny_quantized, *GROUPS))


def test_the_report_holds_what_was_measured(finished, tiny_folder, tiny_quantized):
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: passed; ")
    assert done.stderr == ""
    results = json.loads((out / "results.json").read_text("utf-8"))
    assert results["suite"]["asr"].startswith("pocketsphinx:")
    assert results["suite"]["similarity"].startswith("resemblyzer:")
    assert results["arms"]["model"]["quantized"] == 17
    assert results["arms"]["model"]["tensor_bytes"] < results["arms"]["baseline"]["tensor_bytes"]
    assert results["arms"]["model"]["num_errors"] == 1
    assert results["provenance"]["inputs"]["model"]["config.json"]
    page, plain = (out / "report.html").read_text("utf-8"), (out / "report.md").read_text("utf-8")
    divergence = results["tokens"]["codebooks"][0]["kl_mean"]
    assert divergence > 0
    assert sum(row["num_quantized"] for row in results["tokens"]["layer_groups"]) == 17
    for text in (page, plain):
        assert "WER (corpus)" in text
        assert results["suite"]["asr"] in text
        assert "control token" in text or "im_end" in text
        assert f"{divergence:.4f}"[:5] in text or f"{divergence:.1e}" in text
    assert "<b>train</b>" not in page
    assert page.count("<audio") > 0
    assert (out / "blind.html").is_file()
    assert len(json.loads((out / "blind-key.json").read_text("utf-8"))) > 0
    rows = list(csv.DictReader((out / "summary.csv").read_text("utf-8").splitlines()))
    wer = next(row for row in rows if row["name"] == "WER (corpus)")
    assert float(wer["model"]) == results["metrics"][0]["model"]


def test_two_processes_give_the_same_records(finished, suite, tmp_path, tiny_folder, tiny_quantized):
    out = tmp_path / "run"
    done = call(words(suite, out, tiny_folder, tiny_quantized, *GROUPS, "--processes", "2"))
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"{out}: passed; ")
    assert {path.name for path in (out / "work").glob("clips-*")} == {"clips-00000-000.jsonl", "clips-00000-001.jsonl"}
    assert records(out) == records(finished[0])
    for name in ("results.json", "summary.csv"):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes(), name
    for path in finished[0].glob("audio/*/*.wav"):
        assert (out / path.relative_to(finished[0])).read_bytes() == path.read_bytes()


def test_a_broken_gate_is_named_and_is_exit_status_1(finished, suite, tmp_path, tiny_folder, tiny_quantized, capsys):
    strict = write_suite(
        tmp_path / "suite", ["No <|im_end|>."], seeds=[0], floor_seeds=None, gates={"rtf_ratio_max": 1.0}
    )
    out = tmp_path / "run"
    assert main(words(strict, out, tiny_folder, tiny_quantized, "--json")) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["passed"] is False
    assert json.loads(printed.out)["metrics"]["WER (corpus)"]["model"] is None
    lines = printed.err.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("s2quant eval: gate broken: sound.model: not one clip")
    assert lines[2].endswith("rtf_ratio_max: not measured, and a gate on what was not measured fails")
    assert "**Failed:** broken: sound.baseline, sound.model, " in (out / "report.md").read_text("utf-8")


def test_report_alone_writes_the_same_pages(finished, capsys):
    out, _ = finished
    before = (out / "report.md").read_bytes()
    (out / "report.md").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.md").read_bytes() == before
    assert capsys.readouterr().out == f"{out / 'report.html'}, report.md and blind.html\n"


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--seeds", "0,x"], "--seeds 0,x"),
        (["--limit", "0"], "--limit 0"),
        (["--metrics", "wer,taste"], "'taste'"),
        (["--slots", "0"], "--slots 0"),
        (["--asr-model", "absent.lm"], "absent.lm: no such file"),
    ],
)
def test_wrong_words_are_exit_status_2(suite, tmp_path, tiny_folder, tiny_quantized, capsys, more, text):
    assert main(words(suite, tmp_path / "run", tiny_folder, tiny_quantized, *more)) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
