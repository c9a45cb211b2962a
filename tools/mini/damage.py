"""Damage shows: s2-mini at 2, 3, 4 and 8 bits, by round-to-nearest and by GPTQ, in token metrics and in words.

    python tools/mini/damage.py --model models/s2-mini --asr-model models/whisper-mini/whisper-mini.pt --out DIR
        [--report reports/NAME] [--limit 200] [--seeds 0,1,2] [--bits 2,3,4,8] [--methods rtn,gptq] [--pocketsphinx]
        [--layer-groups N] [--device cpu]

Recipes are recipes/s2-mini-w4a16.yaml with another method and other bits. Held-out sentences are spoken in four voices
by the bf16 model, by itself again with other seeds (the noise floor) and by every checkpoint; all are heard by the
same recognizers. Token metrics are taken on what the bf16 model spoke. All of it is `s2quant.evaluate`'s, and is kept
in DIR: what is there is not made again, so a stopped run, or one with more clips, goes on. The report gets damage.md
and damage.json.

Weights are dequantized and multiplied in the model's dtype for all bits alike, so that what is compared is weights and
not kernels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tools")]

import soundfile
import yaml
from checkpoint_jobs import add_options, quantize, say

from mini import grammar, judge, speech
from mini.damage_report import Arm, Clips, compose, write
from mini.speech import SAMPLE_RATE, VOICES, Line
from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.reader import open_checkpoint
from s2quant.cli.common import numbers
from s2quant.errors import UserError
from s2quant.evaluate.asr import load_asr
from s2quant.evaluate.generate import generate
from s2quant.evaluate.layer_groups import count_quantized, group_arms, make_groups
from s2quant.evaluate.plan import EvalOptions, EvalPlan, make_plan
from s2quant.evaluate.ranks import Ranks
from s2quant.evaluate.run import read_sequences, residual_size
from s2quant.evaluate.score import Backends, make_records, transcribe
from s2quant.evaluate.store import Store
from s2quant.evaluate.token_cache import floor_dtype, folder_arm, measure_arms
from s2quant.evaluate.token_summary import summarise_groups
from s2quant.export.quantized import QuantizeOptions
from s2quant.files import atomic_file, atomic_folder, read_json, sha256_file, write_json
from s2quant.quantize.plan import make_plan as quantize_plan
from s2quant.recipe import load_recipe
from s2quant.records import folder_hashes, manifest
from s2quant.runtime.load import device_name, parse_device, parse_dtype
from s2quant.runtime.loading import load_engine

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "s2-mini-w4a16.yaml"
NUM_TEXTS = 600  # in the suite; --limit takes the first of them
REFERENCES = 4  # recordings of each voice
BASELINE = "bf16"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare, and how."""

    model: Path
    asr_model: Path
    out: Path
    report: Path
    recipe: Path = RECIPE
    flite: Path = speech.LIBRARIES
    limit: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)
    bits: tuple[int, ...] = (2, 3, 4, 8)
    methods: tuple[str, ...] = ("rtn", "gptq")
    pocketsphinx: bool = False
    layer_groups: int | None = None
    num_sequences: int | None = None
    max_frames: int = 320
    num_slots: int = 8
    device: str = "cpu"
    dtype: str = "bfloat16"


# ---- what is spoken ------------------------------------------------------------------------------------------------


def write_suite(options: Options) -> Path:
    """Write held-out sentences and recordings of the voices that they are to be spoken in, as a suite."""
    folder = options.out / "suite"
    if folder.exists():
        return folder / "suite.yaml"
    texts = itertools.islice(grammar.sentences(1001, "test"), NUM_TEXTS)
    rows = [{"id": f"mini-{number:03d}", "lang": "en", "text": text} for number, text in enumerate(texts, 1)]
    said = grammar.sentences(2002, "test")
    with atomic_folder(folder) as partial:
        (partial / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        voices = {}
        for number, voice in itertools.product(range(REFERENCES), VOICES):
            text, path = next(said), partial / f"{voice}-{number}.wav"
            soundfile.write(path, speech.speak(Line(text=text, voice=voice, split=""), options.flite)[0], SAMPLE_RATE)
            voices[path.stem] = {"audio": path.name, "text": text, "sha256": sha256_file(path)}
        suite = {
            "name": "s2-mini-damage",
            "version": 1,
            "texts": {"file": "texts.jsonl", "sha256": sha256_file(partial / "texts.jsonl")},
            "voices": voices,
            "seeds": [0, 1, 2],
            "floor_seeds": [100, 101, 102],
            "sampling": {"temperature": 0.8, "top_p": 0.8, "top_k": 30},
            "max_frames": options.max_frames,
            "metrics": ["wer", "failures", "tokens"],
            "asr": {"kind": "whisper", "model": str(options.asr_model.resolve())},
            "normalizer": "whisper-english",
            "similarity": {"kind": "resemblyzer"},
        }
        (partial / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")
    return folder / "suite.yaml"


def load_plan(options: Options) -> EvalPlan:
    """Cut the suite to the clips and seeds that are wanted."""
    chosen = EvalOptions(
        suite=write_suite(options), model=options.model, baseline=options.model, out=options.out,
        limit=options.limit, seeds=options.seeds,
    )  # fmt: skip
    plan = make_plan(chosen)
    if len(plan.utterances) < options.limit or plan.suite.max_frames != options.max_frames:
        have = f"{len(plan.suite.utterances)} sentences of {plan.suite.max_frames} frames at most"
        raise UserError(f"{chosen.suite} has {have}", "the clips and frames that are asked for", "name another --out")
    return plan


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def write_recipe(options: Options, method: str, bits: int) -> Path:
    """Write the recipe with another method and other bits."""
    recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
    recipe["name"] = f"{method}-{bits}"
    recipe["description"] = f"{options.recipe.stem} with method {method} and {bits} bits."
    recipe["quantize"] |= {"method": method, "bits": bits}
    if method == "rtn":
        recipe["quantize"]["desc_act"] = False  # there is no order to follow
    recipe["calibration"]["source"] = str((options.recipe.parent / recipe["calibration"]["source"]).resolve())
    path = options.out / "recipes" / f"{method}-{bits}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, overwrite=True) as partial:
        partial.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def write_recipes(options: Options, config: S2Config) -> dict[str, Path]:
    """Write all recipes, and refuse those that do not fit the model before anything is made of one."""
    paths = {
        f"{method}-{bits}": write_recipe(options, method, bits) for bits in options.bits for method in options.methods
    }
    for path in paths.values():
        quantize_plan(load_recipe(path), config)
    return paths


def make_checkpoint(options: Options, recipe: Path) -> Path:
    """Make a recipe's checkpoint, or take the one that is there."""
    return quantize(
        QuantizeOptions(
            recipe=recipe,
            model=options.model,
            out=options.out / "checkpoints" / recipe.stem,
            device=options.device,
            calibration=options.out / "calibration.safetensors",
            num_sequences=options.num_sequences,
            num_slots=options.num_slots,
        )
    )


# ---- speaking and listening ----------------------------------------------------------------------------------------


def open_store(options: Options, plan: EvalPlan, name: str, folder: Path) -> Store:
    """Open the folder of a checkpoint's clips; refuse clips of another one."""
    store = Store(folder=options.out / "speech" / name)
    facts = {
        "suite": plan.suite.sha256,
        "checkpoint": folder_hashes(folder),
        "device": device_name(parse_device(options.device)),
        "dtype": options.dtype,
    }
    path = store.folder / "run.json"
    if path.is_file() and read_json(path) != facts:
        raise UserError(f"{store.folder} was spoken by something else", "the same suite and checkpoint", "remove it")
    with atomic_file(path, overwrite=True) as partial:
        write_json(partial, facts)
    return store


def listen(options: Options, plan: EvalPlan, name: str, folder: Path, listeners: Mapping[str, Callable]) -> Clips:
    """Speak a plan by one checkpoint and write down what is heard."""
    store = open_store(options, plan, name, folder)
    ranks = Ranks()

    def load() -> Any:
        return load_engine(folder, options.device, options.dtype, "reference", options.num_slots)

    loaders = {"baseline" if "baseline" in plan.arms else "model": load}
    generate(plan, loaders, store, ranks, options.num_slots, say)
    records = {}
    for backend, load_listener in listeners.items():
        transcribe(plan, load_listener, backend, store, ranks, say)
        records[backend] = make_records(plan, store, Backends(asr=backend), {})
    return Clips(store=store, records=records)


def load_listeners(options: Options) -> dict[str, Callable]:
    """Name the recognizers, and say how each is loaded."""
    loaders: list[Callable] = [lambda: load_asr("whisper", options.asr_model, options.device)]
    if options.pocketsphinx:
        path = options.out / "suite" / "grammar.arpa"
        if not path.exists():
            judge.write_language_model(path)
        loaders.append(lambda: load_asr("pocketsphinx", path))
    return {load().name: load for load in loaders}


# ---- all of it -----------------------------------------------------------------------------------------------------


def measure_tokens(
    options: Options, plan: EvalPlan, store: Store, folders: Mapping[str, Path]
) -> tuple[dict[str, list], dict[str, list[dict[str, Any]]]]:
    """Measure every checkpoint on what the bf16 model spoke; by groups of layers too, if that is wanted."""
    dtype, cache = parse_dtype(options.dtype), options.out / "tokens"
    sequences, size = read_sequences(plan, store), residual_size(options.model)
    if not sequences:
        raise UserError(f"{options.model} spoke not one frame", "a model that speaks", "train it, or take another one")
    base = folder_arm(options.model, options.device, dtype, "reference")
    arms = {name: folder_arm(path, options.device, dtype, "reference") for name, path in folders.items()}
    arms["floor"] = folder_arm(options.model, options.device, floor_dtype(dtype), "reference")

    def told(what: str, done: int, total: int) -> None:
        say(f"token metrics, {what}", done, total)

    keep = options.layer_groups is not None
    damages = measure_arms(base, arms, sequences, size, cache, told, keep_answers=keep)
    groups: dict[str, list[dict[str, Any]]] = {}
    if options.layer_groups is not None:
        config = open_checkpoint(options.model).config
        parts = make_groups(config.slow.n_layer, config.fast.n_layer, options.layer_groups)
        for name, path in folders.items():
            with group_arms(base, arms[name], parts) as mixed:
                found = measure_arms(base, mixed, sequences, size, cache, told, keep_answers=True)
            counts = count_quantized(open_checkpoint(path), parts)
            groups[name] = summarise_groups(parts, counts, [found[part.name] for part in parts])
    return damages, groups


def run(options: Options) -> dict[str, Any]:
    """Make, speak, listen, measure, and write the report."""
    config = open_checkpoint(options.model).config
    if options.layer_groups is not None:
        make_groups(config.slow.n_layer, config.fast.n_layer, options.layer_groups)
    options.out.mkdir(parents=True, exist_ok=True)
    recipes = write_recipes(options, config)
    plan, listeners = load_plan(options), load_listeners(options)
    folders = {name: make_checkpoint(options, recipe) for name, recipe in recipes.items()}
    own = replace(plan, arms=("baseline", "floor"))
    clips = {BASELINE: listen(options, own, BASELINE, options.model, listeners)}
    for name, folder in folders.items():
        say(f"speech of {name}")
        clips[name] = listen(options, replace(plan, arms=("model",)), name, folder, listeners)
    damages, groups = measure_tokens(options, plan, clips[BASELINE].store, folders)
    arms = [
        Arm(name=name, folder=folder, clips=clips[name], damages=damages.get(name), groups=groups.get(name))
        for name, folder in {BASELINE: options.model, **folders}.items()
    ]
    provenance = manifest(
        "damage",
        {name: folder_hashes(folder) for name, folder in {BASELINE: options.model, **folders}.items()},
        device_name(parse_device(options.device)),
        None,
        dtype=options.dtype,
        suite=plan.suite.sha256,
        recipe=sha256_file(options.recipe),
        num_sequences=options.num_sequences,
    )
    result = compose(plan, arms, damages["floor"], list(listeners), provenance)
    write(options.report, result)
    return result


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--asr-model", type=Path, required=True, help="the recognizer")
    parser.add_argument("--out", type=Path, required=True, help="all that is made on the way, kept")
    today = f"{datetime.now(UTC):%Y-%m-%d}-s2-mini-damage"
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / today)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--flite", type=Path, default=speech.LIBRARIES)
    parser.add_argument("--limit", type=int, default=200, help="the first N sentences, each spoken with every seed")
    parser.add_argument("--bits", type=partial(numbers, "--bits"), default=(2, 3, 4, 8))
    parser.add_argument("--methods", type=lambda text: tuple(text.split(",")), default=("rtn", "gptq"))
    parser.add_argument("--pocketsphinx", action="store_true", help="a second recognizer, that knows other speech too")
    parser.add_argument("--layer-groups", type=int, help="token damage of groups of layers too")
    parser.add_argument("--max-frames", type=int, default=320)
    parser.set_defaults(seeds=(0, 1, 2))
    try:
        run(Options(**vars(parser.parse_args(words))))
    except UserError as error:
        print(f"damage.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
