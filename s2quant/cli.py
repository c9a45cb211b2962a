"""The command line: parse, call one function, print. The only file that prints.

Exit status: 0 done; 1 a verification found a fault, or a model said nothing; 2 the input is wrong; 130 interrupted.
Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2quant import __version__
from s2quant.errors import UserError, VerificationError

if TYPE_CHECKING:
    from s2quant.export.verify import Inspection
    from s2quant.quantize.plan import Plan

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run s2quant.

    Args:
        arguments: The words after `s2quant`; None takes those of the process.

    Returns:
        The exit status.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(options, error.got, error.expected, error.todo)
    except VerificationError as error:
        print(f"s2quant {options.command}: failed\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"s2quant {options.command}: interrupted{_resume_hint(options)}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(options, f"{error.filename or 'the system'}: {error.strerror or error}", "a file that can be used")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = (str(error) or "out of memory").splitlines()[0]
        return _fail(options, reason, "enough memory", "close other programs, use a larger machine, or ask for less")


def _fail(options: argparse.Namespace, got: str, expected: str, todo: str = "check the path and its rights") -> int:
    print(f"s2quant {options.command}: error\n{UserError(got, expected, todo)}", file=sys.stderr)
    return 2


def _is_out_of_memory(error: Exception) -> bool:
    """Tell a lack of memory, on the CPU or on a GPU, from other errors; torch is not imported for that."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def _resume_hint(options: argparse.Namespace) -> str:
    return "; what is finished is kept: go on with --resume" if hasattr(options, "resume") else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="s2quant", description="Quantize Fish Audio S2 Pro, speak with it, and prove with speech what that cost."
    )
    parser.add_argument("--version", action="version", version=f"s2quant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_quantize(commands)
    _add_random(commands)
    _add_speak(commands)
    _add_inspect(commands)
    _add_export(commands)
    _add_demo(commands)
    return parser


def _add_quantize(commands: Any) -> None:
    command = commands.add_parser("quantize", help="quantize a checkpoint by a recipe")
    command.set_defaults(run=_quantize)
    command.add_argument("recipe", type=Path, help="a recipe, e.g. recipes/s2-pro-w4a16.yaml")
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="the bf16 checkpoint folder")
    command.add_argument("--out", type=Path, metavar="DIR", help="the folder to make (not needed with --plan)")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    command.add_argument("--calibration", type=Path, metavar="FILE", help="a calibration set to use, or to make")
    command.add_argument("--sequences", type=int, metavar="N", help="calibration sequences, instead of the recipe's")
    command.add_argument("--slots", type=int, default=8, metavar="N", help="calibration lines spoken at a time")
    command.add_argument("--resume", action="store_true", help="go on with a stopped run")
    command.add_argument("--plan", action="store_true", help="say what would be done; needs only DIR/config.json")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_quiet(command)


def _add_random(commands: Any) -> None:
    command = commands.add_parser("random", help="write a checkpoint of random weights in the real layout")
    command.set_defaults(run=_random)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--size", choices=("tiny", "s2-pro"), help="a built-in size")
    which.add_argument("--config", type=Path, metavar="FILE", help="a config.json")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    command.add_argument("--seed", type=int, default=0, help="seed of the weights")
    command.add_argument("--device", default="cpu", help="where numbers are drawn; they differ between devices")
    _add_quiet(command)


def _add_speak(commands: Any) -> None:
    command = commands.add_parser("speak", help="speak a text")
    command.set_defaults(run=_speak)
    command.add_argument("text", help="the text, with [tags] and <|speaker:0|> marks; - reads standard input")
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint folder")
    command.add_argument("--out", required=True, metavar="FILE", help="a wav file; - writes raw 16-bit PCM to stdout")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    command.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the model")
    command.add_argument("--linears", choices=("auto", "reference", "int4"), default="auto", help="quantized linears")
    voices = command.add_argument_group("voices, repeatable, in the order of the speakers")
    voices.add_argument("--voice", type=Path, action="append", default=[], metavar="WAV", help="a reference recording")
    voices.add_argument("--voice-text", action="append", default=[], metavar="TEXT", help="what is said in it")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same speech")
    command.add_argument("--temperature", type=float, default=0.8)
    command.add_argument("--top-p", type=float, default=0.8)
    command.add_argument("--top-k", type=int, default=30)
    command.add_argument("--max-frames", type=int, default=1024, help="most frames (46 ms) per batch of text")
    command.add_argument("--split-sentences", action="store_true", help="speak long text sentence by sentence")
    command.add_argument("--escape", action="store_true", help="read control tokens in the text as plain characters")
    command.add_argument("--stream", action="store_true", help="write sound while it is being made")
    command.add_argument("--codes-out", type=Path, metavar="FILE.npy", help="write the codes, int64 [N, F]")
    command.add_argument("--force", action="store_true", help="replace an existing output file")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_quiet(command)


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser("inspect", help="list every module of a checkpoint and say whether it is sound")
    command.set_defaults(run=_inspect)
    command.add_argument("model", type=Path, metavar="DIR", help="a checkpoint folder")
    command.add_argument("--headers", action="store_true", help="do not read the tensors' values")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_export(commands: Any) -> None:
    command = commands.add_parser("export", help="write a checkpoint in the layout of an engine")
    command.set_defaults(run=_export)
    command.add_argument("model", type=Path, metavar="DIR", help="a checkpoint folder")
    command.add_argument("--profile", required=True, choices=("native", "bf16"), help="native: as the release; "
                         "bf16: dequantized, for engines that load no GPTQ")  # fmt: skip
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    _add_quiet(command)


def _add_demo(commands: Any) -> None:
    command = commands.add_parser("demo", help="the whole job on a tiny checkpoint, on a CPU")
    command.set_defaults(run=_demo)
    command.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where to put everything")
    _add_quiet(command)


def _add_quiet(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quiet", action="store_true", help="no progress bar")


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show phases with a bar and the time left on stderr; nothing when quiet or not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda phase, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        total_of_bar: int | None = None

        def report(phase: str, done: int, total: int) -> None:
            nonlocal total_of_bar
            if total != total_of_bar:
                bar.reset(task, total=total)
                total_of_bar = total
            bar.update(task, completed=done, description=phase)

        yield report


def _quantize(options: argparse.Namespace) -> int:
    if options.plan:
        return _plan(options)
    if options.out is None:
        raise UserError("no --out", "the folder to make", "add --out DIR")
    for name, value in (("--sequences", options.sequences), ("--slots", options.slots)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}", "a positive number", "correct it")
    from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint

    with _progress(options.quiet) as report:
        records = quantize_checkpoint(
            QuantizeOptions(
                recipe=options.recipe,
                model=options.model,
                out=options.out,
                device=options.device,
                calibration=options.calibration,
                resume=options.resume,
                eval_folder=Path(__file__).resolve().parent.parent / "eval",  # beside the package, in a checkout
                num_sequences=options.sequences,
                num_slots=options.slots,
            ),
            report,
        )
    if options.json:
        print(json.dumps({"out": str(options.out), "modules": list(records)}))
    else:
        print(f"{options.out}: {len(records)} linears quantized, verified; details in {options.out / 'README.md'}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from s2quant.checkpoint.config import S2Config
    from s2quant.quantize.plan import make_plan
    from s2quant.recipe import load_recipe

    plan = make_plan(load_recipe(options.recipe), S2Config.load(options.model))
    print(json.dumps(_plan_json(plan)) if options.json else _plan_text(plan))
    return 0


def _plan_json(plan: Plan) -> dict[str, Any]:
    modules = [
        {
            "name": module.name,
            "kind": module.kind,
            "method": module.settings.method if module.settings else "keep",
            "bits": module.settings.bits if module.settings else None,
            "group_size": module.settings.group_size if module.settings else None,
            "bytes": module.num_bytes,
            "dense_bytes": module.dense_bytes,
        }
        for module in plan.modules
    ]
    return {
        "modules": modules,
        "quantized": len(plan.quantized),
        "dense": len(plan.dense_linears),
        "tensors": plan.num_tensors,
        "tensor_bytes": plan.num_bytes,
        "dense_tensor_bytes": plan.dense_bytes,
    }


def _plan_text(plan: Plan) -> str:
    lines = []
    for module in plan.modules:
        settings = module.settings
        what = "keep" if settings is None else f"{settings.method} {settings.bits} bit g{settings.group_size}"
        lines.append(f"{module.name:58} {module.kind:9} {what:14} {module.dense_bytes:>13,} -> {module.num_bytes:>13,}")
    lines.append(
        f"{len(plan.quantized)} linears quantized, {len(plan.dense_linears)} kept; {plan.num_tensors} tensors, "
        f"{plan.num_bytes:,} bytes, {100 * plan.num_bytes / plan.dense_bytes:.1f} % of {plan.dense_bytes:,}"
    )
    return "\n".join(lines)


def _random(options: argparse.Namespace) -> int:
    from s2quant.export.random import CONFIGS, write_random
    from s2quant.files import read_json
    from s2quant.runtime.load import parse_device

    parse_device(options.device)
    raw = CONFIGS[options.size]() if options.size else read_json(options.config)
    with _progress(options.quiet) as report:
        report("drawing weights", 0, 1)
        write_random(raw, options.out, options.seed, device=options.device)
    print(f"{options.out}: random weights, seed {options.seed}")
    return 0


def _speak(options: argparse.Namespace) -> int:
    from s2quant.runtime.speak import SpeakOptions, speak_to

    if len(options.voice) != len(options.voice_text):
        raise UserError(
            f"{len(options.voice)} --voice and {len(options.voice_text)} --voice-text",
            "a transcript for every recording",
            "give both, in the same order",
        )
    if options.text == "-":
        try:
            options.text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: {error}", "UTF-8 text", "convert it to UTF-8") from error
    result = speak_to(
        SpeakOptions(
            text=options.text,
            model=options.model,
            out=None if options.out == "-" else Path(options.out),
            device=options.device,
            dtype=options.dtype,
            linears=options.linears,
            voices=tuple(zip(options.voice, options.voice_text, strict=True)),
            seed=options.seed,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            max_frames=options.max_frames,
            split_sentences=options.split_sentences,
            escape=options.escape,
            stream=options.stream,
            codes_out=options.codes_out,
            overwrite=options.force,
        ),
        sys.stdout.buffer,
    )
    to = sys.stderr if options.out == "-" else sys.stdout
    if options.json:
        print(json.dumps(result), file=to)
    else:
        print(
            f"{options.out}: {result['audio_s']:.2f} s of sound, {result['num_frames']} frames in "
            f"{result['seconds']:.2f} s (RTF {result['rtf']:.2f}), stopped by {result['stop_reason']}",
            file=to,
        )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from s2quant.export.verify import inspect_folder

    found = inspect_folder(options.model, values=not options.headers)
    print(json.dumps(found.to_json()) if options.json else _inspection_text(found))
    return 1 if found.faults else 0


def _inspection_text(found: Inspection) -> str:
    lines = [
        f"{module.name:58} {module.kind:9} {module.dtype:4} "
        f"{'dense' if module.bits is None else f'{module.bits} bit g{module.group_size}':10} {module.num_bytes:>13,}"
        for module in found.modules
    ]
    lines.append(
        f"{found.num_quantized} linears quantized, {found.num_dense} dense; {found.num_tensors} tensors, "
        f"{found.num_bytes:,} bytes"
    )
    lines += [f"FAULT {fault}" for fault in found.faults] or ["sound"]
    return "\n".join(lines)


def _export(options: argparse.Namespace) -> int:
    from s2quant.export.profiles import export_checkpoint

    with _progress(options.quiet) as report:
        report(f"exporting {options.profile}", 0, 1)
        export_checkpoint(options.model, options.out, options.profile)
    print(f"{options.out}: profile {options.profile}, verified")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from s2quant.export.demo import run_demo

    with _progress(options.quiet) as report:
        rows = run_demo(options.out, report)
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
