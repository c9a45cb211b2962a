import hashlib
import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import soundfile
import yaml

from s2quant.calibrate.lines import check_disjoint, read_lines
from s2quant.errors import UserError
from s2quant.evaluate.text import has_tags, strip_marks
from s2quant.sampling import Sampling
from s2quant.suite import load_suite, read_seed_tts_list

ROOT = Path(__file__).parent.parent.parent
SUITES = sorted((ROOT / "eval/suites").glob("*.yaml"))
LANGUAGES = {"ja", "en", "zh", "ko", "es", "pt", "ar", "ru", "fr", "de"}
ROWS = [{"id": "a-1", "lang": "en", "text": "[slow] One."}, {"id": "a-2", "lang": "en", "text": "Two."}]


def write_suite(folder: Path, rows: list[object] | None = None, **changes: object) -> Path:
    """Write a small suite with a voice and its texts; a change of None takes the key out."""
    text = "".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows))
    (folder / "texts.jsonl").write_text(text, encoding="utf-8")
    (folder / "voice.wav").write_bytes(b"not read here")
    data: dict[str, object] = {
        "name": "small",
        "version": 3,
        "texts": {"file": "texts.jsonl", "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "voices": {
            name: {"audio": "voice.wav", "text": "Hear me.", "sha256": hashlib.sha256(b"not read here").hexdigest()}
            for name in ("v1", "v2")
        },
        "seeds": [0, 1],
        "floor_seeds": [7, 8],
        "asr": {"kind": "pocketsphinx"},
        "normalizer": "whisper-english",
        "similarity": {"kind": "resemblyzer"},
    } | changes
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}), encoding="utf-8")
    return path


def refusal(path: Path, texts: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_suite(path, texts)
    return str(caught.value)


def test_every_suite_that_comes_with_s2quant_is_here() -> None:
    assert [path.stem for path in SUITES] == [
        "demo-en",
        "mini-en",
        "multilingual",
        "seed-tts-en",
        "seed-tts-zh",
        "smoke-en",
    ]


@pytest.mark.parametrize(
    ("name", "count"), [("demo-en", 200), ("mini-en", 200), ("smoke-en", 50), ("multilingual", 200)]
)
def test_suites_with_texts_of_their_own_load(name: str, count: int) -> None:
    suite = load_suite(ROOT / "eval/suites" / f"{name}.yaml")
    assert (suite.name, len(suite.utterances)) == (name, count)
    assert len(suite.seeds) == len(suite.floor_seeds) >= 1
    assert suite.margins["wer"] > 0
    assert all(strip_marks(one.text) for one in suite.utterances)
    assert sum(has_tags(one.text) for one in suite.utterances) >= count / 10


def test_the_demo_has_what_its_report_needs() -> None:
    suite = load_suite(ROOT / "eval/suites/demo-en.yaml")
    assert len(suite.utterances) * len(suite.seeds) >= 600
    assert (suite.asr, suite.asr_model, suite.similarity) == ("pocketsphinx", None, "resemblyzer")


def test_the_demo_speaks_only_sentences_that_were_not_trained_on() -> None:
    grammar = pytest.importorskip("tools.mini.grammar")
    suite = load_suite(ROOT / "eval/suites/demo-en.yaml")
    assert {grammar.split_of(one.text) for one in suite.utterances} == {"test"}
    words = set(grammar.vocabulary())
    assert all(word in words for one in suite.utterances for word in grammar.words_of(one.text))


@pytest.mark.parametrize("name", ["demo-en", "mini-en"])
def test_the_demo_has_four_voices_that_say_what_is_not_asked_for(name: str) -> None:
    grammar = pytest.importorskip("tools.mini.grammar")
    suite = load_suite(ROOT / "eval/suites" / f"{name}.yaml")
    assert [one.prompt_id for one in suite.utterances[:5]] == ["rms", "slt", "awb", "kal16", "rms"]
    assert suite.margins["similarity_to_prompt"] > 0
    asked = {grammar.spoken(one.text) for one in suite.utterances}
    voices = {one.prompt_audio: one.prompt_text for one in suite.utterances}
    assert len(voices) == 4
    for audio, text in voices.items():
        assert audio is not None and text not in asked and grammar.split_of(text) == "test"
        info = soundfile.info(audio)
        assert (info.samplerate, info.channels, 3 <= info.duration <= 5) == (16000, 1, True)


def test_a_margin_of_similarity_without_voices_is_refused(tmp_path: Path) -> None:
    path = write_suite(tmp_path, voices=None, margins={"similarity_to_prompt": 0.02})
    assert "margins.similarity_to_prompt, and no text has a voice" in refusal(path)
    load_suite(write_suite(tmp_path, margins={"similarity_to_prompt": 0.02}))


def test_multilingual_has_twenty_lines_a_language_with_tags_and_speakers() -> None:
    lines = load_suite(ROOT / "eval/suites/multilingual.yaml").utterances
    for lang in LANGUAGES:
        texts = [one.text for one in lines if one.lang == lang]
        assert len(texts) == 20
        assert sum(has_tags(text) for text in texts) >= 4
        assert sum("<|speaker:1|>" in text for text in texts) == 1
    assert {one.lang for one in lines} == LANGUAGES
    assert [one.lang for one in lines[:10]] == [one.lang for one in lines[10:20]]  # any limit is a fair mix


@pytest.mark.parametrize("source", sorted((ROOT / "recipes/calibration").glob("*.jsonl")), ids=lambda path: path.stem)
def test_no_text_is_calibrated_on(source: Path) -> None:
    check_disjoint(read_lines(source), ROOT / "eval")
    text = json.loads((ROOT / "eval/texts/smoke-en.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]
    with pytest.raises(UserError, match="smoke-en"):
        check_disjoint([type(read_lines(source)[0])(id="x", text=text.upper())], ROOT / "eval")


def test_all_that_a_suite_says(tmp_path: Path) -> None:
    path = write_suite(
        tmp_path,
        sampling={"temperature": 1, "top_k": 5},
        metrics=["speed", "wer"],
        asr={"kind": "whisper", "model": "tiny.pt"},
        margins={"wer": 0.01},
        gates={"wer_max": 1},
        fail_on="inconclusive",
    )
    suite = load_suite(path)
    first, second = suite.utterances
    assert (first.id, first.prompt_id, first.prompt_text) == ("a-1", "v1", "Hear me.")
    assert (second.prompt_id, second.prompt_audio) == ("v2", (tmp_path / "voice.wav").resolve())
    assert suite.sampling == Sampling(temperature=1.0, top_p=0.8, top_k=5)
    assert (suite.metrics, suite.max_frames) == (("wer", "speed"), 2048)
    assert suite.asr_model == str((tmp_path / "tiny.pt").resolve())
    assert (suite.margins, suite.gates, suite.fail_on) == ({"wer": 0.01}, {"wer_max": 1.0}, "inconclusive")
    with pytest.raises(FrozenInstanceError):
        suite.version = 4  # type: ignore[misc]


def test_a_row_may_name_its_voice_and_an_official_model_is_no_path(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "voice": "v2"}, ROWS[1]]
    suite = load_suite(write_suite(tmp_path, rows, asr={"kind": "whisper", "model": "official:tiny"}))
    assert [one.prompt_id for one in suite.utterances] == ["v2", "v2"]
    assert suite.asr_model == "official:tiny"
    plain = load_suite(write_suite(tmp_path, voices=None))
    assert plain.utterances[0].prompt_audio is None
    assert plain.utterances[0].prompt_id is None


def test_the_hash_tells_every_change(tmp_path: Path) -> None:
    first = load_suite(write_suite(tmp_path))
    assert load_suite(write_suite(tmp_path)).sha256 == first.sha256
    assert load_suite(write_suite(tmp_path, seeds=[0, 2])).sha256 != first.sha256
    longer = load_suite(write_suite(tmp_path, [*ROWS, {"id": "a-3", "lang": "en", "text": "Three."}]))
    assert longer.sha256 != first.sha256
    assert longer.texts_sha256 != first.texts_sha256


def test_every_offender_is_listed(tmp_path: Path) -> None:
    path = write_suite(
        tmp_path,
        name="Not A Word",
        version=0,
        seed=1,
        seeds=[0, 0],
        floor_seeds=[-1],
        sampling={"temperature": 9, "beams": 2},
        max_frames=True,
        metrics=["mos"],
        asr={"kind": "kaldi", "path": "x"},
        normalizer="none",
        similarity=None,
        margins={"wer": 0, "rtf": 1},
        gates={"wer_max": "low"},
        fail_on="never",
        texts={"file": "absent.jsonl", "sha256": "0"},
    )
    message = refusal(path)
    for fault in (
        "unknown key 'seed'", "name is 'Not A Word'", "version is 0", "max_frames is True", "metrics is ['mos']",
        "fail_on is 'never'", "sampling: unknown key 'beams'", "margins: unknown key 'rtf'", "margins.wer is 0.0",
        "gates.wer_max is 'low'", "seeds is [0, 0]", "floor_seeds is [-1]", "asr: unknown key 'path'",
        "asr.kind is 'kaldi'", "similarity is None", "normalizer is 'none'", "texts: no file",
    ):  # fmt: skip
        assert fault in message, fault
    assert "do: mend the suite" in message


def test_sampling_out_of_range(tmp_path: Path) -> None:
    assert "sampling.top_p is 0" in refusal(write_suite(tmp_path, sampling={"top_p": 0}))
    assert "sampling.top_k is 1.5, not a whole number" in refusal(write_suite(tmp_path, sampling={"top_k": 1.5}))
    assert "sampling.temperature is 'hot', not a number" in refusal(
        write_suite(tmp_path, sampling={"temperature": "hot"})
    )
    assert "sampling is [1]" in refusal(write_suite(tmp_path, sampling=[1]))


def test_seeds_are_paired_with_the_floor(tmp_path: Path) -> None:
    assert "share [1]" in refusal(write_suite(tmp_path, floor_seeds=[1, 9]))
    assert "1 floor_seeds for 2 seeds" in refusal(write_suite(tmp_path, floor_seeds=[9]))
    assert "seeds is empty" in refusal(write_suite(tmp_path, seeds=[]))
    assert load_suite(write_suite(tmp_path, floor_seeds=None)).floor_seeds == ()


def test_changed_files_are_told(tmp_path: Path) -> None:
    path = write_suite(tmp_path)
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write("\n")
    (tmp_path / "voice.wav").write_bytes(b"another")
    message = refusal(path)
    assert "texts.jsonl has sha256" in message
    assert "a changed text needs a new version" in message
    assert message.count("voice.wav has sha256") == 2
    assert "sha256 is None" in refusal(write_suite(tmp_path, texts={"file": "texts.jsonl"}))


def test_bad_rows_are_all_named(tmp_path: Path) -> None:
    rows: list[object] = [
        {"id": "a/b", "lang": "en", "text": "One."},
        {"id": "ok", "lang": "english", "text": "Two."},
        {"id": "ok", "lang": "en", "text": " "},
        {"id": "one", "lang": "en", "text": "Three.", "voice": "v9"},
        {"id": "one", "lang": "en", "text": "Four.", "mood": "sad"},
        {"id": "two", "lang": "en", "text": "Five."},
        {"id": "two", "lang": "de", "text": "Sechs."},
        ["list"],
    ]
    message = refusal(write_suite(tmp_path, rows))
    for fault in (
        "id 'a/b', not letters",
        "line 2: lang is 'english'",
        "line 3: text is ' '",
        "line 4: voice 'v9' (voices: v1, v2)",
        "line 5: unknown key 'mood'",
        "id 'two' comes twice",
        "line 8: a JSON list",
        "normalizer whisper-english is for en",
    ):
        assert fault in message, fault
    assert "no texts" in refusal(write_suite(tmp_path, []))


def test_files_that_are_no_suites(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("[1, 2]", encoding="utf-8")
    assert "the file holds no mapping" in refusal(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("{", encoding="utf-8")
    assert "a YAML suite" in refusal(tmp_path / "b.yaml")
    assert "a readable text file" in refusal(tmp_path / "absent.yaml")
    for texts, fault in (
        ("x", "texts is missing"),
        ({"format": "csv"}, "texts.format is 'csv'"),
        ({}, "texts.file is None"),
    ):
        assert fault in refusal(write_suite(tmp_path, texts=texts))
    assert "voices is 1" in refusal(write_suite(tmp_path, voices=1))
    assert "voices.v is not a name" in refusal(write_suite(tmp_path, voices={"v": 1}))
    assert "voices.v.text is None" in refusal(
        write_suite(tmp_path, voices={"v": {"audio": "voice.wav", "sha256": "0"}})
    )


def make_list(folder: Path) -> Path:
    (folder / "prompt-wavs").mkdir()
    for name in ("p1", "p2"):
        (folder / "prompt-wavs" / f"{name}.wav").write_bytes(b"")
    path = folder / "meta.lst"
    path.write_text(
        "u-1|What p1 says.|prompt-wavs/p1.wav|Say this.|wavs/u-1.wav\n"
        "u-2|What p2 says.|prompt-wavs/p2.wav|Say that.\n"
        f"u-3.wav|Text before voice.|{folder}/prompt-wavs/p1.wav\n"
        "\n"
        "u-4|Only text.  \n",
        encoding="utf-8",
    )
    return path


def test_lists_of_seed_tts_eval_in_all_their_forms(tmp_path: Path) -> None:
    found = read_seed_tts_list(make_list(tmp_path), "en")
    p1, p2 = tmp_path / "prompt-wavs/p1.wav", tmp_path / "prompt-wavs/p2.wav"
    assert [(one.id, one.text, one.prompt_text, one.prompt_audio, one.prompt_id) for one in found] == [
        ("u-1", "Say this.", "What p1 says.", p1, "p1"),
        ("u-2", "Say that.", "What p2 says.", p2, "p2"),
        ("u-3", "Text before voice.", None, p1, "p1"),
        ("u-4", "Only text.", None, None, None),
    ]
    assert {one.lang for one in found} == {"en"}


def test_a_list_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "meta.lst"
    path.write_text("a|b|c|d|e|f\nlonely\nu|say|gone.wav\nu|again\nv|\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_seed_tts_list(path)
    for fault in (
        "line 1: 6 fields",
        "line 2: 1 fields",
        "line 3: no file",
        "id 'u' comes twice",
        "id 'v' has no text",
    ):
        assert fault in str(caught.value), fault
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="no lines"):
        read_seed_tts_list(path)


@pytest.mark.parametrize(("lang", "count"), [("en", 1088), ("zh", 2020)])
def test_the_public_suites_take_the_users_list(tmp_path: Path, lang: str, count: int) -> None:
    suite = ROOT / f"eval/suites/seed-tts-{lang}.yaml"
    assert "name your copy with --texts" in refusal(suite)
    (tmp_path / "p.wav").write_bytes(b"")
    path = tmp_path / "meta.lst"
    path.write_text("".join(f"u{n}|Said.|p.wav|Say {n}.\n" for n in range(count)), encoding="utf-8")
    found = load_suite(suite, path)
    assert (len(found.utterances), found.normalizer, found.utterances[0].lang) == (count, "seed-tts", lang)
    first = found.sha256
    path.write_text(path.read_text().replace("Say 0.", "Say zero."), encoding="utf-8")
    assert load_suite(suite, path).sha256 != first
    path.write_text("u|Said.|p.wav|Say.\n", encoding="utf-8")
    assert f"1 utterances, not {count}" in refusal(suite, path)


def test_a_suite_with_texts_of_its_own_takes_no_list(tmp_path: Path) -> None:
    assert "texts of its own" in refusal(write_suite(tmp_path), make_list(tmp_path))
    wrong = {"format": "seed-tts", "file": "x", "lang": "English"}
    message = refusal(write_suite(tmp_path, texts=wrong), tmp_path / "meta.lst")
    assert "texts.file: the list is the user's own" in message
    assert "texts.lang is 'English'" in message
    pinned = {"format": "seed-tts", "lang": "en", "sha256": "0" * 64}
    assert "meta.lst has sha256" in refusal(write_suite(tmp_path, texts=pinned), tmp_path / "meta.lst")


def test_the_readme_names_every_key_and_gate() -> None:
    from s2quant.suite import schema as suite

    text = (ROOT / "eval/README.md").read_text(encoding="utf-8")
    names = [
        *suite.METRICS,
        *suite.ASR_KINDS,
        *suite.SIMILARITY_KINDS,
        *suite.NORMALIZERS,
        *suite.MARGINS,
        *suite.GATES,
    ]
    for name in [*names, *suite._KEYS, *suite.FAIL_ON]:
        assert f"`{name}`" in text or f"`{name}." in text, name
    assert all(f"suites/{path.name}" in text for path in SUITES)
