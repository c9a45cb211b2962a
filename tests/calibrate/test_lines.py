"""Calibration lines: every kind of source, every way a source can be wrong, the choice and the hash."""

import json
import sys
from pathlib import Path

import datasets
import pytest
from folder_cases import REPOSITORY

from s2quant.calibrate.lines import (
    CalibrationLine,
    check_disjoint,
    lines_sha256,
    normalize_text,
    read_lines,
    select_lines,
)
from s2quant.cli import main
from s2quant.errors import UserError
from s2quant.export.calibration import calibration_lines
from s2quant.recipe import load_recipe


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def line(text: str, name: str = "a") -> CalibrationLine:
    return CalibrationLine(id=name, text=text)


def refusal(source: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        read_lines(source)
    return str(caught.value)


# --- files -------------------------------------------------------------------------------------------------------


def test_jsonl(tmp_path):
    rows = [
        {"id": "de-1", "lang": "de", "text": "Gr\u00fc\u00df dich,\u2028Anna!", "voice": "anna.wav"},
        {"text": "two", "lang": None},
    ]
    path = write_jsonl(tmp_path / "lines.jsonl", *rows)
    path.write_text(path.read_text("utf-8") + "\n", encoding="utf-8")
    assert (
        read_lines(str(path))
        == read_lines(path)
        == [
            CalibrationLine(id="de-1", text="Gr\u00fc\u00df dich,\u2028Anna!", lang="de", voice="anna.wav"),
            CalibrationLine(id="row-2", text="two", lang=None, voice=None),
        ]
    )


def test_json_list(tmp_path):
    path = tmp_path / "lines.json"
    path.write_text('[{"text": "one"},\n {"text": "two", "id": "b"}]', encoding="utf-8")
    assert [(found.id, found.text) for found in read_lines(path)] == [("row-1", "one"), ("b", "two")]


def test_txt_passes_over_blank_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("[whisper] one\r\n\n  \nzw\u00f6lf".encode())
    assert [(found.id, found.text) for found in read_lines(path)] == [
        ("row-1", "[whisper] one"),
        ("row-4", "zw\u00f6lf"),
    ]


def test_parquet_passes_over_other_columns_and_leaves_no_cache(tmp_path):
    table = {"text": ["one", "two"], "lang": ["en", None], "duration": [1.5, 2.5]}
    datasets.Dataset.from_dict(table).to_parquet(str(tmp_path / "lines.parquet"))
    assert read_lines(tmp_path / "lines.parquet") == [
        CalibrationLine(id="row-1", text="one", lang="en"),
        CalibrationLine(id="row-2", text="two"),
    ]
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_local_text_files_need_no_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert read_lines(write_jsonl(tmp_path / "lines.jsonl", {"text": "one"}))[0].text == "one"
    (tmp_path / "lines.parquet").write_bytes(b"PAR1")
    assert "pip install 's2quant[quantize]'" in refusal(tmp_path / "lines.parquet")


# --- refusals ----------------------------------------------------------------------------------------------------


def test_every_bad_row_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    rows = [
        '{"id": "a", "text": "fine"}',
        '{"id": "b", "text": "open',
        '["text"]',
        '{"id": "c", "lang": "en"}',
        '{"id": "d", "text": " \\n"}',
        '{"id": "e", "text": "fine", "speaker": 1, "txt": ""}',
        "",
        '{"id": "a", "text": "again"}',
        '{"id": 7, "text": "fine", "lang": "", "voice": []}',
        '{"id": "g", "text": null}',
    ]
    path.write_text("\n".join(rows), encoding="utf-8")
    message = refusal(path)
    assert f"calibration source {path}: 11 fault(s)" in message
    for fault in (
        "line 2: not JSON (Unterminated string starting at at column 21)",
        "line 3: a JSON list, not an object",
        "line 4: no text",
        "line 5: text is empty",
        "line 6: unknown key 'speaker'",
        "line 6: unknown key 'txt'",
        "line 8: id 'a' stands already at line 1",
        "line 9: id is 7, not text",
        "line 9: lang is empty",
        "line 9: voice is [], not text",
        "line 10: no text",
    ):
        assert fault in message
    assert "recipes/README.md" in message and "do: mend the rows" in message


def test_made_up_id_may_not_hide_a_given_one(tmp_path):
    path = write_jsonl(tmp_path / "lines.jsonl", {"id": "row-2", "text": "one"}, {"text": "two"})
    assert "line 2: id 'row-2' stands already at line 1" in refusal(path)


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.json", "lines.txt"])
def test_not_utf8(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}')
    assert "byte 13 is not UTF-8" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.txt", "\n")]
)
def test_empty(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert f"got: calibration source {tmp_path / name}: no lines" in refusal(tmp_path / name)


def test_json_must_be_a_list(tmp_path):
    path = tmp_path / "lines.json"
    path.write_text('{"text": "one"}')
    assert "a JSON dict" in refusal(path)
    path.write_text('{"text": "one"}\n{"text": "two"}')
    assert "or call it .jsonl" in refusal(path)


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.txt", "none.parquet"])
def test_absent(tmp_path, name):
    assert str(tmp_path / name) in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["lines.csv", "lines"])
def test_unknown_kind(tmp_path, name):
    assert "a file ending in .jsonl, .json, .parquet, .txt, or hf:NAME" in refusal(tmp_path / name)


def test_parquet_that_is_none(tmp_path):
    (tmp_path / "lines.parquet").write_text("no table")
    message = refusal(tmp_path / "lines.parquet")
    assert str(tmp_path / "lines.parquet") in message and "ArrowInvalid" in message


def test_parquet_without_the_column(tmp_path):
    datasets.Dataset.from_dict({"sentence": ["one"]}).to_parquet(str(tmp_path / "lines.parquet"))
    assert "no column 'text' (columns: sentence)" in refusal(tmp_path / "lines.parquet")


def test_parquet_with_bad_rows(tmp_path):
    table = {"text": ["one", "", None], "id": ["a", "b", "c"]}
    datasets.Dataset.from_dict(table).to_parquet(str(tmp_path / "lines.parquet"))
    message = refusal(tmp_path / "lines.parquet")
    assert "row 2: text is empty" in message and "row 3: no text" in message


# --- the hub -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:owner/name", ("owner/name", "train", "text")),
        ("hf:name:test", ("name", "test", "text")),
        ("hf:owner/name:train[:60%]:sentence", ("owner/name", "train[:60%]", "sentence")),
        ("hf:owner/name:train+test:raw text", ("owner/name", "train+test", "raw text")),
    ],
)
def test_hub_name_split_and_column(monkeypatch, source, expected):
    calls = []

    def load(path, split):
        calls.append((path, split))
        return datasets.Dataset.from_dict({expected[2]: ["one", " ", "two"], "id": [5, 5, 5]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [(found.id, found.text) for found in read_lines(source)] == [("row-1", "one"), ("row-3", "two")]
    assert calls == [expected[:2]]


def test_hub_column_of_another_kind(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: datasets.Dataset.from_dict({"text": [1, None]}))
    message = refusal("hf:owner/name")
    assert "row 1: text is 1, not text" in message and "row 2: no text" in message


@pytest.mark.parametrize(
    "error",
    [ConnectionError("offline"), ValueError('Unknown split "x"'), datasets.exceptions.DatasetNotFoundError("gone")],
)
def test_hub_refuses(monkeypatch, error):
    def load(path, split):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = refusal("hf:owner/name")
    assert f"calibration source hf:owner/name: {type(error).__name__}: {error}" in message


@pytest.mark.parametrize("source", ["hf:", "hf:a b", "hf:name:", "hf:name:train:", "hf:name:train:text:more"])
def test_hub_syntax(source):
    assert "expected: hf:NAME[:SPLIT][:COLUMN]" in refusal(source)


# --- choice, hash, overlap ---------------------------------------------------------------------------------------

MANY = [line(f"text {n}", f"id-{n}") for n in range(20)]


def test_select_is_deterministic_and_depends_on_the_seed():
    chosen = select_lines(MANY, 8, seed=3)
    assert chosen == select_lines(tuple(MANY), 8, seed=3) != select_lines(MANY, 8, seed=4)
    assert len({found.id for found in chosen}) == 8 and set(chosen) < set(MANY)
    # The order of random.Random(3).sample, which Python keeps between versions.
    assert [found.id for found in select_lines(MANY, 3, seed=3)] == ["id-7", "id-18", "id-17"]
    assert sorted(select_lines(MANY, 20, 0), key=MANY.index) == MANY


@pytest.mark.parametrize("num", [0, -1, 21])
def test_select_refuses(num):
    with pytest.raises(UserError, match="20 lines\nexpected: a number from 1 to 20"):
        select_lines(MANY, num, 0)


def test_sha256_is_stable_and_sees_everything():
    first = CalibrationLine(id="a", text="\u00e9", lang="fr")
    assert lines_sha256([first]) == "a02437b476d76d48a1b8f353aec8968dd2276af4b8eb9412694bfc1486638965"
    others = [
        CalibrationLine(id="b", text="\u00e9", lang="fr"),
        CalibrationLine(id="a", text="e", lang="fr"),
        CalibrationLine(id="a", text="\u00e9", lang=None),
        CalibrationLine(id="a", text="\u00e9", lang="fr", voice="v.wav"),
    ]
    hashes = [lines_sha256(chosen) for chosen in ([first], *([other] for other in others), MANY, MANY[::-1], [])]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<|speaker:0|>[whisper] Don't!\n<|speaker:1|>OK\u2026", "don t ok"),
        ("STRASSE,  Stra\u00dfe", "strasse strasse"),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u0967\u0968\u0964",
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u0967\u0968",
        ),
        ("\uff28\uff49\uff0c\u90a3\u4e2a\u2026\u2026", "hi \u90a3\u4e2a"),
        ("[sigh] ...", ""),
    ],
)
def test_normalize(text, words):
    assert normalize_text(text) == words


def test_check_disjoint(tmp_path):
    lines = [
        line("[sad] The boat is LATE.", "x"),
        line("Nothing shared", "y"),
        line("<|speaker:0|>Oui.", "z"),
        line("[hum]", "t"),
    ]
    check_disjoint(lines, tmp_path / "absent")
    check_disjoint(lines, tmp_path)
    (tmp_path / "texts").mkdir()
    rows = [{"id": 1, "text": "the boat, is late!"}, {"id": 2, "text": "[pause]"}, {"id": 3}]
    write_jsonl(tmp_path / "texts" / "en.jsonl", *rows)
    write_jsonl(tmp_path / "texts" / "fr.jsonl", {"id": 4, "text": "Non"}, {"id": 5, "text": "oui"})
    for folder in (tmp_path, tmp_path / "texts"):
        with pytest.raises(UserError) as caught:
            check_disjoint(lines, folder)
        message = str(caught.value)
        assert "2 calibration text(s) that the evaluation measures" in message
        assert "x: '[sad] The boat is LATE.' is en.jsonl line 1" in message
        assert "z: '<|speaker:0|>Oui.' is fr.jsonl line 2" in message
    check_disjoint([lines[1], lines[3]], tmp_path)


def test_check_disjoint_does_not_skip_what_it_cannot_read(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UserError, match=r"bad\.jsonl: line 2: not JSON"):
        check_disjoint([line("one")], tmp_path)


def test_a_recipe_that_has_travelled_says_where_its_source_goes(tmp_path, tiny_folder, capsys):
    """A quantized folder keeps its recipe but not its source: the set beside it cannot be checked without the lines."""
    recipe = tmp_path / "w4a16" / "s2quant" / "recipe.yaml"
    recipe.parent.mkdir(parents=True)
    text = (REPOSITORY / "recipes" / "tiny-w4a16.yaml").read_text("utf-8")
    recipe.write_text(text, "utf-8")
    words = ["--model", str(tiny_folder), "--calibration", str(recipe.parent / "calibration.safetensors"), "--quiet"]
    assert main(["quantize", str(recipe), *words, "--out", str(tmp_path / "again")]) == 2
    printed = capsys.readouterr().err
    source = recipe.parent / "calibration" / "tiny-en.jsonl"
    assert "its calibration.source calibration/tiny-en.jsonl, which is relative to the recipe, is not there" in printed
    assert f"expected: {source}" in printed
    assert "give calibration.source an absolute path" in printed
    assert not (tmp_path / "again").exists()
    there = REPOSITORY / "recipes" / "calibration" / "tiny-en.jsonl"
    recipe.write_text(text.replace("calibration/tiny-en.jsonl", str(there)), "utf-8")
    by_path = calibration_lines(load_recipe(recipe), None, None)
    recipe.write_text(text, "utf-8")
    source.parent.mkdir()
    source.write_bytes(there.read_bytes())
    assert calibration_lines(load_recipe(recipe), None, None) == by_path
