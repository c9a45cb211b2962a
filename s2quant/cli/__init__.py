"""The command line: parse, call one function, print. The only package that prints.

Exit status: 0 done; 1 a verification found a fault, a gate broke, or a text was not spoken whole; 2 wrong input;
130 interrupted; 128 and more: a process of --processes was ended by that signal less 128.
Heavy imports happen inside the commands, so that `--help` answers at once.
Each command is a file here with `add`, which says its words, and a function that carries it out.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from s2quant import __version__
from s2quant.cli import bench, checkpoints, compare, demo, evaluate, publish, quantize, search, sensitivity, speak
from s2quant.cli.processes import INTERRUPTED, are_wanted, run_processes
from s2quant.errors import UserError, VerificationError, is_lost_process, is_out_of_memory

COMMANDS = (
    quantize,
    sensitivity,
    search,
    checkpoints,
    speak,
    evaluate,
    bench,
    compare,
    publish,
    demo,
)  # as in the help


def main(arguments: Sequence[str] | None = None) -> int:
    """Run s2quant.

    Args:
        arguments: The words after `s2quant`; None takes those of the process.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    try:
        if are_wanted(options):
            return _all_of(options, words)
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
        if "RANK" in os.environ and is_lost_process(error):
            print(f"s2quant {options.command}: another process has ended{_resume_hint(options)}", file=sys.stderr)
            return 1
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "out of memory").splitlines()[0]
        return _fail(options, reason, "enough memory", "close other programs, use a larger machine, or ask for less")


def _all_of(options: argparse.Namespace, words: Sequence[str]) -> int:
    status = run_processes(options.processes, words)
    if status > INTERRUPTED or status == 128 + signal.SIGHUP:  # none that was ended so has said anything
        print(f"s2quant {options.command}: stopped{_resume_hint(options)}", file=sys.stderr)
    return status


def _fail(options: argparse.Namespace, got: str, expected: str, todo: str = "check the path and its rights") -> int:
    print(f"s2quant {options.command}: error\n{UserError(got, expected, todo)}", file=sys.stderr)
    return 2


def _resume_hint(options: argparse.Namespace) -> str:
    from s2quant.files import partial_folder

    if not hasattr(options, "resume"):
        return ""
    kept = partial_folder(options.out).rglob("[!.]*.safetensors")
    if options.out.exists() or any(kept):  # an evaluation is kept where it will be
        return "; what is finished is kept: go on with --resume"
    return "; nothing was finished yet"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="s2quant", description="Quantize Fish Audio S2 Pro, speak with it, and prove with speech what that cost."
    )
    parser.add_argument("--version", action="version", version=f"s2quant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
