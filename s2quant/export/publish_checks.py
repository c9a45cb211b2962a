"""What is refused before a folder is published: a broken one, another model's evaluation.

The files themselves are hashed; what a manifest says of them is compared, not believed. Two things only an export's
manifest can say, and only of files that are as it wrote them: which folder it was made from, whose figures are then
its own, and that a layout which s2quant does not read was compared with that folder, value by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2quant.checkpoint.foreign import is_foreign
from s2quant.checkpoint.reader import open_checkpoint
from s2quant.errors import UserError, shorten_list
from s2quant.export.measured import measured_rows
from s2quant.export.profiles import PROFILES, Layout
from s2quant.export.verify import hash_faults, inspect_folder
from s2quant.files import read_json, sha256_file, side_by_side
from s2quant.records import folder_hashes, input_facts, read_manifest

RESULTS_VERSION = 1
_MODEL_SUFFIXES = (".safetensors", ".json", ".pth", ".jinja")


def is_model_file(name: str) -> bool:
    """Tell a file that makes the model what it is from documents beside it.

    Args:
        name: Name of a file directly in a checkpoint folder.

    Returns:
        Whether it is one: weights, codec, tokenizer or configuration.
    """
    return name.endswith(_MODEL_SUFFIXES) and not name.startswith(".") and name != "manifest.json"


def _layout(record: Mapping[str, Any]) -> Layout | None:
    """Name the layout of an export; None for what is none."""
    profile = record.get("profile")
    return PROFILES.get(profile) if record.get("stage") == "export" and isinstance(profile, str) else None


def checked_hashes(folder: Path) -> dict[str, str]:
    """Hash a folder's files, compare them with its manifest, and look at every value as `s2quant inspect` does.

    Values in a layout that s2quant does not read are not looked at: every file has to be the one that was compared with
    the source when it was exported.

    Args:
        folder: A checkpoint folder.

    Returns:
        sha256 by name, see `folder_hashes`.

    Raises:
        UserError: There is no such folder, or anything in it is wrong; every fault is listed.
    """
    record = read_manifest(folder)
    faults = list(inspect_folder(folder).faults) if not is_foreign(record) else []
    hashes = folder_hashes(folder)
    faults += hash_faults(record, hashes)
    if is_foreign(record):
        unknown = sorted(_model_files(hashes).keys() - _model_files(record.get("files_sha256")).keys())
        faults += [f"{name} is not in manifest.json, and s2quant cannot read this layout" for name in unknown]
    if faults:
        raise UserError(
            f"checkpoint {folder}:\n{shorten_list(faults)}",
            "a sound checkpoint, its files those of its manifest.json",
            "make the folder again or restore it from its source",
        )
    return hashes


def other_files(model: Path, out: Path, hashes: Mapping[str, str]) -> list[str]:
    """Name the model files in which a prepared folder differs from its source.

    Args:
        model: The source.
        out: The prepared folder.
        hashes: Of the prepared folder's files.

    Returns:
        Names of files that differ or are in one of the two only; a file that is linked is not read again.

    Raises:
        UserError: The source is no checkpoint folder.
    """
    if not is_foreign(read_manifest(model)):
        open_checkpoint(model)
    here = {path.name for path in model.iterdir() if path.is_file()}
    names = sorted(filter(is_model_file, here | set(hashes)))

    def is_other(name: str) -> bool:
        if name not in here or name not in hashes:
            return True
        source = model / name
        return not source.samefile(out / name) and sha256_file(source) != hashes[name]

    return [name for name, other in zip(names, side_by_side(is_other, names), strict=True) if other]


def read_results(evaluation: Path, model: Path, hashes: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Read an evaluation and refuse one that was measured on other files than these, or those they were exported from.

    Args:
        evaluation: Its folder.
        model: The checkpoint folder, for messages.
        hashes: sha256 of the files in it.

    Returns:
        The object in results.json, and what a card must say of its figures: a sentence where they are the source's.

    Raises:
        UserError: It cannot be used, measured another model, or does not say which.
    """
    path = evaluation / "results.json"
    found = read_json(path)
    if found.get("results_version") != RESULTS_VERSION or not found.get("suite") or not measured_rows(found):
        raise UserError(
            f"{path}: version {found.get('results_version')!r}, "
            f"{'with' if found.get('suite') else 'without'} a suite, {len(measured_rows(found))} figures",
            f"results of version {RESULTS_VERSION} with a suite and figures",
            "evaluate again with this s2quant",
        )
    inputs = (found.get("provenance") or {}).get("inputs") or {}
    here, there = _model_files(hashes), _model_files(inputs.get("model"))
    if not there:
        raise UserError(
            f"{path} holds no hashes of the model that it measured, so nothing says that it is {model}",
            "an evaluation with the hashes of its model's files",
            "evaluate this checkpoint with `s2quant eval`",
        )
    record = read_manifest(model)
    layout, source = _layout(record), _source_files(record, here)
    if layout is not None and there == source != here:
        return found, (
            f"Measured by s2quant on the folder that this one was exported from: {layout.weights}. "
            "`manifest.json` has the hashes of both."
        )
    other = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if other:
        is_base = here == _model_files(inputs.get("baseline"))
        raise UserError(
            f"{evaluation} measured another model than {model}{', its baseline' if is_base else ''}: "
            f"{', '.join(other)} {'differs' if len(other) == 1 else 'differ'}",
            f"an evaluation of this very checkpoint{', or of the one it was exported from' if source else ''}",
            "name the right --eval, or evaluate this checkpoint",
        )
    return found, ""


def _model_files(hashes: Any) -> dict[str, str]:
    """Keep the hashes of model files."""
    return {name: sha for name, sha in hashes.items() if is_model_file(name)} if isinstance(hashes, Mapping) else {}


def _source_files(record: Mapping[str, Any], here: Mapping[str, str]) -> dict[str, str]:
    """Give the hashes of an export's source; none unless every file here is as the export wrote it."""
    written = record.get("files_sha256") if record.get("stage") == "export" else None
    is_as_written = isinstance(written, Mapping) and here == _model_files(written)
    return _model_files(input_facts(record, "model")) if is_as_written else {}
