"""What every recipe costs and gains on one checkpoint: bytes, token damage, words, failures and speed, in one table.

    python tools/recipes_table.py --model models/s2-mini --asr-model models/whisper-mini/whisper-mini.pt --out DIR
        [--recipe FILE ...] [--reference s2-mini-w4a16] [--suite eval/suites/mini-en.yaml] [--limit N] [--seeds 0,1,2]
        [--device cpu] [--sequences N] [--slots N] [--work build/recipes]

Without --recipe these are all of recipes/s2-mini-*.yaml; with `--add FILE` others come beside them, such as one that
`s2quant search` wrote. Each is quantized as `s2quant quantize` does and judged as `s2quant eval` does, both by the same
code; the bf16 checkpoint speaks once and all runs take its clips (`--baseline-run`). Everything is kept in --work:
a checkpoint whose manifest names the same model, recipe and calibration, and a clip that was spoken or heard, is not
made again, so a stopped call goes on when it is repeated, and a larger --limit adds to what is there.

Timings are a recipe's own run's, beside bf16 in turns; do not run it on a busy machine if they are to mean something.
--out gets recipes.md, recipes.csv and recipes.json, sorted by size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "tools")]

from checkpoint_jobs import add_options, quantize, say
from recipes_figures import Measured, compose
from recipes_page import write

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.reader import open_checkpoint
from s2quant.errors import UserError, shorten_list
from s2quant.evaluate.plan import EvalOptions, make_plan
from s2quant.evaluate.run import run_eval
from s2quant.export.calibration import calibration_lines, set_key
from s2quant.export.quantized import QuantizeOptions
from s2quant.quantize.plan import Plan
from s2quant.quantize.plan import make_plan as quantize_plan
from s2quant.recipe import load_recipe
from s2quant.records import folder_hashes, read_records
from s2quant.suite import METRICS

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "s2-mini-w4a16"
EVAL = ROOT / "eval"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare, and how; see the words of the command line."""

    model: Path
    out: Path
    work: Path
    recipes: tuple[Path, ...]
    reference: str = REFERENCE
    suite: Path = EVAL / "suites" / "mini-en.yaml"
    asr_model: Path | None = None
    limit: int | None = None
    seeds: tuple[int, ...] | None = None
    device: str = "cpu"
    dtype: str = "bfloat16"
    num_sequences: int | None = None
    num_slots: int = 8


def check(options: Options, config: S2Config) -> dict[str, Plan]:
    """Refuse what cannot be compared before anything is made; gives the plans by recipe."""
    plans: dict[str, Plan] = {}
    faults = []
    for path in options.recipes:
        plan = quantize_plan(load_recipe(path), config)
        if plan.recipe.name in plans:
            faults.append(f"{path}: a second recipe called {plan.recipe.name}")
        plans[plan.recipe.name] = plan
    if options.reference not in plans:
        faults.append(f"no recipe called {options.reference}, which the others are compared with")
    missing = [name for name in METRICS if name not in make_plan(eval_options(options, options.model)).metrics]
    if missing:
        faults.append(f"{options.suite} does not measure {', '.join(missing)}")
    if faults:
        raise UserError(shorten_list(faults), "recipes of different names, one of them the --reference", "correct it")
    return plans


def make_checkpoint(options: Options, recipe: Path, model_sha256: Mapping[str, str]) -> Path:
    """Make a recipe's checkpoint, or take the one that is there."""
    loaded = load_recipe(recipe)
    lines = calibration_lines(loaded, EVAL, options.num_sequences)
    key = set_key(loaded, lines, model_sha256)  # recipes that want the same set share one
    return quantize(
        QuantizeOptions(
            recipe=recipe,
            model=options.model,
            out=options.work / "checkpoints" / loaded.name,
            device=options.device,
            calibration=options.work / f"calibration-{key[:16]}.safetensors",
            eval_folder=EVAL,
            num_sequences=options.num_sequences,
            num_slots=options.num_slots,
        )
    )


def eval_options(options: Options, folder: Path, first: Path | None = None) -> EvalOptions:
    """Say what `s2quant eval` is asked for."""
    out = options.work / "runs" / folder.name
    return EvalOptions(
        suite=options.suite,
        model=folder,
        baseline=options.model,
        out=out,
        limit=options.limit,
        seeds=options.seeds,
        resume=(out / "run.json").is_file(),
        device=options.device,
        dtype=options.dtype,
        asr_model=None if options.asr_model is None else str(options.asr_model.resolve()),
        num_slots=options.num_slots,
        baseline_run=first if first != out else None,
    )


def run(options: Options) -> dict[str, Any]:
    """Make, judge and compare; write the table."""
    checkpoint = open_checkpoint(options.model)
    plans = check(options, checkpoint.config)
    model_sha256 = folder_hashes(options.model)
    folders = {load_recipe(path).name: make_checkpoint(options, path, model_sha256) for path in options.recipes}
    measured, first = [], None
    for name, folder in folders.items():
        say(f"evaluation of {name}")
        chosen = eval_options(options, folder, first)
        results = run_eval(chosen, say)
        assert results is not None
        first = first or chosen.out
        records = read_records(chosen.out / "records.jsonl")
        measured.append(Measured(plan=plans[name], results=results, records=records))
    table = compose(measured, options.reference)
    write(options.out, table)
    say(f"{options.out / 'recipes.md'}, recipes.csv, recipes.json")
    return table


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--asr-model", type=Path, help="the recognizer, instead of the suite's")
    parser.add_argument("--out", type=Path, required=True, help="the report's folder")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "recipes", help="checkpoints and runs, kept")
    parser.add_argument("--recipe", type=Path, action="append", help="instead of recipes/s2-mini-*.yaml; repeatable")
    parser.add_argument("--add", type=Path, action="append", default=[], help="beside those; repeatable")
    parser.add_argument("--reference", default=REFERENCE, help="name of the recipe that the others are compared with")
    parser.add_argument("--suite", type=Path, default=Options.suite)
    parser.add_argument("--limit", type=int, help="only the first N utterances")
    try:
        args = parser.parse_args(words)
        recipes = args.recipe or sorted((ROOT / "recipes").glob("s2-mini-*.yaml"))
        more = {name: value for name, value in vars(args).items() if name not in ("recipe", "add")}
        run(Options(recipes=(*recipes, *args.add), **more))
    except UserError as error:
        print(f"recipes_table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
