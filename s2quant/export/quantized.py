"""The whole job: recipe and model in, a verified quantized checkpoint folder out.

What is finished is kept in `OUT.partial` until the folder stands under its final name, so a run that was stopped at
any moment goes on with `resume`, and ends with the same bytes. Several processes can share the work
(`s2quant.quantize.exchange`): they end with the bytes of one alone, and the first of them writes the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from s2quant.calibrate.lines import CalibrationLine
from s2quant.calibrate.sequences import CalibrationSet, save_set
from s2quant.checkpoint.reader import Checkpoint, open_checkpoint
from s2quant.checkpoint.writer import MAX_SHARD_BYTES, check_carried
from s2quant.errors import UserError
from s2quant.export.calibration import (
    Report,
    calibration_facts,
    calibration_lines,
    calibration_set,
    keeps_groups,
    kept_set,
    remove_groups,
    set_key,
    split_batches,
    spoken_set,
    stored_set,
)
from s2quant.export.card import licence_of, model_card
from s2quant.export.config_files import merged_config, quantization_config
from s2quant.export.following import Follower
from s2quant.export.memory import LOW_MEMORY_SLOTS, calibration_slots, device_cap, host_peak_bytes, take_peak_bytes
from s2quant.export.verify import verify_quantized
from s2quant.files import atomic_folder, check_new, disk_errors, partial_folder, read_json, sha256_file, write_json
from s2quant.prompt import Tokenizer
from s2quant.quantize.exchange import Exchange
from s2quant.quantize.gptq import check_gptqmodel, warm_up
from s2quant.quantize.loop import num_stages, quantize_stages
from s2quant.quantize.plan import Plan, make_plan
from s2quant.quantize.store import IDENTITY, RUN_VERSION, SPEECH, StageStore
from s2quant.recipe import LinearSettings, Recipe, load_recipe
from s2quant.records import folder_hashes, manifest, versions
from s2quant.runtime.load import device_name, parse_device

_MADE_FROM = (("model", "sha256"), ("recipe", "sha256"), ("calibration", "key"))  # in the manifest's inputs
DETAILS = "s2quant"  # subfolder of the checkpoint with recipe, records and calibration set


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What `s2quant quantize` is asked for.

    Args:
        recipe: The recipe file.
        model: The bf16 checkpoint folder.
        out: The folder to make.
        device: Where to work.
        calibration: A stored calibration set to use, or to make for later use; None keeps it with the run.
        resume: Whether to go on with a stopped run.
        eval_folder: Texts that calibration must not contain; None skips the check when there is no such folder.
        num_sequences: Calibration sequences, instead of the recipe's number.
        num_slots: Utterances in progress at a time while calibration lines are spoken; None: see
            `s2quant.export.memory.calibration_slots`.
        max_shard_bytes: Shard limit of the output.
        low_memory: Whether to stay under `memory.LOW_MEMORY_BYTES` of device memory: see `s2quant.export.memory`.
        exchange: The processes that share the work.
    """

    recipe: Path
    model: Path
    out: Path
    device: str = "cpu"
    calibration: Path | None = None
    resume: bool = False
    eval_folder: Path | None = None
    num_sequences: int | None = None
    num_slots: int | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    low_memory: bool = False
    exchange: Exchange = field(default_factory=Exchange)

    @property
    def codec_device(self) -> torch.device | None:
        """Where voices are encoded; None: on the device."""
        return torch.device("cpu") if self.low_memory else None


def quantize_checkpoint(
    options: QuantizeOptions, report: Report = lambda phase, done, total: None
) -> Sequence[Mapping[str, Any]]:
    """Quantize a checkpoint by a recipe.

    Args:
        options: What to do.
        report: Told of progress.

    Returns:
        One record per quantized module.

    Raises:
        UserError: Something in the input cannot be used; nothing stands under the final name.
        VerificationError: The folder written is not what was made; nothing stands under the final name.
    """
    exchange = options.exchange
    finished = exchange.agree(options.resume and (options.out / "manifest.json").exists())  # after its last step
    if not finished:
        exchange.once(lambda: check_new(options.out))
    recipe = load_recipe(options.recipe)
    device = parse_device(options.device)
    checkpoint = open_checkpoint(options.model)
    if checkpoint.is_quantized:
        raise UserError(f"{options.model} is quantized already", "a bf16 checkpoint", "quantize the original")
    plan = make_plan(recipe, checkpoint.config)
    if not plan.quantized:
        raise UserError(f"recipe {recipe.name} quantizes nothing", "at least one rule that quantizes", "add one")
    lines = calibration_lines(recipe, options.eval_folder, options.num_sequences)
    num_slots = _num_slots(options, checkpoint, recipe, lines, device)
    check_carried(options.model)
    Tokenizer.load(options.model, checkpoint.config)
    report("hashing the model", 0, 1)
    # Hashed in C, beside all else until it is needed; what takes seconds once, beside loading the model.
    with ThreadPoolExecutor(2) as pool, device_cap(device if options.low_memory else None):
        hashes = pool.submit(folder_hashes, options.model) if exchange.is_first else None
        solved = [module.settings for module in plan.modules if module.settings and module.settings.method == "gptq"]
        warmed: Future[None] | None = None
        if not finished and solved:
            check_gptqmodel(device)
            warmed = pool.submit(_warm_up, solved, device, exchange)

        def wait() -> None:
            if warmed is not None:
                warmed.result()

        spoken = None
        if not finished and exchange.once(lambda: _is_fresh(options)):  # nothing that the hashes are compared with
            spoken = _spoken(options, recipe, checkpoint, lines, device, num_slots, report, wait)
        wait()
        model_sha256 = exchange.agree({} if hashes is None else hashes.result())
        identity = _identity(recipe, model_sha256, lines, device, num_slots, options.low_memory)
        if finished:
            return _finished_records(options.out, identity, exchange)
        store, calibration = _start(options, recipe, checkpoint, lines, identity, device, report, spoken)
        peak_calibration_bytes = take_peak_bytes(device)
        batches, num_held = split_batches(calibration, recipe, checkpoint.config.pad_id)
        total, done = num_stages(plan), 0

        def stage_done(name: str) -> None:
            nonlocal done
            done += 1
            report(name, done, total)

        report("quantizing", 0, total)
        rest = torch.device("cpu") if options.low_memory else None
        files = Follower(options.out, checkpoint, plan, store, options.max_shard_bytes)
        with ExitStack() as stack:
            exchange.once(lambda: _entered(stack, files))
            records = quantize_stages(checkpoint, plan, batches, num_held, store, device, stage_done, exchange, rest)
            report("writing", 0, 1)
            facts = {
                "model": {"folder": options.model.name, "sha256": model_sha256},
                "recipe": {"name": recipe.name, "sha256": recipe.sha256},
                "calibration": calibration_facts(calibration, checkpoint),
            }
            peaks = {
                "peak_device_bytes": take_peak_bytes(device),
                "peak_calibration_bytes": peak_calibration_bytes,
                "peak_host_bytes": host_peak_bytes(),
            }
            record = manifest(
                "quantize",
                facts,
                device_name(device),
                recipe.calibration.seed,
                **peaks,
                low_memory=options.low_memory,
                num_slots=num_slots,
                num_processes=exchange.world,
                processes=list(exchange.merge({exchange.rank: peaks}).values()),
                num_quantized=len(plan.quantized),
                num_tensors=plan.num_tensors,
                tensor_bytes=plan.num_bytes,
            )
            exchange.once(lambda: _write(options, checkpoint, plan, store, records, calibration, record, files))
        if not exchange.is_first:
            remove_groups(store.folder)  # on a disk that is not the first one's
    report("done", 1, 1)
    return records


def _num_slots(
    options: QuantizeOptions,
    checkpoint: Checkpoint,
    recipe: Recipe,
    lines: Sequence[CalibrationLine],
    device: torch.device,
) -> int:
    """Say how many lines are spoken at a time: the same in all processes, whatever their GPUs."""
    exchange = options.exchange
    own = calibration_slots(options.num_slots, checkpoint, recipe.calibration, lines, device)
    least = min(exchange.merge({exchange.rank: own}).values())
    return min(least, LOW_MEMORY_SLOTS) if options.low_memory else least


def _finished_records(out: Path, identity: Mapping[str, Any], exchange: Exchange) -> Sequence[Mapping[str, Any]]:
    """Read the records of a folder that this run finished, and clear away what was kept to resume it."""
    inputs = read_json(out / "manifest.json").get("inputs", {})
    made_from = [inputs.get(name, {}).get(key) for name, key in _MADE_FROM]
    if made_from != [identity[key] for key in ("model_sha256", "recipe_sha256", "calibration_key")]:
        raise UserError(
            f"{out} exists already and was made from another model, recipe or calibration",
            "a path that is free, or the folder that this run was making",
            "remove it or name another --out",
        )
    records: Sequence[Mapping[str, Any]] = read_json(out / DETAILS / "records.json")["modules"]
    if exchange.is_first and partial_folder(out).exists():
        with disk_errors(out):
            shutil.rmtree(partial_folder(out))
    return records


def _spoken(
    options: QuantizeOptions,
    recipe: Recipe,
    checkpoint: Checkpoint,
    lines: Sequence[CalibrationLine],
    device: torch.device,
    num_slots: int,
    report: Report,
    wait: Callable[[], None],
) -> CalibrationSet:
    """Let the model speak, when nothing is there yet; what cannot be spoken leaves nothing."""
    exchange, folder = options.exchange, partial_folder(options.out)
    where = (device, num_slots, exchange, report, options.codec_device, folder / SPEECH)
    try:
        return spoken_set(recipe, checkpoint, lines, *where, wait)
    except UserError as error:
        if not keeps_groups(folder, error):
            remove_groups(folder)
        raise


def _start(
    options: QuantizeOptions,
    recipe: Recipe,
    checkpoint: Checkpoint,
    lines: Sequence[CalibrationLine],
    identity: Mapping[str, Any],
    device: torch.device,
    report: Report,
    spoken: CalibrationSet | None,
) -> tuple[StageStore, CalibrationSet]:
    """Open the run's folder, and find, keep or make the calibration set in it."""
    exchange, key, folder = options.exchange, identity["calibration_key"], partial_folder(options.out)
    if options.calibration is not None and options.calibration.exists():
        stored_set(options.calibration, key, checkpoint)
    elif options.calibration is not None:
        check_new(options.calibration)
    is_new = not folder.exists()
    goes_on = options.resume or (spoken is not None and not (folder / IDENTITY).exists())  # with its own groups
    store = exchange.once(lambda: StageStore.open(folder, identity, goes_on))
    path = options.calibration or folder / "calibration.safetensors"
    try:
        if spoken is not None:
            return store, kept_set(spoken, key, path, exchange)
        where = (device, identity["num_slots"], exchange, report, options.codec_device, folder / SPEECH)
        return store, calibration_set(path, recipe, checkpoint, lines, key, *where)
    except UserError:
        if is_new and exchange.is_first:  # nothing is finished, so there is nothing to resume
            shutil.rmtree(folder)
        raise


def _entered(stack: ExitStack, files: Follower) -> None:
    stack.enter_context(files)


def _warm_up(settings: Sequence[LinearSettings], device: torch.device, exchange: Exchange) -> None:
    """Do in a thread of its own what takes seconds once: compile kernels, load libraries, connect GPUs."""
    if device.index is not None:
        torch.cuda.set_device(device)  # the thread's
    warm_up(settings, device)
    exchange.connect(device)


def _is_fresh(options: QuantizeOptions) -> bool:
    """Tell whether nothing is there that an earlier run made: no folder of its own, no calibration set."""
    if options.calibration is not None and not options.calibration.exists():
        check_new(options.calibration)
    return not partial_folder(options.out).exists() and not (options.calibration and options.calibration.exists())


def _identity(
    recipe: Recipe,
    model_sha256: Mapping[str, str],
    lines: Sequence[CalibrationLine],
    device: torch.device,
    num_slots: int,
    low_memory: bool,
) -> dict[str, Any]:
    """Name all that the bytes of the result depend on."""
    return {
        "run_version": RUN_VERSION,
        "recipe_sha256": recipe.sha256,
        "model_sha256": dict(model_sha256),
        "calibration_key": set_key(recipe, lines, model_sha256),
        "num_slots": num_slots,
        "device": device_name(device),
        # a GPU leaves the host only the codec of --low-memory
        "num_threads": torch.get_num_threads() if device.type == "cpu" or low_memory else None,
        "versions": versions(),
    }


def _write(
    options: QuantizeOptions,
    checkpoint: Checkpoint,
    plan: Plan,
    store: StageStore,
    records: Sequence[Mapping[str, Any]],
    calibration: CalibrationSet,
    record: Mapping[str, Any],
    files: Follower,
) -> None:
    """Complete the folder, open it again and verify it, give it its name, and remove what the run kept."""
    quantization = quantization_config(plan, records)
    facts = record["inputs"]["calibration"]
    sentence = (
        f"{facts['num_sequences']} sequences, {facts['num_positions']} positions, {facts['num_frames']} of them audio "
        f"frames spoken by the bf16 model; dropped clips: {facts['dropped'] or 'none'}"
    )
    with atomic_folder(options.out, within=store.folder) as folder:
        hashes = files.move(folder)
        write_json(folder / "config.json", merged_config(checkpoint.config.raw, quantization))
        write_json(folder / "quantize_config.json", quantization)
        card = model_card(plan, records, sentence, quantization, licence_of(options.model))
        (folder / "README.md").write_text(card, encoding="utf-8")
        details = folder / DETAILS
        details.mkdir()
        (details / "recipe.yaml").write_text(plan.recipe.text, encoding="utf-8")
        write_json(details / "records.json", {"modules": list(records)})
        save_set(calibration, details / "calibration.safetensors")

        def digest(path: Path) -> str:  # nothing is hashed twice
            known: Mapping[str, str] = hashes if path.parent == folder else record["inputs"]["model"]["sha256"]
            return known.get(path.name, "not there when the others were hashed")

        verify_quantized(folder, options.model, plan, records, digest)
        small = {
            path.name: sha256_file(path) for path in folder.iterdir() if path.is_file() and path.name not in hashes
        }
        write_json(folder / "manifest.json", dict(record) | {"files_sha256": dict(sorted((hashes | small).items()))})
    with disk_errors(options.out):
        shutil.rmtree(store.folder)
