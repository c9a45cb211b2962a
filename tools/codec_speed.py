"""Time the codec on a GPU, with one kernel between two convolutions (`Codec.fused`) and without.

    python tools/codec_speed.py MODEL --out FILE.json [--sizes 1x4,1x64,8x64,...] [--repeats 10] [--seconds 10]

Legend: B streams, F frames of a chunk.

A size BxF is `CodecStream.step` of B streams that have begun, by F frames: the median of the repeats, with what the
device holds at most beyond what it held before, and the signal-to-noise ratio of the first and second chunk against
plain decoding without TF32. Then a first chunk by its graph, and the encoding of a voice of that many seconds, with
the share of codes that plain encoding without TF32 gives. The ways take turns, size by size, on one machine. Exit
status 1: the kernels cannot run, or are more than LOSS_DB further from exact decoding than the plain way at its worst
size; FILE.json says where. `--device cpu` tries the script itself; with TRITON_INTERPRET=1 the kernels, too.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from s2quant.codec import Codec, CodecStream, load_codec
from s2quant.gpu import kernel_obstacle
from s2quant.runtime.chunk_graphs import FIRST_CHUNK_FRAMES, ChunkGraphs

SIZES = "1x4,1x64,8x64,32x16,64x8,64x4"
WAYS = {"plain": False, "fused": True}
LOSS_DB = 1.0  # of two ways that both round to TF32; cuDNN chooses anew for every size, so from the worst of them


def random_codes(codec: Codec, batch: int, frames: int, seed: int) -> Tensor:
    """Draw codes on the codec's device, int64 [B, N, F]."""
    generator = torch.Generator().manual_seed(seed)
    books = [torch.randint(0, size, (batch, frames), generator=generator) for size in codec.config.codebook_sizes]
    return torch.stack(books, dim=1).to(codec.device)


def snr_db(ours: Tensor, exact: Tensor) -> float | None:
    """Give the signal-to-noise ratio; None where there is no noise."""
    noise = float((ours.double() - exact.double()).square().sum())
    return 10 * math.log10(float(exact.double().square().sum()) / noise) if noise else None


class Bench:
    """One codec, timed in both ways."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.codec = load_codec(options.model, options.device)
        self.repeats = options.repeats
        self.cuda = self.codec.device.type == "cuda"
        self.obstacle = kernel_obstacle(self.codec.device)
        self.ways = {name: fused for name, fused in WAYS.items() if not fused or self.obstacle is None}

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def exact(self, work: Callable[[], Tensor]) -> Tensor:
        """Do it in the plain way, without TF32."""
        before, self.codec.fused = torch.backends.cudnn.allow_tf32, False
        torch.backends.cudnn.allow_tf32 = False
        try:
            return work()
        finally:
            torch.backends.cudnn.allow_tf32 = before

    def timed(self, work: Callable[[], Tensor]) -> dict[str, float]:
        """Time what has been done before: the median, and the most bytes it held."""
        held = 0
        self.wait()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        work()
        self.wait()
        seconds = []
        for _ in range(self.repeats):
            began = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - began)
        found = {"ms": 1e3 * statistics.median(seconds), "least_ms": 1e3 * min(seconds)}
        return found | ({"peak_bytes": torch.cuda.max_memory_allocated() - held} if self.cuda else {})

    def chunk(self, batch: int, frames: int) -> dict[str, Any]:
        """Time chunks of one size."""
        codes = [random_codes(self.codec, batch, frames, seed) for seed in range(2)]

        def sound() -> Tensor:
            stream = CodecStream(self.codec, batch)
            return torch.cat([stream.step(part) for part in codes], dim=-1)

        exact = self.exact(sound)
        row: dict[str, Any] = {"streams": batch, "frames": frames}
        for name, fused in self.ways.items():
            self.codec.fused = fused
            ratio, finite = snr_db(sound(), exact), bool(torch.isfinite(sound()).all())
            stream = CodecStream(self.codec, batch)
            stream.step(codes[0])
            row[name] = self.timed(lambda stream=stream: stream.step(codes[1])) | {"snr_db": ratio, "finite": finite}
            audio_s = batch * frames * self.codec.frame_size / self.codec.sample_rate
            row[name]["audio_s_per_s"] = 1e3 * audio_s / row[name]["ms"]
        return row

    def first_chunk(self) -> dict[str, Any]:
        """Time a first chunk by its graph; without graphs on a CPU."""
        codes = random_codes(self.codec, 1, FIRST_CHUNK_FRAMES, 0)
        exact = self.exact(lambda: CodecStream(self.codec).step(codes))
        row: dict[str, Any] = {"first_chunk_frames": FIRST_CHUNK_FRAMES}
        for name, fused in self.ways.items():
            self.codec.fused = fused
            graphs = ChunkGraphs(self.codec)
            self.wait()
            ratio = snr_db(graphs.push(CodecStream(self.codec), codes).clone(), exact)
            row[name] = self.timed(lambda graphs=graphs: graphs.push(CodecStream(self.codec), codes))
            row[name]["snr_db"] = ratio
        return row

    def voice(self, seconds: float) -> dict[str, Any]:
        """Time the encoding of noise."""
        samples = max(1, round(seconds * self.codec.sample_rate))
        wav = 0.1 * torch.randn(1, 1, samples, generator=torch.Generator().manual_seed(0)).to(self.codec.device)
        exact = self.exact(lambda: self.codec.encode(wav))
        row: dict[str, Any] = {"voice_s": seconds}
        for name, fused in self.ways.items():
            self.codec.fused = fused
            share = float((self.codec.encode(wav) == exact).float().mean())
            row[name] = self.timed(lambda: self.codec.encode(wav)) | {"codes_as_exact": share}
        return row

    def upsampling(self, batch: int, frames: int) -> list[dict[str, Any]]:
        """Time each transposed convolution of the decoder in forms that differ in the lengths that cuDNN sees.

        two_taps is what is used: T columns to T + 1. even: T + 1 to T. long: T + 3 to T + 4. one_tap: T to T, of twice
        the channels.
        """
        rows, columns = [], frames * math.prod(self.codec.config.downsample_factors)
        for block in self.codec.decoder.model[1:-2]:
            layer = block.block[1]
            taps, weight, stride = layer.two_taps(), layer.conv.weight, layer.stride
            x = torch.randn(batch, weight.shape[0], columns, device=self.codec.device)
            before, behind, twice = F.pad(x, (1, 0)), F.pad(x, (0, 3)), torch.cat([x, x], dim=1)
            flat = taps.transpose(1, 2).flatten(1)[..., None].contiguous()
            forms: dict[str, Callable[[], Tensor]] = {
                "transposed": lambda x=x, weight=weight, stride=stride: F.conv_transpose1d(x, weight, None, stride),
                "two_taps": lambda x=x, taps=taps: F.conv1d(x, taps, padding=1),
                "even": lambda x=before, taps=taps: F.conv1d(x, taps),
                "long": lambda x=behind, taps=taps: F.conv1d(x, taps, padding=1),
                "one_tap": lambda x=twice, taps=flat: F.conv1d(x, taps),
            }
            row: dict[str, Any] = {"upsampling": stride, "streams": batch, "frames": frames}
            rows.append(row | {f"{name}_ms": self.timed(form)["ms"] for name, form in forms.items()})
            columns *= stride
        return rows


def faults(rows: list[dict[str, Any]], obstacle: str | None) -> list[str]:
    """List what must not be."""
    found = [obstacle] if obstacle else []
    known = [row["plain"]["snr_db"] for row in rows if row.get("plain", {}).get("snr_db") is not None]
    worst = min(known, default=math.inf)
    for row in rows:
        where = ", ".join(f"{name} {value}" for name, value in row.items() if name not in WAYS)
        found += [f"{where}: {name} is not finite" for name in WAYS if row.get(name, {}).get("finite") is False]
        plain, fused = (row.get(name, {}).get("snr_db") for name in WAYS)
        if plain is not None and fused is not None and not fused >= worst - LOSS_DB:
            found.append(f"{where}: {fused:.1f} dB from exact decoding, the plain way {plain:.1f}")
    return found


@torch.no_grad()
def main() -> int:
    """Run all sizes."""
    parser = argparse.ArgumentParser(description="Time the codec with its kernels and without.")
    parser.add_argument("model", type=Path, help="a folder with codec.pth, or such a file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", default=SIZES, help="streams x frames")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a voice that is encoded")
    options = parser.parse_args()
    sizes = [tuple(int(number) for number in size.split("x")) for size in options.sizes.split(",")]
    bench = Bench(options)
    facts: dict[str, Any] = {"model": options.model.name, "torch": torch.__version__, "obstacle": bench.obstacle}
    facts["device"] = torch.cuda.get_device_name(bench.codec.device) if bench.cuda else "cpu"
    rows: list[dict[str, Any]] = []
    for make in (
        *(lambda size=size: [bench.chunk(*size)] for size in sizes),
        lambda: [bench.first_chunk()],
        lambda: [bench.voice(options.seconds)],
        lambda: bench.upsampling(*max(sizes, key=math.prod)),
    ):
        for row in make():
            rows.append(row)
            print(json.dumps(row), flush=True)
    facts["faults"] = faults(rows, bench.obstacle if bench.cuda else None)
    options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print(json.dumps(facts))
    return int(bool(facts["faults"]))


if __name__ == "__main__":
    sys.exit(main())
