"""The reference beside us: a fish-speech checkout on the same weights, prompt, frames and device, in the same run.

The checkout is the user's own; nothing of it is copied. It runs in a process of its own, with its folder first on the
path (`upstream_worker`), on links to the checkpoint's files and a config.json whose `max_seq_len` is what its caches
are to hold: it attends to all of them at every frame, so that this number decides how fast it is.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from s2quant.checkpoint.reader import open_checkpoint
from s2quant.errors import UserError
from s2quant.evaluate import upstream_worker
from s2quant.files import read_json, write_json
from s2quant.sampling import Sampling

Mode = Literal["eager", "compiled"]
MODES: tuple[Mode, ...] = ("eager", "compiled")
INFERENCE = Path("fish_speech/models/text2semantic/inference.py")
LOG_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """What is measured beside us.

    Args:
        checkout: A fish-speech checkout.
        positions: What its caches hold; no more than the model's own positions.
        modes: How its frame runs: as it is, or compiled by torch.
    """

    checkout: Path
    positions: int
    modes: tuple[Mode, ...] = ("compiled",)


def check_upstream(upstream: Upstream, folder: Path, needed_positions: int) -> None:
    """Refuse what cannot be measured, before anything is.

    Args:
        upstream: What is to be measured.
        folder: The checkpoint.
        needed_positions: Prompt and frames.

    Raises:
        UserError: The checkout is none, the checkpoint is quantized, or the positions are too few.
    """
    if not (upstream.checkout / INFERENCE).is_file():
        raise UserError(
            f"{upstream.checkout} has no {INFERENCE}", "a checkout of fish-speech 2", "clone it and name its folder"
        )
    if upstream.positions < needed_positions:
        raise UserError(
            f"{upstream.positions} positions for fish-speech's caches",
            f"{needed_positions} or more, for the prompt and the frames",
            "raise the positions, or time fewer frames",
        )
    if open_checkpoint(folder).is_quantized:
        raise UserError(
            f"{folder} is quantized, and fish-speech does not read that",
            "a bf16 checkpoint as the first --model",
            "name the bf16 folder first",
        )


def measure_upstream(
    upstream: Upstream,
    folder: Path,
    prompt: Tensor,
    *,
    num_frames: int,
    repeats: int,
    device: str,
    dtype: str,
    frame_s: float,
) -> list[dict[str, Any]]:
    """Time the checkout; batch 1, as it knows no other.

    Args:
        upstream: What is to be measured.
        folder: The checkpoint, bf16.
        prompt: int64 [1+N, T].
        num_frames: Frames per round.
        repeats: Timed rounds; one more is warm-up, in which it compiles.
        device: Where to run.
        dtype: "bfloat16" or "float32".
        frame_s: Sound of a frame in seconds.

    Returns:
        One row per mode: mode, commit (None when the checkout has no git), torch, positions, load_s, warmup_s,
        ms_per_frame, ar_rtf, prefill_s, peak_device_bytes, best_first_code (the likeliest semantic code after the
        prompt: who has the same weights finds the same, but for rounding), samples (ar_s of every round). Times are
        medians.

    Raises:
        UserError: The checkout cannot be run: what it lacks, or what it said last.
    """
    check_upstream(upstream, folder, prompt.shape[1] + num_frames)
    rows = []
    with tempfile.TemporaryDirectory(prefix="upstream-") as name:
        scratch = Path(name)
        model = _linked(folder, scratch / "model", upstream.positions)
        np.save(scratch / "prompt.npy", prompt.numpy().astype(np.int32))
        for mode in upstream.modes:
            job = {
                "checkout": str(upstream.checkout.resolve()),
                "folder": str(model),
                "prompt": str(scratch / "prompt.npy"),
                "device": device,
                "dtype": dtype,
                "compiled": mode == "compiled",
                "num_frames": num_frames,
                "repeats": repeats,
                "temperature": Sampling().temperature,
                "top_p": Sampling().top_p,
                "top_k": Sampling().top_k,
                "out": str(scratch / f"{mode}.json"),
            }
            answer = _run(job, scratch)
            rows.append({"mode": mode, "commit": _commit(upstream.checkout)} | _row(answer, num_frames, frame_s))
    return rows


def _linked(folder: Path, model: Path, positions: int) -> Path:
    """Make a folder of links with another max_seq_len; its name switches on none of the checkout's quantizers."""
    model.mkdir()
    for path in folder.resolve().iterdir():
        if path.name != "config.json":
            (model / path.name).symlink_to(path)
    config = read_json(folder / "config.json")
    config["text_config"] = config["text_config"] | {
        "max_seq_len": min(positions, config["text_config"].get("max_seq_len", positions))
    }
    write_json(model / "config.json", config)
    return model


def _run(job: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    write_json(scratch / "job.json", job)
    words = [sys.executable, "-P", upstream_worker.__file__, str(scratch / "job.json")]
    with (scratch / "log").open("w+b") as log:
        status = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        log.seek(0)
        said = log.read().decode(errors="replace").replace("\r", "\n").strip().splitlines()
    if status != 0:
        last = "\n".join(["", *said[-LOG_LINES:]])
        raise UserError(
            f"{job['checkout']} ended with status {status}:{last}",
            "a checkout that runs in this environment",
            "run it by itself, or leave --against out",
        )
    answer = read_json(Path(job["out"]))
    if "missing" in answer:
        raise UserError(
            f"{job['checkout']} imports what is not installed: {', '.join(answer['missing'])}",
            "its packages beside s2quant's",
            f"pip install {' '.join(answer['missing'])}",
        )
    return answer


def _row(answer: Mapping[str, Any], num_frames: int, frame_s: float) -> dict[str, Any]:
    prefill_s = statistics.median(prefill for prefill, _ in answer["rounds"])
    ar_s = statistics.median(ar for _, ar in answer["rounds"])
    return {
        "torch": answer["torch"],
        "positions": answer["positions"],
        "load_s": answer["load_s"],
        "warmup_s": answer["warmup_s"],
        "ms_per_frame": 1e3 * ar_s / (num_frames - 1),
        "ar_rtf": (prefill_s + ar_s) / (num_frames * frame_s),
        "prefill_s": prefill_s,
        "peak_device_bytes": answer["peak_device_bytes"],
        "best_first_code": answer["best_first_code"],
        "samples": [ar for _, ar in answer["rounds"]],
    }


def _commit(checkout: Path) -> str | None:
    """Name the checkout's commit; None where its files are only a part of another repository, or of none."""
    words = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    top, head = done.stdout.splitlines()
    return head if Path(top).resolve() == checkout.resolve() else None
