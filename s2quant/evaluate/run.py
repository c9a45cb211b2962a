"""The run of a suite: speak, compare tokens, listen, time, sum up. In one process or in several.

    plan -> clips (generate.py) -> token metrics -> transcripts -> embeddings (score.py) -> timings -> records, results

Everything that can be refused is refused before anything is made: options, suite, checkpoints, recognizer, packages.
Each step keeps what it has done, so a stopped run goes on with `--resume`, and so does one that is asked for more
utterances, seeds or metrics. It ends with the results of a run in one go: clips are kept that were spoken in the same
company (`groups.py`), so more utterances or seeds have some spoken anew. It goes on only with the same suite,
checkpoints, device, dtype, linears, decoder and slots, on which the clips depend. Several processes meet between the
steps; the first one does what is done once.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from s2quant.checkpoint.reader import Checkpoint, open_checkpoint
from s2quant.codec import load_codec
from s2quant.errors import UserError, shorten_list
from s2quant.evaluate.asr import RATE_HZ, load_asr
from s2quant.evaluate.generate import Progress, generate
from s2quant.evaluate.layer_groups import LayerGroup, count_quantized, group_arms, make_groups
from s2quant.evaluate.plan import EvalOptions, EvalPlan, make_plan
from s2quant.evaluate.ranks import Ranks, find_ranks
from s2quant.evaluate.results import build_results, write_summary
from s2quant.evaluate.score import Backends, embed, make_records, transcribe
from s2quant.evaluate.shared import check_shared, take_baseline
from s2quant.evaluate.similarity import load_similarity
from s2quant.evaluate.stats import binomial_interval, smallest_detectable
from s2quant.evaluate.store import Store, load_array
from s2quant.evaluate.token_cache import floor_dtype, folder_arm, measure_arms
from s2quant.evaluate.token_summary import summarise_groups, summarise_tokens
from s2quant.evaluate.tokens import TokenDamage, TokenSequence
from s2quant.evaluate.wer import score
from s2quant.files import atomic_file, check_new, read_json, write_json
from s2quant.records import Arm, folder_hashes, manifest, versions, write_records
from s2quant.runtime.load import device_name, parse_device, parse_dtype
from s2quant.runtime.loading import load_engine
from s2quant.runtime.memory import release_memory
from s2quant.runtime.speech import decoder_for

RUN_VERSION = 3
LIBRARIES = ("jiwer", "openai-whisper", "pocketsphinx", "resemblyzer", "scipy", "statsmodels", "pandas", "accelerate")
SPEED_FRAMES = 64
MAX_LISTENERS = 8  # processes of a recognizer that uses one core; about 100 MB each
SPEED_REPEATS = 3


def run_eval(options: EvalOptions, progress: Progress = lambda phase, done, total: None) -> dict[str, Any] | None:
    """Run a suite and write records.jsonl, results.json, summary.csv and manifest.json.

    Args:
        options: What to do.
        progress: Told of phases; only in the first process.

    Returns:
        The results; None in all processes but the first.

    Raises:
        UserError: Something in the input cannot be used; no folder is left then.
    """
    ranks = find_ranks(options.device)
    try:
        return _run(options, ranks, progress if ranks.is_first else lambda phase, done, total: None)
    finally:
        ranks.close()


def _run(options: EvalOptions, ranks: Ranks, progress: Progress) -> dict[str, Any] | None:
    plan = make_plan(options)
    options = replace(options, device=ranks.device(options.device))
    parse_device(options.device)
    parse_dtype(options.dtype)
    if ranks.is_first:
        _begin(options, plan, progress)
    ranks.wait()
    facts = read_json(options.out / "run.json")
    store = Store(folder=options.out, rank=ranks.rank, go=facts["go"])
    backends = Backends(**facts["backends"])
    folders = _folders(options)

    def engine_of(name: str) -> Callable[[], Any]:
        own = (options.device, options.dtype, options.linears, options.num_slots, options.decoder)
        return lambda: load_engine(folders[name], *own)

    engines = {name: engine_of(name) for name in folders}
    generate(plan, engines, store, ranks, options.num_slots, progress)
    ranks.wait()
    damages = _measure_tokens(options, plan, facts, store, ranks, progress) if "tokens" in plan.metrics else {}
    device = options.device
    if backends.asr is not None:
        kind, model = plan.suite.asr, plan.asr_model
        processes = max(1, min(MAX_LISTENERS, (os.cpu_count() or 1) // ranks.world))
        transcribe(plan, lambda: load_asr(kind, model, device, processes), backends.asr, store, ranks, progress)
    if backends.similarity is not None:
        what, path = plan.suite.similarity, plan.similarity_model
        embed(plan, lambda: load_similarity(what, path, device), backends.similarity, store, ranks, progress)
    ranks.wait()
    if not ranks.is_first:
        return None
    speed = _measure_speed(options, plan, store, progress) if "speed" in plan.metrics else None
    progress("summing up", 0, 1)
    return _finish(options, plan, facts, store, backends, damages, speed)


def _folders(options: EvalOptions) -> dict[str, Path]:
    """Name the checkpoints that speak, the baseline first."""
    both = {"baseline": options.baseline, "model": options.model}
    return {name: folder for name, folder in both.items() if folder is not None}


# ---- before the run ------------------------------------------------------------------------------------------------


def _begin(options: EvalOptions, plan: EvalPlan, progress: Progress) -> None:
    """Refuse what can be refused, then write run.json."""
    path = options.out / "run.json"
    if not options.resume:
        check_new(options.out)
    elif options.out.exists() and not path.is_file():
        raise UserError(f"{options.out} holds no run", "the folder of a stopped run", "name another --out")
    checkpoints = {name: open_checkpoint(folder) for name, folder in _folders(options).items()}
    _check_sizes(checkpoints, options)
    _groups(options, checkpoints["model"])
    progress("loading what listens", 0, 1)
    backends = _check_backends(options, plan)
    progress("hashing the checkpoints", 0, 1)
    facts: dict[str, Any] = {
        "run_version": RUN_VERSION,
        "suite": {"name": plan.suite.name, "version": plan.suite.version, "sha256": plan.suite.sha256},
        "checkpoints": {name: folder_hashes(one.folder) for name, one in checkpoints.items()},
        "device": device_name(parse_device(options.device)),
        "dtype": options.dtype,
        "linears": options.linears,
        "decoder": decoder_for(options.decoder, parse_device(options.device)),
        "num_slots": options.num_slots,
    }
    go = 0
    if path.is_file():
        before = read_json(path)
        _check_same(before, facts, options.out)
        go = before["go"] + 1
    if options.baseline_run is not None:
        check_shared(options.baseline_run, facts)
    facts["backends"] = {"asr": backends.asr, "similarity": backends.similarity}
    facts["arms"] = {name: _arm_facts(one) for name, one in checkpoints.items()}
    facts["go"] = go
    with atomic_file(path, overwrite=True) as partial:
        write_json(partial, facts)
    if options.baseline_run is not None:
        progress("taking the baseline's speech", 0, 1)
        take_baseline(options.baseline_run, plan, Store(folder=options.out, go=go), options.num_slots)


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], out: Path) -> None:
    """Refuse to go on with a run whose clips would not be these."""
    faults = []
    for key, value in new.items():
        known = old.get(key)
        if key == "checkpoints":
            before: Mapping[str, Any] = known if isinstance(known, Mapping) else {}
            faults += [f"{name}: other files" for name in value if name in before and before[name] != value[name]]
            faults += [f"{name}: not in that run" for name in value if name not in before]
            faults += [f"{name}: that run has one" for name in before if name not in value]
        elif known != value:
            faults.append(f"{key}: {known!r} there, {value!r} here")
    if faults:
        raise UserError(
            f"{out} is the run of something else:\n{shorten_list(faults)}",
            "the same suite, checkpoints, device, dtype, linears, decoder and slots",
            "go on with the options of that run, or name another --out",
        )


def _check_sizes(checkpoints: Mapping[str, Checkpoint], options: EvalOptions) -> None:
    """Refuse two models whose answers cannot be compared."""
    if len(checkpoints) < 2:
        return
    one, other = (checkpoints[name].config for name in ("baseline", "model"))
    names = ("slow", "fast", "num_codebooks", "semantic_begin_id", "semantic_end_id", "im_end_id")
    wrong = [name for name in names if getattr(one, name) != getattr(other, name)]
    if wrong:
        raise UserError(
            f"{options.baseline} and {options.model} differ in {', '.join(wrong)}",
            "two models of the same sizes and token ids",
            "compare a quantized model with the checkpoint that it was made of",
        )


def _groups(options: EvalOptions, checkpoint: Checkpoint) -> list[LayerGroup]:
    """Name the groups of layers that are asked for; none when the damage is not split."""
    if options.layer_groups is None:
        return []
    config = checkpoint.config
    return make_groups(config.slow.n_layer, config.fast.n_layer, options.layer_groups)


def _check_backends(options: EvalOptions, plan: EvalPlan) -> Backends:
    """Load what will listen, once, so that nothing is missing after hours of speech; give the names."""
    binomial_interval(0, 1)
    smallest_detectable(1.0, 10)
    try:
        importlib.import_module("pandas")
    except ImportError as error:
        raise UserError(
            "summary.csv is written by the package pandas, which is not installed",
            "the packages of s2quant[eval]",
            "pip install 's2quant[eval]'",
        ) from error
    asr_name, similarity_name = None, None
    if "wer" in plan.metrics:
        asr = load_asr(plan.suite.asr, plan.asr_model, options.device)
        for lang in sorted({one.lang for one in plan.utterances}):
            asr.transcribe(np.zeros(0, np.float32), RATE_HZ, lang)  # says so if it does not know the language
            score("one", "one", plan.suite.normalizer, lang)
        asr_name = asr.name
        del asr
    if "similarity" in plan.metrics:
        similarity_name = load_similarity(plan.suite.similarity, plan.similarity_model, options.device).name
    release_memory()
    return Backends(asr=asr_name, similarity=similarity_name)


def _arm_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Say what a checkpoint is, for results.json."""
    modules = checkpoint.modules.values()
    bits = sorted({module.bits for module in modules if module.bits is not None})
    dense = sorted({module.dtype for module in modules if module.bits is None and module.kind == "linear"})
    return {
        "path_name": checkpoint.folder.resolve().name,
        "tensor_bytes": sum(module.num_bytes for module in modules),
        "quantized": sum(module.bits is not None for module in modules),
        "dense": sum(module.kind == "linear" and module.bits is None for module in modules),
        "bits": " and ".join([*map(str, bits), *(f"{name} (dense)" if bits else name for name in dense)]),
    }


# ---- steps ---------------------------------------------------------------------------------------------------------


def _measure_tokens(
    options: EvalOptions, plan: EvalPlan, facts: Mapping[str, Any], store: Store, ranks: Ranks, progress: Progress
) -> dict[str, list[TokenDamage]]:
    """Compare the arms on the baseline's speech, each process its share; in the first one, give all damages."""
    assert options.baseline is not None
    device, dtype, hashes = options.device, parse_dtype(options.dtype), facts["checkpoints"]
    baseline = folder_arm(options.baseline, device, dtype, options.linears, hashes["baseline"])
    arms = {
        "model": folder_arm(options.model, device, dtype, options.linears, hashes["model"]),
        "floor": folder_arm(options.baseline, device, floor_dtype(dtype), options.linears, hashes["baseline"]),
    }
    groups = _groups(options, open_checkpoint(options.model))
    sequences = read_sequences(plan, store)
    size = residual_size(options.baseline)
    cache = store.work / "tokens"

    def told(what: str, done: int, total: int) -> None:
        progress(f"token metrics, {what}", done, total)

    with group_arms(baseline, arms["model"], groups) as more:
        arms |= more
        measure_arms(baseline, arms, ranks.share(sequences), size, cache, told, keep_answers=ranks.world > 1)
    ranks.wait()
    return measure_arms(baseline, arms, sequences, size, cache) if ranks.is_first else {}


def read_sequences(plan: EvalPlan, store: Store) -> list[TokenSequence]:
    """Read what the baseline read and spoke; clips without a frame have nothing to be scored.

    Args:
        plan: The plan.
        store: The run's folder, with the baseline's clips.

    Returns:
        The sequences, named by `Job.stem`.
    """
    clips, found = store.clips(), []
    for job in plan.jobs("baseline"):
        clip = clips[job.key]
        if clip.error is None and clip.last_frames:
            tokens = load_array(store.sequence(job))
            ended = clip.stop_reason == "end"
            found.append(TokenSequence(id=job.stem, tokens=tokens, num_frames=clip.last_frames, ended=ended))
    return found


def residual_size(folder: Path) -> int:
    """Count the entries of a residual codebook that can be drawn, as `Engine` does.

    Args:
        folder: The checkpoint.

    Returns:
        The number.
    """
    return min(load_codec(folder).config.residual_size, open_checkpoint(folder).config.codebook_size)


def _measure_speed(options: EvalOptions, plan: EvalPlan, store: Store, progress: Progress) -> dict[str, Any]:
    """Time both arms; a run that has its timings keeps them."""
    from s2quant.evaluate.speed import measure_speed

    path = store.work / "speed.json"
    if path.is_file():
        return read_json(path)
    progress("timing", 0, 1)
    found = measure_speed(
        _folders(options),
        text=plan.utterances[0].text,
        num_frames=max(2, min(SPEED_FRAMES, plan.suite.max_frames)),
        repeats=SPEED_REPEATS,
        batch_sizes=tuple(dict.fromkeys((1, options.num_slots))),
        device=options.device,
        dtype=options.dtype,
        linears=options.linears,
        decoder=options.decoder,
        progress=lambda phase, done, total: progress(f"timing, {phase}", done, total),
    )
    with atomic_file(path, overwrite=True) as partial:
        write_json(partial, found)
    return found


def _finish(
    options: EvalOptions,
    plan: EvalPlan,
    facts: Mapping[str, Any],
    store: Store,
    backends: Backends,
    damages: Mapping[str, list[TokenDamage]],
    speed: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write records, results, summary and manifest."""
    stems = {job.stem: (job.utterance.id, job.seed) for job in plan.jobs("model")}
    own = {stems[one.id]: one for one in damages.get("model", [])}
    records = make_records(plan, store, backends, own)
    write_records(options.out / "records.jsonl", records)
    inputs = {"suite": facts["suite"], **facts["checkpoints"]}
    provenance = manifest(
        "eval", inputs, facts["device"], None, dtype=options.dtype, linears=options.linears, backends=facts["backends"]
    ) | {"versions": versions(LIBRARIES)}
    arms: dict[Arm, Any] = {"model": facts["arms"]["model"]}
    if "baseline" in plan.arms:
        arms |= {"baseline": facts["arms"]["baseline"], "floor": facts["arms"]["baseline"]}
    tokens = _summarise_tokens(options, damages)
    results = build_results(plan, records, backends, arms=arms, tokens=tokens, speed=speed, provenance=provenance)
    for name, table in (("results.json", results), ("manifest.json", provenance)):
        with atomic_file(options.out / name, overwrite=True) as partial:
            write_json(partial, table)
    write_summary(options.out / "summary.csv", results)
    return results


def _summarise_tokens(options: EvalOptions, damages: Mapping[str, list[TokenDamage]]) -> dict[str, Any] | None:
    """Make the section `tokens` of results.json."""
    found = summarise_tokens(damages.get("model", []), damages.get("floor", []))
    if found is None:
        return None
    checkpoint = open_checkpoint(options.model)
    groups = _groups(options, checkpoint)
    counts = count_quantized(checkpoint, groups) if groups else []
    rows = summarise_groups(groups, counts, [damages[group.name] for group in groups])
    return found | {"layer_groups": rows or None}
