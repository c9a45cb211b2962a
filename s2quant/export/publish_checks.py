"""What is refused before a folder is published: a broken one, an engine's export, another model's evaluation.

The files themselves are hashed; what a manifest says of them is compared, not believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2quant.checkpoint.reader import open_checkpoint
from s2quant.errors import UserError, shorten_list
from s2quant.export.measured import measured_rows
from s2quant.export.profiles import PROFILES
from s2quant.export.tensors import split
from s2quant.export.verify import inspect_folder
from s2quant.files import read_json, sha256_file, side_by_side
from s2quant.records import folder_hashes

RESULTS_VERSION = 1
CARDS = ("README.md", "NOTICE")  # written or edited on the way to the hub, so no hash of them is kept
_MODEL_SUFFIXES = (".safetensors", ".json", ".pth", ".jinja")


def is_model_file(name: str) -> bool:
    """Tell a file that makes the model what it is from documents beside it.

    Args:
        name: Name of a file directly in a checkpoint folder.

    Returns:
        Whether it is one: weights, codec, tokenizer or configuration.
    """
    return name.endswith(_MODEL_SUFFIXES) and not name.startswith(".") and name != "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest.

    Args:
        folder: The folder.

    Returns:
        The object; empty where there is none.

    Raises:
        UserError: The file is no JSON object.
    """
    path = folder / "manifest.json"
    return read_json(path) if path.is_file() else {}


def check_layout(folder: Path) -> None:
    """Refuse an export whose layout only another engine reads.

    Args:
        folder: A checkpoint folder.

    Raises:
        UserError: It is one.
    """
    record = read_manifest(folder)
    profile = record.get("profile")
    layout = PROFILES.get(profile) if record.get("stage") == "export" and isinstance(profile, str) else None
    if layout is not None and layout.convert is split:
        raise UserError(
            f"{folder} is an export for an engine, profile {profile}, which s2quant itself does not read",
            "a checkpoint folder in the layout of the original",
            "publish the folder that it was exported from",
        )


def checked_hashes(folder: Path) -> dict[str, str]:
    """Hash a folder's files, compare them with its manifest, and look at every value as `s2quant inspect` does.

    Args:
        folder: A checkpoint folder.

    Returns:
        sha256 by name, see `folder_hashes`.

    Raises:
        UserError: There is no such folder, it is an export for an engine, or anything in it is wrong; every fault is
            listed.
    """
    check_layout(folder)
    faults = list(inspect_folder(folder).faults)
    hashes = folder_hashes(folder)
    known = read_manifest(folder).get("files_sha256", {})
    if not isinstance(known, Mapping):
        faults.append("manifest.json: files_sha256 is no JSON object")
        known = {}
    for name in sorted(known.keys() - set(CARDS)):
        if name not in hashes:
            faults.append(f"{name} is in manifest.json, but not in the folder")
        elif hashes[name] != known[name]:
            faults.append(f"{name} is not the file that manifest.json has the hash of")
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
    check_layout(model)
    open_checkpoint(model)
    here = {path.name for path in model.iterdir() if path.is_file()}
    names = sorted(filter(is_model_file, here | set(hashes)))

    def is_other(name: str) -> bool:
        if name not in here or name not in hashes:
            return True
        source = model / name
        return not source.samefile(out / name) and sha256_file(source) != hashes[name]

    return [name for name, other in zip(names, side_by_side(is_other, names), strict=True) if other]


def read_results(evaluation: Path, model: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Read an evaluation and refuse one that was measured on other files than these.

    Args:
        evaluation: Its folder.
        model: The checkpoint folder, for messages.
        hashes: sha256 of the files in it.

    Returns:
        The object in results.json.

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
    here = {name: sha for name, sha in hashes.items() if is_model_file(name)}
    there = {name: sha for name, sha in (inputs.get("model") or {}).items() if is_model_file(name)}
    if not there:
        raise UserError(
            f"{path} holds no hashes of the model that it measured, so nothing says that it is {model}",
            "an evaluation with the hashes of its model's files",
            "evaluate this checkpoint with `s2quant eval`",
        )
    other = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if other:
        base = inputs.get("baseline") or {}
        is_base = here == {name: sha for name, sha in base.items() if is_model_file(name)}
        raise UserError(
            f"{evaluation} measured another model than {model}{', its baseline' if is_base else ''}: "
            f"{', '.join(other)} {'differs' if len(other) == 1 else 'differ'}",
            "an evaluation of this very checkpoint",
            "name the right --eval, or evaluate this checkpoint",
        )
    return found
