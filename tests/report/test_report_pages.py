"""What the report says, and that nothing of a user's text gets out of its place."""

import base64
import io
import json
import re
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sample import save, write_audio

from s2quant.errors import UserError
from s2quant.report import write_report
from s2quant.report.clips import NUM_SAMPLES

PAGES = ("report.md", "report.html", "blind.html", "blind-key.json")
EVIL = "<script>window.pwned=1</script>\"'><img src=x onerror=pwned=1> | `code` [a](http://evil.example) & \u202e"


class Reader(HTMLParser):
    """Collects tags with their attributes, and the text outside of style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.text, self.inside = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self.inside[-1:]):
            self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def report(sample_folder: Path) -> Path:
    write_report(sample_folder)
    return sample_folder


def copy_run(source: Path, target: Path) -> tuple[list[dict], dict]:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*PAGES))
    records = [json.loads(line) for line in (target / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    return records, json.loads((target / "results.json").read_text(encoding="utf-8"))


def page(folder: Path, name: str = "report.html") -> str:
    return (folder / name).read_text(encoding="utf-8")


def test_report_says_the_same_in_both_forms(report):
    markdown, words = page(report, "report.md"), Reader(page(report)).words()
    for figures in (
        "46.5",
        "4.24",
        "171",
        "whisper:0a1b2c3d4e5f",
        "34,210",
        "non-inferior",
        "0.31",
        "17.5",
        "McNemar p",
    ):
        assert figures in markdown
        assert figures in words
    assert "+0.10 [-0.21, +0.40]" in markdown
    assert "+0.10 [\u22120.21, +0.40]" in words  # the delta 0.001 [-0.0021, 0.004] of results.json, in points


def test_html_keeps_the_agreed_order(report):
    heads = re.findall(r"<h2>(.*?)</h2>", page(report))
    assert heads == [
        "Size, memory and speed",
        "Failures",
        "Words and voice",
        "Tokens",
        "Worst regressions",
        "Breakdown",
        "Listening",
        "Provenance",
    ]
    html = page(report)
    assert html.index('class="verdict good"') < html.index('class="tiles"') < html.index('id="size"')


def test_html_asks_nothing_of_the_network(report):
    for name in ("report.html", "blind.html"):
        tags = Reader(page(report, name)).tags
        addresses = [attrs[key] for _, attrs in tags for key in ("src", "href", "action", "data") if attrs.get(key)]
        assert not [a for a in addresses if re.match(r"(?!data:)[a-z]+:|//", a)]
        assert not re.search(r"@import|url\((?!data:)", page(report, name))
        policy = next(attrs["content"] for tag, attrs in tags if attrs.get("http-equiv"))
        assert "default-src 'none'" in policy
        assert "unsafe-inline" not in policy.split("script-src")[1]


def test_worst_clips_are_inside_and_the_others_beside(report):
    audio = [attrs["src"] for tag, attrs in Reader(page(report)).tags if tag == "audio"]
    inside = [src for src in audio if src.startswith("data:audio/mpeg")]
    beside = [src for src in audio if not src.startswith("data:")]
    assert len(inside) == 3 * 6  # prompt, baseline and model of six regressions
    assert len(inside) + len(beside) == len(audio) == 3 * 6 + 3 * min(NUM_SAMPLES, 16)  # the run has sixteen
    assert all((report / src).is_file() for src in beside)
    clip, rate = soundfile.read(io.BytesIO(base64.b64decode(inside[1].split(",")[1])))
    assert rate == 44100
    assert len(clip) > 0.5 * rate


def test_tables_have_captions_and_scopes(report):
    html = page(report)
    assert html.count("<caption>") == html.count("<table") > 10
    assert "<th>" not in html
    assert html.count('scope="col"') > 40


def test_word_alignment_is_marked(report):
    html = page(report)
    assert re.search(r"<del>\w+[^<]*</del>\s*<ins>blue</ins>", html)
    assert "<ins>then</ins>" in html


def test_a_report_is_the_same_when_built_again(report):
    before = {name: (report / name).read_bytes() for name in PAGES}
    write_report(report)
    assert {name: (report / name).read_bytes() for name in PAGES} == before


def test_missing_is_not_zero(tmp_path, sample_folder):
    records, _ = copy_run(sample_folder, tmp_path / "run")
    for record in records:
        record |= {"asr": None, "sim": None, "failures": None, "tokens": None, "audio": None, "prompt_audio": None}
    bare = {
        "results_version": 1,
        "suite": {"name": "bare"},
        "arms": {"baseline": {}, "model": None},
        "verdict": None,
        "metrics": [{"name": "WER", "unit": "fraction"}],
        "failures": [{"kind": "empty", "arms": {"model": None}}],
        "tokens": {"codebooks": [{"codebook": 0}]},
        "speed": {"rows": [{"arm": "model"}]},
        "worst": [["sample-000", 0]],
        "breakdown": {"lang": [{"group": "en"}]},
    }
    save(tmp_path / "run", records, bare)
    write_report(tmp_path / "run")
    words = Reader(page(tmp_path / "run")).words()
    assert "No verdict" in words
    for row in ("WER % / points", "Empty", "0 semantic", "en"):
        assert row.split()[0] in words
    rows = re.findall(
        r"^\| (?:WER|Empty|0 semantic|en|1|Baseline|Model) \|.*", page(tmp_path / "run", "report.md"), re.M
    )
    figures = [cell for row in rows for cell in row.split(" | ")[1:] if "not measured" not in cell]
    assert len(rows) >= 6
    assert not [
        cell for cell in figures if re.fullmatch(r"[-+]?0(\.0+)?( \|)?", cell) and "48" not in cell and "Rec" in cell
    ]
    assert "nan" not in words.lower().split()
    assert page(tmp_path / "run", "report.md").count("not measured") > 30


@pytest.mark.parametrize("metrics", [None, [], "one"])
def test_a_report_of_little(tmp_path, sample_folder, metrics):
    records, results = copy_run(sample_folder, tmp_path / "run")
    chosen = results["metrics"][:1] if metrics == "one" else metrics
    save(tmp_path / "run", records[:1], {"results_version": 1, "metrics": chosen})
    write_report(tmp_path / "run")
    text = page(tmp_path / "run", "report.md")
    assert "Token metrics: not measured." in text
    assert ("1.14" in text) == (metrics == "one")
    assert "No audio of both arms" in page(tmp_path / "run", "blind.html")


def test_identical_arms_draw_a_difference_of_nothing(tmp_path, sample_folder):
    records, results = copy_run(sample_folder, tmp_path / "run")
    for row in results["metrics"]:
        row |= {"delta": 0.0, "interval": [0.0, 0.0], "floor_delta": 0.0, "floor_interval": [0, 0], "margin": None}
    save(tmp_path / "run", records, results | {"worst": []})
    write_report(tmp_path / "run")
    assert "0.00 [0.00, 0.00]" in page(tmp_path / "run", "report.md")
    assert "No clip got worse." in page(tmp_path / "run")


def poison(value):
    """Put hostile words into every text of a result, but those that name arms and units."""
    if isinstance(value, dict):
        return {key: inner if key in ("unit", "better", "arm") else poison(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [poison(inner) for inner in value]
    return value + EVIL if isinstance(value, str) else value


def test_texts_are_escaped_everywhere(tmp_path, sample_folder):
    records, results = copy_run(sample_folder, tmp_path / "run")
    results = poison(results)
    odd = 'audio/model/a "quoted" <b>&amp; #1?.wav'
    shutil.copy(tmp_path / "run" / records[0]["audio"], tmp_path / "run" / odd)
    for record in records:
        keep = {"arm", "audio", "prompt_audio", "codes"}
        record |= {key: value if key in keep else poison(value) for key, value in record.items()}
        record |= {"error": EVIL, "lang": 'en" onload="pwned=1'}
        if record["arm"] == "model":
            record["audio"] = odd
    save(tmp_path / "run", records, results)
    write_report(tmp_path / "run")
    for name in ("report.html", "blind.html"):
        tags = Reader(page(tmp_path / "run", name)).tags
        assert sum(tag == "script" for tag, _ in tags) == 1
        assert not [
            attrs for _, attrs in tags if {key for key in attrs if key.startswith("on")} or attrs.get("src") == "x"
        ]
        assert {attrs["lang"] for _, attrs in tags if "lang" in attrs} <= {"en", 'en" onload="pwned=1'}
    links = [attrs["href"] for tag, attrs in Reader(page(tmp_path / "run")).tags if tag == "a"]
    assert "audio/model/a%20%22quoted%22%20%3Cb%3E%26amp%3B%20%231%3F.wav" in links
    markdown = page(tmp_path / "run", "report.md")
    assert not re.search(r"(?<!\\)<(script|img)|(?<!\\)\]\(http", markdown)
    widths = {len(re.findall(r"(?<!\\)\|", row)) for row in re.findall(r"^\| .*sample-000.*$", markdown, re.M)}
    assert widths == {8}


def test_audio_outside_the_folder_stays_outside(tmp_path, sample_folder):
    records, results = copy_run(sample_folder, tmp_path / "run")
    write_audio(tmp_path / "secret.wav", 1, 200, 1)
    for record in records:
        record |= {"audio": "../secret.wav", "prompt_audio": str(tmp_path / "secret.wav")}
    save(tmp_path / "run", records, results)
    write_report(tmp_path / "run")
    assert "<audio" not in page(tmp_path / "run")
    assert "audio not found in this folder" in page(tmp_path / "run")


def test_a_file_that_is_no_audio_is_said_to_be_missing(tmp_path, sample_folder):
    _records, _results = copy_run(sample_folder, tmp_path / "run")
    for path in (tmp_path / "run/audio/model").iterdir():
        path.write_bytes(b"not audio")
    write_report(tmp_path / "run")
    assert "audio not found in this folder" in page(tmp_path / "run")
    assert json.loads(page(tmp_path / "run", "blind-key.json"))["pairs"] == []


def test_the_blind_page_does_not_tell(report):
    html, key = page(report, "blind.html"), json.loads(page(report, "blind-key.json"))
    sides = [pair["a"] for pair in key["pairs"]]
    assert abs(sides.count("model") - sides.count("baseline")) <= 1
    assert len({(pair["utt"], pair["seed"]) for pair in key["pairs"]}) == len(sides) == 16
    audio = [attrs["src"] for tag, attrs in Reader(html).tags if tag == "audio"]
    body = re.sub(r"<script>.*?</script>|<style>.*?</style>|data:[^\"]*", "", html, flags=re.S)
    assert not re.search(r"model|baseline|sample-\d|\.wav|s2-pro", body)
    records = [json.loads(line) for line in (report / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    paths = {(r["arm"], r["utt"], r["seed"]): report / r["audio"] for r in records}
    for place, pair in enumerate(key["pairs"]):
        for offset, side in enumerate("ab"):
            uri = audio[2 * place + offset]
            assert uri.startswith("data:audio/flac")
            heard = soundfile.read(io.BytesIO(base64.b64decode(uri.split(",")[1])), dtype="int16")[0]
            assert np.array_equal(heard, soundfile.read(paths[pair[side], pair["utt"], pair["seed"]], dtype="int16")[0])


def test_refusals_say_what_to_do(tmp_path, sample_folder):
    with pytest.raises(UserError, match=r"results\.json"):
        write_report(tmp_path)
    records, results = copy_run(sample_folder, tmp_path / "run")
    save(tmp_path / "run", records, results | {"results_version": 7})
    with pytest.raises(UserError, match="results_version 7"):
        write_report(tmp_path / "run")
    save(tmp_path / "run", [], results)
    for line, words in (
        ("{", "line 2"),
        ("[]", "no arm, utt and seed"),
        ('{"arm": "model", "utt": "a"}', "no arm, utt"),
    ):
        (tmp_path / "run/records.jsonl").write_text("\n" + line + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=words):
            write_report(tmp_path / "run")
    (tmp_path / "run/records.jsonl").unlink()
    with pytest.raises(UserError, match=r"records\.jsonl"):
        write_report(tmp_path / "run")
    assert not (tmp_path / "run/report.html").exists()


def read_png(data: bytes) -> tuple[int, int, bytes]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (size,) = struct.unpack_from(">I", data, place)
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert struct.unpack_from(">I", data, place + 8 + size)[0] == zlib.crc32(kind + body)
        chunks[kind], place = body, place + 12 + size
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    return width, height, zlib.decompress(chunks[b"IDAT"])


def test_spectrograms_are_png(report):
    pictures = [attrs["src"] for tag, attrs in Reader(page(report)).tags if tag == "img"]
    assert len(pictures) == 3 * 6
    width, height, rows = read_png(base64.b64decode(pictures[1].split(",")[1]))
    assert (height, len(rows)) == (64, 64 * (width + 1))
    assert 32 < width <= 480
