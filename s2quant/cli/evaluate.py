"""`s2quant eval` and `s2quant report`: does the model still speak as well, and a report that a person can listen to."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from s2quant.cli.common import DTYPES, LINEARS, add_decoder, add_quiet, progress
from s2quant.cli.processes import add_processes
from s2quant.errors import UserError


def add(commands: Any) -> None:
    """Add both commands."""
    command = commands.add_parser("eval", help="run an evaluation suite")
    command.set_defaults(run=_eval)
    command.add_argument("suite", type=Path, metavar="SUITE", help="a suite, e.g. eval/suites/demo-en.yaml")
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint folder to judge")
    command.add_argument("--baseline", type=Path, metavar="DIR", help="the checkpoint folder to compare with")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    command.add_argument("--resume", action="store_true", help="go on with a stopped run in the folder")
    quick = command.add_argument_group("for a quick look")
    quick.add_argument("--limit", type=int, metavar="N", help="only the first N utterances")
    quick.add_argument("--seeds", metavar="A,B,C", help="seeds instead of the suite's")
    quick.add_argument("--metrics", metavar="LIST", help="some of wer,sim,failures,tokens,speed")
    command.add_argument("--texts", type=Path, metavar="FILE", help="your copy of the list of a seed-tts suite")
    command.add_argument("--asr-model", metavar="FILE", help="the recognizer, instead of the suite's")
    command.add_argument("--similarity-model", metavar="PATH", help="the speaker model, instead of the suite's")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the models")
    command.add_argument("--linears", choices=LINEARS, default="auto", help="quantized linears")
    add_decoder(command)
    command.add_argument("--slots", type=int, default=8, metavar="N", help="utterances in progress at a time")
    add_processes(command)
    command.add_argument(
        "--baseline-run", type=Path, metavar="DIR",
        help="another run of the suite with this baseline, whose speech of it is taken instead of made anew",
    )  # fmt: skip
    command.add_argument(
        "--layer-groups", type=int, metavar="N",
        help="token damage of N groups of Slow AR blocks and of the Fast AR, each alone; holds both models in memory",
    )  # fmt: skip
    command.add_argument("--no-report", action="store_true", help="write records and results only")
    command.add_argument("--json", action="store_true", help="print JSON")
    add_quiet(command)

    report = commands.add_parser("report", help="write the report of an evaluation or a sensitivity run anew")
    report.set_defaults(run=_report)
    report.add_argument("folder", type=Path, metavar="DIR", help="what `s2quant eval` or `s2quant sensitivity` wrote")


def _eval(options: argparse.Namespace) -> int:
    seeds, metrics = _seeds(options.seeds), _words(options.metrics)
    from s2quant.evaluate.plan import EvalOptions
    from s2quant.evaluate.run import run_eval
    from s2quant.report import write_report

    first = os.environ.get("RANK", "0") == "0"  # of several processes, one has a bar
    with progress(options.quiet or not first) as report:
        results = run_eval(
            EvalOptions(
                suite=options.suite,
                model=options.model,
                out=options.out,
                baseline=options.baseline,
                texts=options.texts,
                limit=options.limit,
                seeds=seeds,
                metrics=metrics,
                resume=options.resume,
                device=options.device,
                dtype=options.dtype,
                linears=options.linears,
                decoder=options.decoder,
                asr_model=_official_or_absolute(options.asr_model),
                similarity_model=options.similarity_model,
                num_slots=options.slots,
                baseline_run=options.baseline_run,
                layer_groups=options.layer_groups,
            ),
            report,
        )
        if results is None:
            return 0
        if not options.no_report:
            report("writing the report", 0, 1)
            write_report(options.out)
    _print(options, results)
    return 0 if results["verdict"]["passed"] else 1


def _print(options: argparse.Namespace, results: dict[str, Any]) -> None:
    verdict = results["verdict"]
    where = options.out / ("results.json" if options.no_report else "report.html")
    if options.json:
        rows = {row["name"]: {key: row[key] for key in ("baseline", "model", "delta")} for row in results["metrics"]}
        print(json.dumps({"out": str(options.out), **verdict, "metrics": rows}))
    else:
        print(f"{options.out}: {'passed' if verdict['passed'] else 'FAILED'}; {verdict['sentence']}\nreport: {where}")
    for reason in verdict["reasons"]:
        print(f"s2quant eval: gate broken: {reason}", file=sys.stderr)


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _seeds(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(word) for word in _words(text) or ())
    except ValueError as error:
        raise UserError(f"--seeds {text}", "whole numbers between commas, such as 0,1,2", "correct them") from error


def _official_or_absolute(model: str | None) -> str | None:
    return model if model is None or model.startswith("official:") else str(Path(model).absolute())


def _report(options: argparse.Namespace) -> int:
    from s2quant.report import write_report
    from s2quant.report.sensitivity import FILE, write_sensitivity_report

    if (options.folder / FILE).exists():
        write_sensitivity_report(options.folder)
        print(f"{options.folder / 'report.html'} and report.md")
        return 0
    write_report(options.folder)
    print(f"{options.folder / 'report.html'}, report.md and blind.html")
    return 0
