"""A made-up evaluation folder: tones as audio, figures drawn by a seed. For tests and for looking at the page only."""

import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 44100
TEXTS = [
    ("en", "The harbour was quiet, and nobody had told the gulls."),
    ("en", "[laughing] You bought how many lemons? [sighs] Never mind."),
    ("de", "Die Bahn faehrt heute ausnahmsweise puenktlich ab."),
    ("zh", "\u4eca\u5929\u7684\u5929\u6c14\u5f88\u597d"),
    ("ar", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643\u0645 \u0641\u064a \u0627\u0644\u0645\u062f\u064a\u0646\u0629"),
    ("en", "Seven of the nine bridges were closed before the storm, which then turned north and missed the city."),
]
KINDS = [
    "no_end",
    "empty",
    "truncated",
    "run_on",
    "repeated_words",
    "repeated_codes",
    "long_silence",
    "clipping",
    "not_finite",
]


def tone(seconds: float, hertz: float, seed: int) -> np.ndarray:
    """A wobbling harmonic tone with gaps, float32 [S]."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    phase = 2 * np.pi * np.cumsum(hertz * (1 + 0.15 * np.sin(2 * np.pi * 2.3 * t + seed))) / RATE_HZ
    wave = sum(np.sin(k * phase) / k for k in range(1, 12))
    gate = np.clip(4 * np.sin(2 * np.pi * 3.1 * t + rng.uniform(0, 6)), 0, 1)
    return (0.15 * wave * gate + 0.002 * rng.standard_normal(len(t))).astype(np.float32)


def write_audio(path: Path, seconds: float, hertz: float, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, hertz, seed), RATE_HZ, subtype="PCM_16")


def asr(text: str, lang: str, num_wrong: int, draw: random.Random) -> dict:
    """A transcript with so many errors: one substitution, then deletions and insertions."""
    said = list(text) if lang == "zh" else text.lower().replace(",", "").replace(".", "").split()
    chunks, counts = [], {"substitutions": 0, "deletions": 0, "insertions": 0}
    wrong = set(draw.sample(range(len(said)), min(num_wrong, len(said))))
    for place, word in enumerate(said):
        kind = (
            ("substitutions", "deletions", "insertions")[len(wrong & set(range(place))) % 3] if place in wrong else None
        )
        if kind:
            counts[kind] += 1
        if kind == "substitutions":
            chunks.append(["substitute", [word], ["blue"]])
        elif kind == "deletions":
            chunks.append(["delete", [word], []])
        else:
            chunks.append(["equal", [word], [word]])
            if kind:
                chunks.append(["insert", [], ["then"]])
    heard = [word for chunk in chunks for word in chunk[2]]
    glue = "" if lang == "zh" else " "
    return {
        "backend": "whisper:0a1b2c3d4e5f",
        "normalizer": "whisper-basic",
        "unit": "character" if lang == "zh" else "word",
        "hypothesis": glue.join(heard),
        "reference_norm": glue.join(said),
        "hypothesis_norm": glue.join(heard),
        "hits": len(said) - counts["substitutions"] - counts["deletions"],
        **counts,
        "alignment": chunks,
    }


def record(folder: Path, arm: str, number: int, seed: int, draw: random.Random) -> dict:
    lang, text = TEXTS[number % len(TEXTS)]
    utt = f"sample-{number:03d}"
    hertz = {"baseline": 140, "model": 150, "floor": 140}[arm] + 4 * number
    seconds = round(0.7 + 0.04 * number + draw.uniform(0, 0.4), 3)
    audio = f"audio/{arm}/{utt}-{seed}.wav"
    write_audio(folder / audio, seconds, hertz, seed)
    bad = arm == "model" and number % 5 == 1
    flags = dict.fromkeys(KINDS, False) | {"no_end": bad and seed == 0, "repeated_words": bad}
    return {
        "record_version": 1,
        "suite": "sample",
        "suite_version": 1,
        "arm": arm,
        "utt": utt,
        "seed": seed,
        "lang": lang,
        "text": text,
        "reference": text,
        "has_tags": "[" in text,
        "prompt_id": "tone-1",
        "prompt_audio": "audio/prompt/tone-1.wav",
        "audio": audio,
        "codes": None,
        "num_frames": int(seconds * 21.5),
        "audio_s": seconds,
        "stop_reason": "limit" if bad and seed == 0 else "end",
        "num_prompt_tokens": 31,
        "wall_s": 1.2,
        "error": None,
        "asr": asr(text, lang, 3 if bad else int(draw.random() < 0.2), draw),
        "sim": {
            "backend": "resemblyzer:beefbeefbeef",
            "to_prompt": round(draw.uniform(0.7, 0.9), 3),
            "to_baseline": None if arm == "baseline" else round(draw.uniform(0.8, 0.95), 3),
        },
        "failures": flags,
        "duration_ratio": 1.02,
        "tokens": {"num_frames": 20, "kl_semantic": 0.0123},
    }


def metric(name, unit, better, backend, values, delta, interval, floor, floor_interval, mde, margin, verdict) -> dict:
    return {
        "name": name,
        "unit": unit,
        "better": better,
        "backend": backend,
        "baseline": values[0],
        "model": values[1],
        "floor": values[2],
        "delta": delta,
        "interval": interval,
        "floor_delta": floor,
        "floor_interval": floor_interval,
        "n": 600,
        "num_clusters": 200,
        "mde": mde,
        "margin": margin,
        "verdict": verdict,
    }


def metrics() -> list[dict]:
    whisper, voice = "whisper:0a1b2c3d4e5f", "resemblyzer:beefbeefbeef"
    return [
        metric(
            "WER (corpus)",
            "fraction",
            "lower",
            whisper,
            (0.0104, 0.0114, 0.0107),
            0.001,
            [-0.0021, 0.004],
            0.0003,
            [-0.0018, 0.0025],
            0.0031,
            0.005,
            "non-inferior",
        ),
        metric(
            "WER (mean)",
            "fraction",
            "lower",
            whisper,
            (0.0112, 0.0121, 0.0115),
            0.0009,
            [-0.0025, 0.0041],
            0.0003,
            [-0.002, 0.0027],
            0.0034,
            None,
            None,
        ),
        metric(
            "SIM to prompt",
            "cosine",
            "higher",
            voice,
            (0.842, 0.829, 0.841),
            -0.013,
            [-0.021, -0.006],
            -0.001,
            [-0.006, 0.004],
            0.008,
            0.02,
            "inconclusive",
        ),
        metric(
            "SIM to baseline",
            "cosine",
            "higher",
            voice,
            (None, 0.897, 0.902),
            -0.005,
            [-0.011, 0.001],
            None,
            None,
            0.007,
            None,
            None,
        ),
        metric(
            "Duration ratio",
            "ratio",
            "lower",
            None,
            (1.0, 1.012, 1.003),
            0.012,
            [0.001, 0.022],
            0.003,
            [-0.008, 0.013],
            None,
            None,
            None,
        ),
    ]


def tokens() -> dict:
    books = []
    for n in range(10):
        kl = 0.012 * (1 + 0.35 * n)
        books.append(
            {
                "codebook": n,
                "kl_mean": kl,
                "kl_median": 0.5 * kl,
                "kl_p90": 2.1 * kl,
                "floor_kl_mean": 0.0011,
                "top1_agreement": 0.965 - 0.013 * n,
                "delta_nll": 0.004 * (n % 4) - 0.002,
                "kl_own_hidden": None if n == 0 else kl,
                "kl_baseline_hidden": None if n == 0 else 0.2 * kl,
            }
        )
    edges = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    buckets = [
        {"low": low, "high": high, "n": 900 - 100 * i, "kl_mean": 0.03 / (i + 1), "top1_agreement": 0.82 + 0.035 * i}
        for i, (low, high) in enumerate(itertools.pairwise(edges))
    ]
    return {
        "codebooks": books,
        "confidence": buckets,
        "num_frames": 34210,
        "im_end": {"baseline_at_end": 0.871, "model_at_end": 0.858, "baseline_before": 0.0031, "model_before": 0.0034},
        "layer_groups": [group(0, 11), group(12, 23), group(24, 35), group(0, 3, "fast")],
    }


def group(first: int, last: int, part: str = "slow") -> dict:
    kl = 0.0 if part == "fast" else 0.002 * (1 + first)
    return {
        "name": part if part == "fast" else f"slow {first}-{last}",
        "part": part,
        "layers": list(range(first, last + 1)),
        "num_quantized": 0 if part == "fast" else 57,
        "n": 34210,
        "kl_semantic": kl,
        "kl_semantic_p90": 2 * kl,
        "top1_agreement": 1 - kl,
        "kl_residual": [kl * n for n in range(1, 10)],
        "kl_residual_mean": 5 * kl,
        "im_end": {"model_at_end": 0.871 - kl, "model_before": 0.0031 + kl / 100},
    }


def speed() -> dict:
    rows = []
    for concurrency in (1, 8):
        for arm, ms in (("baseline", 31.0), ("model", 17.5)):
            ms_frame = ms / concurrency**0.6
            rows.append(
                {
                    "arm": arm,
                    "concurrency": concurrency,
                    "ms_per_frame": ms_frame,
                    "rtf": ms_frame * 0.02153,
                    "first_audio_s": 0.21 + 0.01 * concurrency,
                    "frames_per_s": 1000 / ms_frame,
                    "audio_s_per_s": 46.4 / ms_frame,
                    "peak_device_bytes": None if arm == "model" else 11_200_000_000,
                    "stages_s": {"encode": 0.041, "ar": 0.02 * ms_frame, "codec": 0.13},
                }
            )
    return {"device": "one made-up accelerator", "rows": rows, "warmup_s": 12.4}


def breakdown() -> dict:
    def group(name, n, delta, half):
        return {
            "group": name,
            "n": n,
            "baseline": 0.011,
            "model": 0.011 + delta,
            "delta": delta,
            "interval": [delta - half, delta + half],
        }

    return {
        "lang": [
            group("en", 300, 0.001, 0.003),
            group("de", 100, -0.002, 0.005),
            group("zh", 100, 0.004, 0.006),
            group("ar", 100, 0.0, 0.0),
        ],
        "length": [
            group("under 3 s", 200, 0.0, 0.004),
            group("3 to 6 s", 300, 0.001, 0.003),
            group("over 6 s", 100, 0.003, 0.004),
        ],
        "tags": [group("with tags", 100, 0.002, 0.006), group("without tags", 500, 0.001, 0.002)],
    }


def results() -> dict:
    rows = [
        {
            "kind": kind,
            "mcnemar_p": 1.0 if i % 3 else 0.25,
            "arms": {
                arm: {"count": (i * k) % 4, "n": 600, "interval": [0.0, 0.0061]}
                for k, arm in enumerate(("baseline", "model", "floor"), 1)
            },
        }
        for i, kind in enumerate(KINDS)
    ]
    arms = {
        "baseline": {
            "path_name": "s2-pro-bf16",
            "tensor_bytes": 9_120_000_000,
            "quantized": 0,
            "dense": 201,
            "bits": "16",
        },
        "model": {
            "path_name": "s2-pro-w4a16",
            "tensor_bytes": 4_238_063_616,
            "quantized": 171,
            "dense": 30,
            "bits": "4",
        },
    }
    arms["floor"] = arms["baseline"]
    sentence = (
        "non-inferior at 0.5 points of WER: delta +0.10 [-0.21, +0.40] points, n = 600, "
        "smallest detectable difference 0.31"
    )
    return {
        "results_version": 1,
        "suite": {
            "name": "sample",
            "version": 1,
            "sha256": "5e" * 32,
            "num_utterances": 200,
            "seeds": [0, 1, 2],
            "sampling": {"temperature": 0.8, "top_p": 0.8, "top_k": 30},
            "asr": "whisper:0a1b2c3d4e5f",
            "normalizer": "whisper-basic",
            "similarity": "resemblyzer:beefbeefbeef",
        },
        "arms": arms,
        "verdict": {
            "passed": True,
            "sentence": sentence,
            "gates": [
                {"name": "WER", "value": 0.004, "limit": 0.005, "passed": True},
                {"name": "failures", "value": 0.002, "limit": 0.01, "passed": True},
            ],
        },
        "metrics": metrics(),
        "failures": rows,
        "tokens": tokens(),
        "speed": speed(),
        "breakdown": breakdown(),
        "worst": [],
        "provenance": {
            "manifest_version": 1,
            "stage": "eval",
            "seed": None,
            "device": "one made-up accelerator",
            "versions": {"torch": "2.13.0", "numpy": "2.2.6", "jiwer": None},
            "s2quant_commit": "0123456789abcdef" * 2,
            "inputs": {"model": {"model.safetensors": "ab" * 32}},
        },
    }


def write_sample(folder: Path, num_utterances: int = 24, num_worst: int = 20) -> Path:
    """Write records.jsonl, results.json and audio of a made-up run; returns the folder."""
    draw = random.Random(0)
    write_audio(folder / "audio/prompt/tone-1.wav", 1.5, 130, 99)
    seeds = {"baseline": (0, 1), "model": (0, 1), "floor": (10, 11)}
    records = [
        record(folder, arm, n, seed, draw) for arm in seeds for n in range(num_utterances) for seed in seeds[arm]
    ]
    found = results()
    worst = sorted(
        (r for r in records if r["arm"] == "model"), key=lambda r: -r["asr"]["substitutions"] - r["asr"]["deletions"]
    )
    found["worst"] = [[r["utt"], r["seed"]] for r in worst[:num_worst]]
    save(folder, records, found)
    return folder


def save(folder: Path, records: list[dict], found: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
    )
    (folder / "results.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    write_sample(Path(sys.argv[1]))
