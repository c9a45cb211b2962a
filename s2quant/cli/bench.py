"""`s2quant bench`: how fast checkpoints speak, side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2quant.cli.common import DTYPES, LINEARS, add_decoder, add_memory_limit, add_quiet, numbers, progress
from s2quant.errors import UserError

if TYPE_CHECKING:
    from s2quant.evaluate.upstream import Upstream

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all."


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("bench", help="time checkpoints side by side")
    command.set_defaults(run=_bench)
    command.add_argument(
        "--model", type=Path, action="append", required=True, metavar="DIR",
        help="a checkpoint folder; repeatable, the first is what the others are compared with",
    )  # fmt: skip
    command.add_argument("--batch", default="1", metavar="1,8,32", help="utterances at a time")
    command.add_argument("--frames", type=int, default=200, metavar="N", help="frames (46 ms) per utterance")
    command.add_argument("--repeats", type=int, default=3, metavar="N", help="timed rounds; one more is warm-up")
    command.add_argument("--text", default=TEXT, help="what every utterance says")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the models")
    command.add_argument("--linears", choices=LINEARS, default="auto", help="quantized linears")
    add_decoder(command)
    command.add_argument(
        "--prompt-graphs",
        action=argparse.BooleanOptionalAction,
        help="fast: prompts in padded pieces, by graphs; the default on a GPU",
    )
    command.add_argument(
        "--prompts-together",
        action=argparse.BooleanOptionalAction,
        help="fast: prompts that begin before the same frame are read together",
    )
    command.add_argument(
        "--streams", default="", metavar="1,8,32", help="streams at a time that are played in real time: any gaps?"
    )
    command.add_argument(
        "--codec-graphs",
        action=argparse.BooleanOptionalAction,
        help="streams' first sound by a graph; the default on a GPU",
    )
    command.add_argument("--voice", type=Path, metavar="WAV", help="whose first sound is timed; else ten s of noise")
    command.add_argument("--voice-text", metavar="TEXT", help="what is said in it")
    command.add_argument(
        "--against", type=Path, metavar="PATH",
        help="a fish-speech checkout, timed beside us on the first --model in a process of its own",
    )  # fmt: skip
    command.add_argument(
        "--against-mode", choices=("eager", "compiled", "both"), default="compiled", help="how its frame runs"
    )
    command.add_argument(
        "--against-positions", type=int, default=4096, metavar="N", help="what its caches hold (its own default: all)"
    )
    add_memory_limit(command)
    command.add_argument("--out", type=Path, metavar="DIR", help="a new folder for bench.json, bench.md, bench.svg")
    command.add_argument("--json", action="store_true", help="print JSON")
    add_quiet(command)


def _bench(options: argparse.Namespace) -> int:
    from s2quant.evaluate.speed import measure_speed
    from s2quant.files import atomic_folder, check_new, write_json
    from s2quant.records import manifest
    from s2quant.report.bench import bench_svg, bench_table

    if options.out is not None:
        check_new(options.out)
    if (options.voice is None) != (options.voice_text is None):
        raise UserError("--voice or --voice-text alone", "a recording and what is said in it", "give both")
    with progress(options.quiet) as report:
        result = measure_speed(
            _arms(options.model),
            text=options.text,
            num_frames=options.frames,
            repeats=options.repeats,
            batch_sizes=numbers("--batch", options.batch),
            memory_limit_gb=options.memory_limit,
            low_memory=options.low_memory,
            codec_graphs=options.codec_graphs,
            against=_upstream(options),
            streams=numbers("--streams", options.streams) if options.streams else (),
            voice="noise" if options.voice is None else (options.voice, options.voice_text),
            device=options.device,
            dtype=options.dtype,
            linears=options.linears,
            decoder=options.decoder,
            prompt_graphs=options.prompt_graphs,
            prompts_together=options.prompts_together,
            progress=report,
        )
    if options.out is not None:
        facts = manifest("bench", {"models": [str(path) for path in options.model]}, result["device"], None)
        with atomic_folder(options.out) as folder:
            write_json(folder / "bench.json", result)
            write_json(folder / "manifest.json", facts)
            (folder / "bench.md").write_text(bench_table(result), encoding="utf-8")
            (folder / "bench.svg").write_text(bench_svg(result), encoding="utf-8")
    print(json.dumps(result) if options.json else bench_table(result), end="" if not options.json else "\n")
    return 0


def _arms(folders: list[Path]) -> dict[str, Path]:
    """Name the arms: the folders' own names, or their paths where those are not unique."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"--model {' --model '.join(names)}", "every folder once", "name each checkpoint once")
    return dict(zip(names, folders, strict=True))


def _upstream(options: argparse.Namespace) -> Upstream | None:
    from s2quant.evaluate.upstream import MODES, Upstream

    if options.against is None:
        return None
    modes = tuple(mode for mode in MODES if options.against_mode in (mode, "both"))
    return Upstream(checkout=options.against, modes=modes, positions=options.against_positions)
