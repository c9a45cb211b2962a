"""Time a fish-speech checkout; run as a script in a process of its own, which imports nothing of s2quant.

    python -P upstream_worker.py JOB.json

JOB.json names: checkout, folder, prompt (a .npy of int32 [1+N, T]), device, dtype, compiled, num_frames, repeats,
temperature, top_p, top_k, out. The answer goes to `out`; what is missing or goes wrong as {"missing": [...]} or as an
exception. Model, frame and loop are the checkout's own; all that is done here is to leave im_end out of what may be
drawn, so that every round has the same number of frames, to bring the prompt, and to look at the clock.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

NEEDED = ("click", "einops", "loguru", "loralib", "numpy", "torch", "tqdm", "transformers", "safetensors")
INFERENCE = "fish_speech.models.text2semantic.inference"


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Do what the job says.

    Args:
        job: See above.

    Returns:
        What goes to `out`.
    """
    sys.path.insert(0, job["checkout"])
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return {"missing": missing}
    try:
        upstream = importlib.import_module(INFERENCE)
    except ModuleNotFoundError as error:
        return {"missing": [error.name or str(error)]}
    found = Path(str(upstream.__file__))
    assert found.is_relative_to(job["checkout"]), found
    import torch

    with torch.inference_mode():
        return _measure(upstream, torch, job)


def _measure(upstream: Any, torch: Any, job: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    clock = _Clock(torch, device)
    model, decode_one = upstream.init_model(job["folder"], device, dtype, compile=job["compiled"])
    load_s = clock.lap()
    with torch.device(device):
        model.setup_caches(max_batch_size=1, max_seq_len=model.config.max_seq_len, dtype=dtype)
    prompt = torch.from_numpy(np.load(job["prompt"])).to(device)
    may_follow = torch.full((1, 1, model.config.vocab_size), float("-inf"), device=device, dtype=dtype)
    may_follow[..., model.config.semantic_begin_id : model.config.semantic_end_id + 1] = 0.0  # and not im_end
    sampling = {
        "temperature": torch.tensor(job["temperature"], device=device, dtype=dtype),
        "top_p": torch.tensor(job["top_p"], device=device, dtype=dtype),
        "top_k": job["top_k"],
        "semantic_logit_bias": may_follow,
        "audio_masks": None,
        "audio_parts": None,
    }
    clock.lap()
    where = torch.arange(prompt.shape[1], device=device)
    best = upstream.decode_one_token_ar(model=model, x=prompt[None], input_pos=where, **sampling | {"top_k": 1})
    clock.lap()
    warmup_s, rounds = 0.0, []
    for turn in range(1 + job["repeats"]):  # turn 0 is the warm-up: it compiles
        prefill_s, ar_s, frames = _round(upstream, torch, model, decode_one, prompt, sampling, job["num_frames"], clock)
        if turn:
            rounds.append([prefill_s, ar_s])
        else:
            warmup_s = prefill_s + ar_s
        assert frames == job["num_frames"], frames
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "torch": torch.__version__,
        "positions": model.config.max_seq_len,
        "load_s": load_s,
        "warmup_s": warmup_s,
        "rounds": rounds,
        "peak_device_bytes": peak,
        "best_first_code": int(best[0, 0]) - model.config.semantic_begin_id,
    }


def _round(
    upstream: Any, torch: Any, model: Any, decode_one: Any, prompt: Any, sampling: Any, num_frames: int, clock: _Clock
) -> tuple[float, float, int]:
    """Speak once: seconds to the first frame, seconds of the frames after it, frames."""
    length, device = prompt.shape[1], prompt.device
    clock.lap()
    where = torch.arange(length, device=device)
    first = upstream.decode_one_token_ar(model=model, x=prompt[None], input_pos=where, **sampling)
    prefill_s = clock.lap()
    more = upstream.decode_n_tokens(
        model=model,
        cur_token=first.view(1, prompt.shape[0], -1),
        input_pos=torch.tensor([length], device=device, dtype=torch.int),
        num_new_tokens=num_frames - 1,
        decode_one_token=decode_one,
        **sampling,
    )
    return prefill_s, clock.lap(), 1 + more.shape[1]


class _Clock:
    """Seconds between looks, the device waited for at each."""

    def __init__(self, torch: Any, device: Any) -> None:
        self._wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Look.

        Returns:
            Seconds since the last look.
        """
        self._wait()
        before, self._last = self._last, time.perf_counter()
        return self._last - before


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(job["out"]).write_text(json.dumps(main(job)), encoding="utf-8")
