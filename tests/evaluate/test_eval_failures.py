import dataclasses
import math

import pytest
import torch

from s2quant.evaluate.failures import KINDS, Heard, Thresholds, find_failures

RATE = 44100
LIMITS = Thresholds()


def tone(seconds, level=0.1, rate=RATE):
    return level * torch.sin(2 * math.pi * 220 * torch.arange(round(seconds * rate)) / rate)


def codes(semantic):
    row = torch.tensor(semantic, dtype=torch.int64)
    return torch.stack([row] * 10)


def varied(num_frames):
    """Frames of which no two are alike."""
    return codes(list(range(num_frames)))


def compare(reference, hypothesis, unit="word", alignment=None):
    """A comparison; without an alignment of its own, all of the text is deleted and all that was heard is new."""
    said, heard = reference.split(), hypothesis.split()
    runs = alignment or [("substitute", said, heard)]
    return Heard(unit=unit, reference=said, hypothesis=heard, alignment=runs)


def raised(**changes):
    """The kinds that are found in an ordinary clip with some changes."""
    clip = {"stop_reason": "end", "codes": varied(40), "audio": tone(40 * 2048 / RATE)} | changes
    return {kind for kind, flag in find_failures(**clip).flags.items() if flag}


def test_an_ordinary_clip_has_no_failure_and_every_kind_is_answered():
    found = find_failures(
        stop_reason="end", codes=varied(40), audio=tone(1.86), sample_rate=RATE, baseline_frames=38,
        heard=compare("a b c d e f", "a b c d e f"),
    )  # fmt: skip
    assert found.flags == dict.fromkeys(KINDS, False)
    assert found.duration_ratio == 40 / 38


def test_what_cannot_be_told_is_none():
    found = find_failures(stop_reason="end", codes=varied(40))
    unknown = {kind for kind, flag in found.flags.items() if flag is None}
    assert unknown == {"truncated", "run_on", "repeated_words", "long_silence", "clipping", "not_finite"}
    assert found.duration_ratio is None
    assert find_failures(stop_reason="end", codes=varied(4), baseline_frames=0).duration_ratio is None


def test_a_clip_that_was_stopped_has_no_end():
    for reason in ("limit", "full"):
        assert raised(stop_reason=reason) == {"no_end"}


def test_a_clip_without_frames_is_empty_and_against_the_baseline_truncated():
    found = find_failures(stop_reason="end", codes=torch.zeros(10, 0, dtype=torch.int64), audio=torch.zeros(0))
    assert {kind for kind, flag in found.flags.items() if flag} == {"empty"}
    assert raised(codes=torch.zeros(10, 0, dtype=torch.int64), audio=None, baseline_frames=30) == {"empty", "truncated"}


@pytest.mark.parametrize(
    ("baseline_frames", "kinds"),
    [(40, set()), (59, set()), (60, {"truncated"}), (27, set()), (26, {"run_on"}), (400, {"truncated"})],
)
def test_duration_against_the_baseline(baseline_frames, kinds):
    assert raised(baseline_frames=baseline_frames) == kinds


@pytest.mark.parametrize(
    ("reference", "hypothesis", "kinds"),
    [
        ("a b c d e f g h i j", "a b c d e f", set()),
        ("a b c d e f g h i j", "a b c d e", {"truncated"}),
        ("a b c d e f g h i j", "", {"truncated"}),
        ("a b c d e f", "a b c d e f g h i j", set()),
        ("a b c d e f", "a b c d e f g h i j k", {"run_on"}),
        ("a b c", "a", set()),  # a word is a third of it
    ],
)
def test_words_heard_against_words_of_the_text(reference, hypothesis, kinds):
    pace = 0.4 * len(reference.split())
    assert raised(heard=compare(reference, hypothesis), audio=tone(pace)) == kinds


def test_seconds_per_word():
    heard = compare("a b c d e f g h i j", "a b c d e f g h i j")
    assert raised(heard=heard, audio=tone(1.9)) == {"truncated"}
    assert raised(heard=heard, audio=tone(2.1)) == set()
    assert raised(heard=heard, audio=tone(8.9)) == set()
    assert raised(heard=heard, audio=tone(9.1)) == {"run_on"}
    assert raised(heard=heard, audio=None, audio_s=9.1) == {"run_on"}
    assert raised(heard=heard, audio=tone(9.1), has_tags=True) == set()  # laughter may take its time
    assert raised(heard=dataclasses.replace(heard, unit="character"), audio=tone(1.9)) == set()


def test_words_that_are_not_in_the_text_in_a_row():
    said = ["a", "b", "c", "d", "e", "f"]
    for added, found in (("x y z", set()), ("x y z w", {"repeated_words"})):
        runs = [("equal", said[:3], said[:3]), ("insert", [], added.split()), ("equal", said[3:], said[3:])]
        heard = Heard(unit="word", reference=said, hypothesis=[*said[:3], *added.split(), *said[3:]], alignment=runs)
        assert raised(heard=heard, audio=tone(2.4)) == found
        assert raised(heard=dataclasses.replace(heard, unit="character"), audio=tone(2.4)) == set()


@pytest.mark.parametrize(
    ("reference", "hypothesis", "found"),
    [
        ("a b c d e f g h", "a b c d a b c d", True),  # aligned as substitutions
        ("a b c d e a b c d f", "a b c d e a b c d f", False),  # the text itself says it twice
        ("a b c d e a b c d f", "a b c d a b c d a b c d", True),  # but not three times
        ("a b c d e f g h", "a b c e a b c d", False),
        ("no no no no no no", "no no no no no no", False),
        ("no no no no no no", "no no no no no no no", False),  # one more, which overlaps
        ("no more of this please", "no no no no no no no no", True),
    ],
)
def test_sequences_of_words_heard_more_often_than_written(reference, hypothesis, found):
    heard = compare(reference, hypothesis)
    assert ("repeated_words" in raised(heard=heard, audio=None)) == found


def test_a_records_asr_object_is_read():
    runs = [
        ["equal", ["a", "b"], ["a", "b"]],
        ["delete", ["c"], []],
        ["substitute", ["d"], ["x"]],
        ["insert", [], ["y"]],
    ]
    heard = Heard.of({"unit": "word", "alignment": runs, "hits": 2})
    assert (list(heard.reference), list(heard.hypothesis)) == (["a", "b", "c", "d"], ["a", "b", "x", "y"])


@pytest.mark.parametrize(
    ("semantic", "found"),
    [
        ([7] * 11 + [8], False),
        ([1, *[7] * 12, 8], True),
        ([1, 2, 3, 4, 5, 6, 7, 8] * 2, True),
        ([1, 2, 3, 4, 5, 6, 7, 8, 20, 21, 1, 2, 3, 4, 5, 6, 7, 8], True),
        ([1, 2, 3, 4, 5, 6, 7, 8, 20, 21, 1, 2, 3, 4, 5, 6, 7, 9], False),
        ([1, 2] * 8, True),
        ([1, 2] * 7, False),
        ([9] * 8 + list(range(20)) + [9] * 8, False),  # two short pauses
        ([], False),
        ([1], False),
    ],
)
def test_codes_that_hang_or_go_round(semantic, found):
    assert ("repeated_codes" in raised(codes=codes(semantic), audio=None)) == found


@pytest.mark.parametrize(
    ("rest", "level", "found"), [(1.9, 0.0, False), (2.1, 0.0, True), (2.1, 0.0005, True), (2.1, 0.002, False)]
)
def test_long_silence_is_20_ms_windows_at_60_db_below_full_scale(rest, level, found):
    """A sine of amplitude 0.0014 has -60 dBFS."""
    audio = torch.cat([tone(0.5), tone(rest, level), tone(0.5)])
    assert ("long_silence" in raised(audio=audio)) == found
    two = torch.cat([tone(0.5), tone(1.2, 0), tone(0.1), tone(1.2, 0), tone(0.5)])
    assert raised(audio=two) == set()
    assert raised(audio=tone(2.5, 0)) == {"long_silence"}
    assert raised(audio=torch.cat([tone(0.5, rate=16000), torch.zeros(16000 * 3)]), sample_rate=16000) == {
        "long_silence"
    }


def test_clipping_is_more_than_one_sample_in_a_thousand_at_full_scale():
    audio = tone(2)
    audio[::1100] = 1.0
    assert raised(audio=audio) == set()
    audio[::900] = -1.0
    assert raised(audio=audio) == {"clipping"}
    assert raised(audio=tone(2, 1.3)) == {"clipping"}
    assert raised(audio=tone(2, 0.99)) == set()


def test_sound_that_is_not_finite_is_told_and_its_level_is_not():
    for bad in (math.nan, math.inf):
        audio = tone(2)
        audio[100] = bad
        found = find_failures(stop_reason="end", codes=varied(40), audio=audio).flags
        assert found["not_finite"] is True
        assert found["clipping"] is None and found["long_silence"] is None


def test_thresholds_are_arguments():
    strict = Thresholds(max_silence_s=0.1)
    audio = torch.cat([tone(1), tone(0.2, 0), tone(1)])
    assert raised(audio=audio, thresholds=strict) == {"long_silence"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        LIMITS.max_silence_s = 1


def test_alignments_of_jiwer_are_understood():
    wer = pytest.importorskip("s2quant.evaluate.wer")
    pytest.importorskip("jiwer")
    text = "the train leaves the station at nine"
    found = wer.score(text, text + " at nine at nine at nine", "whisper-basic", "en")
    record = {"unit": found.unit, "alignment": found.alignment}
    assert raised(heard=Heard.of(record), audio=tone(3)) == {"repeated_words", "run_on"}
