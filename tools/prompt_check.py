"""Check and time prompts read by graphs (`s2quant.runtime.prompt_graphs`) on one GPU, with one checkpoint.

    python tools/prompt_check.py MODEL --out FILE.json [--kernels 256/256,512/64] [--most 64] [--lengths 1,15,...]
        [--together 8,32]

Legend: T positions, N codebooks, C columns that may follow in speech.

Slot 0 reads a prompt the eager way, slots 1 and 2 by graphs, slot 2 two times more the eager way: in two pieces, and
with more positions behind it, which is what padding does to the sizes of matrix products. How far eager readings are
apart is what rounding does; graphs may be twice as far apart from slot 0 as the worst of these (2^-8 at least, a bf16
number's own precision). What else must hold is exact: a graph writes the same bits in every slot and every time, and
touches no slot but its own and nothing before the positions it reads. (The hidden vector and the logits are those of
one more position, read the eager way, which on a GPU does not give the same bits every time: "eager_again".) Exit
status 1: it is not so, and FILE.json says for which prompts.

`--together 8,32` also seats so many prompts behind a prefix that is kept, and reads them one by one and together: how
long both take, and whether all keys and values have the same bits (on a GPU: in Triton's interpreter a row's last bit
depends on where it stands). `--device cpu` tries the script itself, with pieces but no graphs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from s2quant.checkpoint.config import S2Config
from s2quant.runtime.fast import FastDecoder
from s2quant.runtime.fused import FusedFrame
from s2quant.runtime.load import load_model
from s2quant.runtime.prefix import PrefixCache, read_prompt
from s2quant.runtime.prompt_graphs import KERNEL_PIECE, MOST_PIECE, PromptReader, pieces
from s2quant.sampling import Sampling

LENGTHS, STARTS, MOSTS = "1,15,16,17,63,64,65,200,300,513,1300", "0,7,130", "64"
PREFIX = 130  # positions that prompts read together share
PARTS = ("keys", "values", "hidden", "logits")
LEAST, TIMES = 2**-8, 2.0  # what graphs may be apart: this, or so many times what eager readings are


def random_prompt(config: S2Config, length: int) -> Tensor:
    """Draw text and frames by turns of 20, int64 [1+N, T]."""
    generator = torch.Generator().manual_seed(length)
    size = min(1024, config.codebook_size)
    codes = torch.randint(0, size, (config.num_codebooks, length), generator=generator)
    text = torch.randint(0, min(1000, config.semantic_begin_id), (length,), generator=generator)
    is_frame = torch.arange(length) // 20 % 2 == 1
    ids = torch.where(is_frame, codes[0] + config.semantic_begin_id, text)
    return torch.cat([ids[None], codes * is_frame])


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Give the root mean square of the difference, relative to theirs."""
    wide = theirs.float()
    return float((ours.float() - wide).square().mean().sqrt() / wide.square().mean().sqrt().clamp(min=1e-30))


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Say what has not the same bits, and how far it is apart."""
    return {part: apart(ours[part], theirs[part]) for part in PARTS if not torch.equal(ours[part], theirs[part])}


class Readings:
    """One decoder, read into in all ways."""

    def __init__(self, options: argparse.Namespace, most_positions: int) -> None:
        self.model = load_model(options.model, options.device, torch.bfloat16, options.linears)
        self.decoder = FastDecoder(self.model, 3, most_positions, 1024, prompt_graphs=True)
        cuda = self.decoder.device.type == "cuda"
        self.wait = torch.cuda.synchronize if cuda else lambda: None
        for slot in range(3):
            generator = torch.Generator(self.decoder.device).manual_seed(slot)
            self.decoder.seat(slot, generator, Sampling(), ignore_end=True)
        self.readers: dict[str, PromptReader] = {}
        for most in dict.fromkeys((MOST_PIECE, *options.mosts)):
            self.readers[str(most)] = self.reader(most)
        in_use = [(KERNEL_PIECE, KERNEL_PIECE)] if self.decoder.fused_obstacle is None else []
        for most, rows in in_use if options.kernels is None else options.kernels:
            fused = FusedFrame(self.model, 3, 1024, self.decoder.max_positions, prompt_rows=rows)
            self.readers[f"{most}, kernels {rows}"] = self.reader(most, fused)

    def reader(self, most: int, fused: FusedFrame | None = None) -> PromptReader:
        """Make a reader of pieces of a size at most."""
        decoder = self.decoder
        return PromptReader(
            self.model.slow,
            decoder.cache,
            decoder._context_bucket,
            decoder.graphs_wanted,
            decoder._pool,
            most,
            fused,
        )

    def read(self, slot: int, tokens: Tensor, held: int, reader: PromptReader | None) -> float:
        """Read a prompt behind what slot 0 holds; the seconds until the device has done it."""
        if slot and held:
            self.decoder.cache.write(slot, *self.decoder.cache.copy(0, held))
        self.decoder.reader = reader
        self.wait()
        began = time.perf_counter()
        self.decoder.begin(slot, tokens, 0, held)
        self.wait()
        return time.perf_counter() - began

    def found(self, slot: int, tokens: Tensor, start: int) -> dict[str, Tensor]:
        """Give what a prompt has left: keys and values from `start` on, the first frame's hidden vector and logits."""
        cache, slow, length = self.decoder.cache, self.model.slow, tokens.shape[1]
        keys, values = (part[:, :, start:] for part in cache.copy(slot, length - 1))
        x = read_prompt(slow, cache, slot, tokens, held=length - 1)
        assert x is not None
        hidden = slow.norm(x[:, -1])
        return {"keys": keys, "values": values, "hidden": hidden, "logits": slow.constrained_logits(hidden)}

    def rounding(self, tokens: Tensor, start: int, eager: dict[str, Tensor]) -> dict[str, float]:
        """Say how far what slot 2 holds is apart from another eager reading."""
        return {part: apart(value, eager[part]) for part, value in self.found(2, tokens, start).items()}


@torch.inference_mode()
def case(readings: Readings, count: int, start: int, repeats: int) -> dict[str, Any]:
    """Read one prompt in all ways."""
    decoder, tokens = readings.decoder, random_prompt(readings.model.config, start + count + 1)
    if start:
        readings.read(0, tokens[:, : start + 1], 0, None)
    eager_s = [readings.read(0, tokens, start, None) for _ in range(1 + repeats)][1:]
    eager = readings.found(0, tokens, start)
    row: dict[str, Any] = {"positions": count, "start": start, "eager_ms": 1e3 * statistics.median(eager_s)}
    row["eager_again"] = differing(readings.found(0, tokens, start), eager)
    readings.read(0, tokens, start, None)
    row["eager_read_again"] = differing(readings.found(0, tokens, start), eager)
    readings.read(2, tokens, start, None)
    row["eager_other_slot"] = differing(readings.found(2, tokens, start), eager)
    before = decoder.cache.copy(0, start + count)
    row["graphs"] = {}
    for most, reader in readings.readers.items():
        first_s = readings.read(1, tokens, start, reader)
        mine = readings.found(1, tokens, start)
        seconds = [readings.read(2, tokens, start, reader) for _ in range(repeats)]
        again = readings.found(2, tokens, start)
        row["graphs"][most] = {
            "first_ms": 1e3 * first_s,
            "ms": 1e3 * statistics.median(seconds),
            "apart": {part: apart(mine[part], eager[part]) for part in PARTS},
            "same_bits": not {"keys", "values"} & set(differing(again, mine)),
            "differing": differing(again, mine),
            "held_untouched": all(
                torch.equal(one[:, :, :start], other[:, :, :start])
                for one, other in zip(decoder.cache.copy(2, start + count), before, strict=True)
            ),
            "others_untouched": all(
                torch.equal(one, other) for one, other in zip(decoder.cache.copy(0, start + count), before, strict=True)
            ),
        }
    more = random_prompt(readings.model.config, sum(pieces(count, 512)) - count + 1)
    padded = torch.cat([tokens[:, :-1], more], dim=1)
    readings.read(2, padded, start, None)
    row["rounding"] = [readings.rounding(tokens, start, eager)]
    if count > 1:
        half = start + count // 2
        readings.read(2, tokens[:, : half + 1], start, None)
        decoder.begin(2, tokens, 0, half)
        row["rounding"].append(readings.rounding(tokens, start, eager))
    return row


@torch.inference_mode()
def together(readings: Readings, count: int, most_positions: int | None, repeats: int) -> dict[str, Any]:
    """Read many prompts behind a kept prefix one by one and together: of 20 positions each, or of up to so many."""
    config = readings.model.config
    prefix = random_prompt(config, PREFIX)
    sizes = [20 if most_positions is None else 1 + 37 * n % most_positions for n in range(count)]
    prompts = [
        torch.cat([prefix, random_prompt(config, 1000 + n)[:, : size + 1]], dim=1) for n, size in enumerate(sizes)
    ]
    found: list[tuple[float, float, int, list[tuple[Tensor, Tensor]]]] = []
    for way in (False, True):
        capacity = max(prompt.shape[1] for prompt in prompts)
        decoder = FastDecoder(
            readings.model, count, capacity, 1024, fused=True, prompt_graphs=True, prompts_together=way
        )
        decoder.prefixes, reader = PrefixCache(), decoder.reader
        assert reader is not None and reader.together is way, "PROMPT_KERNELS is off"
        seconds = []
        for _ in range(2 + repeats):  # the first reads the prefix, and captures; the second may capture what is new
            readings.wait()
            began = time.perf_counter()
            for slot, prompt in enumerate(prompts):
                decoder.begin(slot, prompt, 0, 0, PREFIX)
            reader.catch_up()
            readings.wait()
            seconds.append(time.perf_counter() - began)
        kept = [decoder.cache.copy(slot, prompt.shape[1] - 1) for slot, prompt in enumerate(prompts)]
        found.append((seconds[0], statistics.median(seconds[2:]), len(reader._graphs), kept))
    alone, ours = found
    same = all(
        torch.equal(mine, its) for pair in zip(ours[3], alone[3], strict=True) for mine, its in zip(*pair, strict=True)
    )
    return {
        "prompts": count,
        "positions": sizes,
        "prefix": PREFIX,
        "one_by_one_first_ms": 1e3 * alone[0],
        "one_by_one_ms": 1e3 * alone[1],
        "together_first_ms": 1e3 * ours[0],
        "together_ms": 1e3 * ours[1],
        "num_graphs": [alone[2], ours[2]],
        "same_bits": same,
    }


def faults(rows: list[dict[str, Any]]) -> tuple[dict[str, float], list[str]]:
    """Give the limits, and list what breaks them or is not exact."""
    limits = {part: TIMES * max([LEAST, *(one[part] for row in rows for one in row["rounding"])]) for part in PARTS}
    found = []
    for row in rows:
        for most, graph in row["graphs"].items():
            where = f"{row['positions']} positions from {row['start']} on, pieces of {most}"
            found += [
                f"{where}: {part} {graph['apart'][part]:.2e} apart, more than {limits[part]:.2e}"
                for part in PARTS
                if not graph["apart"][part] <= limits[part]  # nan too
            ]
            found += [f"{where}: {key} is false" for key, value in graph.items() if value is False]
    return limits, found


def main() -> int:
    """Run all prompts."""
    parser = argparse.ArgumentParser(description="Check and time prompts read by graphs on one GPU.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--linears", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--most", default=MOSTS, help=f"positions of the largest piece of torch's operations, beside {MOST_PIECE}"
    )
    parser.add_argument(
        "--kernels",
        help="pieces of up to MOST, those of up to ROWS by the fused frame's kernels: MOST/ROWS,...; else as in use",
    )
    parser.add_argument("--lengths", default=LENGTHS, help="positions to be read")
    parser.add_argument("--starts", default=STARTS, help="positions that are there before")
    parser.add_argument("--together", default="", help="prompts that are read together, as many as 8,32,...")
    options = parser.parse_args()
    lengths, starts, options.mosts = (
        [int(number) for number in numbers.split(",") if number]
        for numbers in (options.lengths, options.starts, options.most)
    )
    if options.kernels is not None:
        options.kernels = [tuple(map(int, pair.split("/"))) for pair in options.kernels.split(",") if pair]
    readings = Readings(options, max(lengths) + max(starts) + 512)
    cuda = readings.decoder.device.type == "cuda"
    facts: dict[str, Any] = {"model": options.model.name, "most": MOST_PIECE}
    facts["reserved_bytes"] = [torch.cuda.memory_reserved()] if cuda else []
    rows: list[dict[str, Any]] = []
    for start in starts:
        for count in lengths:
            rows.append(case(readings, count, start, options.repeats))
            print(json.dumps(rows[-1]), flush=True)
    facts["together"] = []
    for count in map(int, filter(None, options.together.split(","))):
        for most in (None, 300):
            facts["together"].append(together(readings, count, most, options.repeats))
            print(json.dumps(facts["together"][-1]), flush=True)
    if cuda:
        facts["reserved_bytes"].append(torch.cuda.memory_reserved())
    facts["num_graphs"] = {most: len(reader._graphs) for most, reader in readings.readers.items()}
    facts["limits"], facts["faults"] = faults(rows)
    facts["faults"] += [f"{row['prompts']} together: other bits" for row in facts["together"] if not row["same_bits"]]
    options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    worst = {part: max(graph["apart"][part] for row in rows for graph in row["graphs"].values()) for part in PARTS}
    print(json.dumps({"apart": worst, "limits": facts["limits"], "faults": facts["faults"]}))
    return int(bool(facts["faults"]))


if __name__ == "__main__":
    sys.exit(main())
