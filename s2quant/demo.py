"""`s2quant demo`: the whole job on a small checkpoint, on a CPU: quantize, inspect, speak, evaluate, report.

With `models/s2-mini` in the checkout it is done on that, and its speech is measured by `models/whisper-mini`. Without
it a tiny checkpoint of random weights is made: that shows that every step works and where its files are, and the
evaluation is left out, since there are no words in its noise. What is printed says which of the two it was.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2quant.evaluate.plan import EvalOptions
from s2quant.evaluate.run import run_eval
from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint
from s2quant.export.random import tiny_config, write_random
from s2quant.export.verify import inspect_folder
from s2quant.files import atomic_folder, check_new
from s2quant.recipe import default_recipe
from s2quant.report import write_report
from s2quant.runtime.audio import write_wav
from s2quant.runtime.loading import load_engine
from s2quant.runtime.speech import Request

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
LISTENERS = ("jiwer", "whisper", "resemblyzer", "pandas", "scipy", "statsmodels")
TAGGED = "Hello [laughing] there."
SENTENCES = (
    "The old captain opened the green window.",
    "[slow] My sister found a wooden box near the harbor.",
    "Please carry the letter [pause] to the station.",
)

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the demo is done on.

    Args:
        model: The bf16 checkpoint folder, or None for random weights.
        recognizer: A whisper checkpoint that knows its words, or None.
        recipe: The recipe.
        sentences: What is spoken with both.
        num_sequences: Calibration sequences; None takes the recipe's number.
        num_utterances: Utterances of the suite; 0 leaves the evaluation out.
        max_frames: Most frames of a sentence.
    """

    model: Path | None
    recognizer: Path | None
    recipe: Path
    sentences: Sequence[str]
    num_sequences: int | None = None
    num_utterances: int = 0
    max_frames: int = 320


def find_subject(models: Path = MODELS) -> Subject:
    """Look for the trained checkpoint and its recognizer.

    Args:
        models: Where they may be.

    Returns:
        The trained checkpoint where it is complete, else random weights.
    """
    model, recognizer = models / "s2-mini", models / "whisper-mini" / "whisper-mini.pt"
    if not (model / "config.json").is_file():
        return Subject(model=None, recognizer=None, recipe=default_recipe("tiny-w4a16"), sentences=(TAGGED,))
    return Subject(
        model=model,
        recognizer=recognizer if recognizer.is_file() else None,
        recipe=default_recipe("s2-mini-w4a16"),
        sentences=SENTENCES,
        num_sequences=32,
        num_utterances=12,
    )


def run_demo(out: Path, report: Report, subject: Subject | None = None) -> list[str]:
    """Quantize a checkpoint, inspect both, speak the same sentences with both, evaluate.

    Args:
        out: The folder to make.
        report: Told of progress.
        subject: What to do it on; None looks in the checkout.

    Returns:
        Lines to print.

    Raises:
        UserError: The folder exists or cannot be written, or the checkpoint cannot be used.
    """
    subject = subject or find_subject()
    check_new(out)
    with atomic_folder(out) as folder:
        if subject.model is None:
            report("random checkpoint", 0, 1)
            write_random(tiny_config(), folder / "bf16", seed=0)
        arms = {"bf16": subject.model or folder / "bf16", "w4a16": folder / "w4a16"}
        quantize_checkpoint(
            QuantizeOptions(
                recipe=subject.recipe,
                model=arms["bf16"],
                out=arms["w4a16"],
                num_sequences=subject.num_sequences,
            ),
            report,
        )
        rows = [f"{'checkpoint':12} {'quantized':>9} {'bytes':>12} {'frames':>6} {'sound':>8} {'RTF':>6} {'ended':>6}"]
        rows += [_speak(name, path, folder, subject, report) for name, path in arms.items()]
        rows += _evaluate(arms, folder / "eval", subject, report)
    where = f"listen: {out / 'bf16-1.wav'} and {out / 'w4a16-1.wav'}"
    if subject.model is None:
        return [
            "checkpoint: tiny, random weights (there is no models/s2-mini here)",
            *rows,
            f"{where} (random weights: noise, but every step ran)",
        ]
    rows += [where] if not (out / "eval").is_dir() else [where, f"report: {out / 'eval' / 'report.html'}"]
    return [f"checkpoint: {subject.model}", *rows]


def _speak(name: str, path: Path, folder: Path, subject: Subject, report: Report) -> str:
    """Speak all sentences with one checkpoint, write `NAME-i.wav`, and give a line of the table."""
    found = inspect_folder(path)
    assert not found.faults, found.faults
    engine = load_engine(path)
    assert engine.codec is not None
    rate, frames, seconds, audio_s, ended = engine.codec.sample_rate, 0, 0.0, 0.0, 0
    for number, text in enumerate(subject.sentences, 1):
        report(f"speaking with {name}", number - 1, len(subject.sentences))
        speech = engine.speak(Request(text=text, seed=number, max_frames=subject.max_frames))
        audio = engine.decode(speech.codes)
        write_wav(folder / f"{name}-{number}.wav", audio, rate)
        frames, seconds = frames + speech.codes.shape[1], seconds + speech.seconds
        audio_s, ended = audio_s + len(audio) / rate, ended + (speech.stop_reason == "end")
    factor = f"{seconds / audio_s:6.2f}" if audio_s else f"{'-':>6}"
    return (
        f"{name:12} {found.num_quantized:9} {found.num_bytes:12,} {frames:6} {audio_s:6.2f} s {factor} "
        f"{ended:>3}/{len(subject.sentences)}"
    )


def _evaluate(arms: Mapping[str, Path], out: Path, subject: Subject, report: Report) -> list[str]:
    """Run some of the suite with both and write the report; give lines of the table, or why there are none."""
    if not subject.num_utterances:
        return ["evaluation: left out, random weights speak no words"]
    absent = [name for name in LISTENERS if importlib.util.find_spec(name) is None]
    if absent:
        return [
            f"evaluation: left out, not installed: {', '.join(absent)}; pip install 's2quant[eval]' (eval/README.md)"
        ]
    if subject.recognizer is None:
        return ["evaluation: left out, models/whisper-mini/whisper-mini.pt is not there"]
    results = run_eval(
        EvalOptions(
            suite=ROOT / "eval" / "suites" / "mini-en.yaml",
            model=arms["w4a16"],
            baseline=arms["bf16"],
            out=out,
            limit=subject.num_utterances,
            seeds=(0,),
            asr_model=str(subject.recognizer),
        ),
        report,
    )
    assert results is not None  # one process
    report("writing the report", 0, 1)
    write_report(out)
    return [
        f"{'metric':28} {'bf16':>9} {'w4a16':>9}",
        *map(_metric, results["metrics"]),
        results["verdict"]["sentence"],
    ]


def _metric(row: Mapping[str, Any]) -> str:
    """One line of the table of metrics; a dash where an arm has no value."""
    both = (row.get("baseline"), row.get("model"))
    return f"{row['name']:28} " + " ".join(f"{'-':>9}" if value is None else f"{value:9.4f}" for value in both)
