"""Figures, plots and spectrograms, each by itself."""

import itertools

import numpy as np
import pytest

from s2quant.report import format as form
from s2quant.report.charts import Scale, Series, columns, forest, forest_strip, scale_over, tick_text
from s2quant.report.sound import Clip, audio_uri, spectrogram


@pytest.mark.parametrize(
    ("value", "unit", "signed", "text"),
    [
        (0.0104, "fraction", False, "1.04"),
        (0.001, "fraction", True, "+0.10"),
        (-0.00001, "fraction", True, "-0.00"),
        (0.0, "fraction", True, "0.00"),
        (-0.0, "cosine", True, "0.000"),
        (0.8421, "cosine", False, "0.842"),
        (0.01234, "nats", False, "0.0123"),
        (3.4e-7, "nats", False, "3.4e-07"),
        (12.34, "seconds", False, "12.3"),
        (1234.5, "seconds", False, "1,234"),
        (None, "fraction", False, None),
        (float("nan"), "fraction", False, None),
        (float("inf"), "nats", True, None),
        (True, "nats", False, None),
        ("0.1", "nats", False, None),
    ],
)
def test_figures(value, unit, signed, text):
    assert form.figure(value, unit, signed) == text


def test_intervals_sizes_and_ratios():
    assert form.with_interval(0.001, [-0.0021, 0.004], "fraction", True) == "+0.10 [-0.21, +0.40]"
    assert form.with_interval(0.001, None, "fraction", True) == "+0.10"
    assert form.with_interval(None, [0, 1], "fraction") is None
    assert form.interval([0.1, None], "cosine") is None
    unit = form.byte_unit([9_120_000_000, None, 4])
    assert (form.scaled(9_120_000_000, unit), form.scaled(None, unit), unit[1]) == ("9.12", None, "GB")
    assert form.scaled(12, form.byte_unit([12])) == "12"
    assert form.ratio(1, 0) is None
    assert form.ratio(None, 2) is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.0021, 0.0051), (-3e-9, 4e-9), (0.5, 0.50001), (0, 12345)])
def test_ticks_are_round_and_inside(low, high):
    scale = Scale(low=low, high=high, start=0, end=100)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 11
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    assert len({tick_text(tick, scale, "nats") for tick in ticks}) == len(ticks)


def test_scales_are_never_empty():
    for values in ([], [None], [0.0], [0.0, 0.0], [3.0, 3.0]):
        scale = scale_over(values, 0, 100, zero=False)
        assert scale.high > scale.low


def test_a_strip_puts_the_margin_on_the_worse_side():
    row = {"name": "x", "unit": "cosine", "better": "higher", "delta": -0.01, "interval": [-0.02, 0.0], "margin": 0.03}
    for better, left in (("higher", True), ("lower", False)):
        chart = forest_strip(row | {"better": better})
        marks = {mark.style: mark.attrs for mark in chart.marks if mark.kind == "line"}
        assert (marks["margin"]["x1"] < marks["zero"]["x1"]) is left
    assert forest_strip(row | {"delta": None}) is None


def test_plots_stay_in_their_frame_and_skip_the_missing():
    groups = [{"group": "a" * 40, "delta": 0.1, "interval": [-5, 9]}, {"group": "b", "delta": None}]
    charts = [
        forest("t", groups, "fraction"),
        columns("t", "c", ["0", "1", "2"], [Series(name="n", style="model", shape="bar", values=[None, -1.0, 1e6])]),
        columns("t", "c", ["0"], [Series(name="n", style="model", shape="dot", values=[1.0])], "fraction", False),
    ]
    for chart in charts:
        for mark in chart.marks:
            xs = [value for key, value in mark.attrs.items() if key in ("x", "x1", "x2", "cx")]
            ys = [value for key, value in mark.attrs.items() if key in ("y", "y1", "y2", "cy")]
            assert all(0 <= x <= 360 for x in xs)
            assert all(0 <= y <= chart.height for y in ys)
    assert sum(mark.kind == "rect" for mark in charts[1].marks) == 2
    assert sum(mark.kind == "circle" for mark in charts[0].marks) == 1
    assert columns("t", "c", ["0"], [Series(name="n", style="model", shape="bar", values=[None])]) is None
    assert forest("t", groups[1:], "fraction") is None


def sine(hertz: float, rate_hz: int = 44100, seconds: float = 0.5) -> Clip:
    wave = np.sin(2 * np.pi * hertz * np.arange(int(rate_hz * seconds)) / rate_hz)
    return Clip(samples=wave.astype(np.float32)[:, None], rate_hz=rate_hz)


def test_a_spectrogram_shows_pitch_level_and_silence():
    peaks = [int(spectrogram(sine(hertz)).mean(axis=1).argmax()) for hertz in (200, 1000, 4000, 9000)]
    assert peaks == sorted(set(peaks))
    assert spectrogram(sine(1000)).max() > -25
    silence = Clip(samples=np.zeros((5, 2), dtype=np.float32), rate_hz=16000)
    assert spectrogram(silence).shape == (64, 1)
    assert (spectrogram(silence) == -80).all()
    assert spectrogram(sine(300, seconds=20)).shape[1] <= 480


@pytest.mark.parametrize(("rate_hz", "kind"), [(44100, "mpeg"), (16000, "mpeg"), (96000, "flac"), (8000, "mpeg")])
def test_audio_uses_what_its_rate_allows(rate_hz, kind):
    assert audio_uri(sine(440, rate_hz)).startswith(f"data:audio/{kind};base64,")


def test_labels_of_many_columns_do_not_run_into_each_other():
    names = [str(number) for number in range(40)]
    chart = columns("t", "c", names, [Series(name="s", style="model", shape="bar", values=[1.0] * 40)])
    labels = [mark for mark in chart.marks if mark.kind == "text" and mark.text in names and mark.attrs["y"] == 182]
    assert len(labels) < 40 and labels[0].text == "0"
    places = [mark.attrs["x"] for mark in labels]
    assert min(b - a for a, b in itertools.pairwise(places)) > 13
    assert {mark.text.split(",")[0] for mark in chart.marks if mark.kind == "rect"} == set(names)  # tooltips have all
