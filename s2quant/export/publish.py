"""Prepare a checkpoint folder for a model hub: a card with measured figures, everything else as it is, and upload it.

Figures come from an evaluation's results.json; a figure that was not measured is not written. Without figures the
card says so. Those of the folder that an export was made from are given with a sentence that says so, and stay out of
the hub's own table, which has no room for it. Nothing is uploaded unless asked for. A folder that was prepared says so
in its manifest.json and is uploaded as it stands, so that its card can be edited first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from s2quant.errors import UserError
from s2quant.export.card import FISH, Licence, licence_of
from s2quant.export.measured import eval_results, measured_table
from s2quant.export.publish_checks import checked_hashes, other_files, read_results
from s2quant.export.verify import CARDS
from s2quant.files import atomic_folder, check_new, read_text, sha256_file, write_json
from s2quant.records import manifest, read_manifest

MARK = "hub"  # key of a prepared folder's manifest.json
LARGE = (".safetensors", ".pth")  # weights and codec
_HTTP_ERRORS = HfHubHTTPError.__mro__[:2]  # its base is the HTTP library's own, which huggingface_hub has changed
START, END = "<!-- s2quant: measured -->", "<!-- s2quant: end of measured -->"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What is, or would be, uploaded.

    Args:
        folder: The folder prepared.
        files: Bytes by name within it.
        repo: The repository, if named.
    """

    folder: Path
    files: Mapping[str, int]
    repo: str | None


def prepare(model: Path, out: Path, evaluation: Path | None, repo: str | None) -> Upload:
    """Make a hub folder of a checkpoint: its files, and a card with the measured table.

    Weights and codec are linked where that can be; everything else is copied, so that it can be edited. Hidden files
    and folders (.git, .env) stay behind.

    Args:
        model: A sound checkpoint folder.
        out: The folder to make.
        evaluation: Folder of an evaluation of it, or None.
        repo: Where it shall go, "owner/name", or None.

    Returns:
        What would be uploaded.

    Raises:
        UserError: The checkpoint, the evaluation or the name cannot be used.
    """
    check_repo(repo)
    check_new(out)
    if model.resolve() in out.resolve().parents:
        raise UserError(f"{out} lies in {model}", "a folder outside the one that is published", "name another --out")
    hashes = checked_hashes(model)
    results, note = (None, "") if evaluation is None else read_results(evaluation, model, hashes)
    readme = model / "README.md"
    terms = licence_of(model)
    card = hub_card(read_text(readme) if readme.is_file() else "", model.absolute().name, results, terms, note)
    said = "".join(f"{name}: {value}\n" for name, value in terms.fields.items())
    record = read_manifest(model) or manifest("publish", {"model": hashes}, "cpu", None)
    named = record.get("files_sha256", {}) if record.get("stage") == "export" else hashes  # others it did not write
    record["files_sha256"] = {name: value for name, value in hashes.items() if name in named and name not in CARDS}
    record[MARK] = {"results_sha256": _results_sha256(evaluation)}

    def take(source: str, target: str) -> str:
        is_large = Path(source).parent == model and source.endswith(LARGE)
        return _link(source, target) if is_large else str(shutil.copyfile(source, target))

    with atomic_folder(out) as folder:
        shutil.copytree(model, folder, dirs_exist_ok=True, copy_function=take, ignore=shutil.ignore_patterns(".*"))
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "NOTICE").write_text(f"{terms.notice}\n\n{said}", encoding="utf-8")
        write_json(folder / "manifest.json", record)
    return _upload(out, repo)


def is_prepared(folder: Path) -> bool:
    """Tell whether a folder was made by `prepare`, which its manifest.json says.

    Args:
        folder: Any path.

    Returns:
        Whether it was.

    Raises:
        UserError: Its manifest.json is no JSON object.
    """
    return os.path.isdir(folder) and isinstance(read_manifest(folder).get(MARK), dict)


def take_up(model: Path, out: Path, evaluation: Path | None, repo: str | None) -> Upload:
    """Go on with a folder that was prepared before, as it stands: its card may have been edited.

    Args:
        model: The checkpoint folder that it was prepared from, or the prepared folder itself.
        out: The prepared folder.
        evaluation: Folder of the evaluation it was prepared with; None means whichever it was.
        repo: Where it shall go, "owner/name", or None.

    Returns:
        What would be uploaded.

    Raises:
        UserError: The folder was not prepared, not from this checkpoint or not with this evaluation, or is broken.
    """
    check_repo(repo)
    todo = "remove it or name another --out"
    if not is_prepared(out):
        raise UserError(
            f"{out} exists already, and nothing in it says that `s2quant publish` prepared it",
            "a path that is free, or a folder prepared from this checkpoint",
            todo,
        )
    hashes = checked_hashes(out)
    other = [] if model == out else other_files(model, out, hashes)
    if other:
        raise UserError(
            f"{out} exists already, and was not prepared from {model}: {', '.join(other)}",
            "a path that is free, or a folder prepared from this checkpoint",
            todo,
        )
    if evaluation is not None and read_manifest(out)[MARK].get("results_sha256") != _results_sha256(evaluation):
        raise UserError(
            f"{out} exists already, and was not prepared with the figures of {evaluation}",
            "the evaluation it was prepared with, or none named",
            f"leave --eval out to upload it as it is, or prepare it again: {todo}",
        )
    if not (out / "README.md").is_file():
        raise UserError(f"{out} has no README.md any more", "the card of the model", f"prepare it again: {todo}")
    return _upload(out, repo)


def push(upload: Upload, api: HfApi | None = None) -> str:
    """Upload a prepared folder with the user's own login.

    Args:
        upload: What `prepare` or `take_up` gave.
        api: The hub's client.

    Returns:
        Address of the commit.

    Raises:
        UserError: No repository is named, or the hub cannot be reached or refuses.
    """
    if upload.repo is None:
        raise UserError("--push without --repo", "the repository to upload to", "add --repo OWNER/NAME")
    check_repo(upload.repo)
    api = api or HfApi()
    try:
        api.create_repo(upload.repo, repo_type="model", exist_ok=True)
        commit = api.upload_folder(repo_id=upload.repo, folder_path=str(upload.folder), repo_type="model")
    except (OfflineModeIsEnabled, OSError, *_HTTP_ERRORS) as error:
        raise UserError(
            f"upload to {upload.repo}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error)}",
            "a hub that can be reached and a login that may write there",
            "log in with `hf auth login`, check the network, and give the same command again; "
            f"the folder {upload.folder} is kept and will be uploaded as it is",
        ) from error
    return str(commit)


def hub_card(text: str, name: str, results: Mapping[str, Any] | None, licence: Licence = FISH, note: str = "") -> str:
    """Put licence, base model and the measured table into a model card; an earlier table is replaced.

    Args:
        text: The card so far; may be empty.
        name: Name of the model.
        results: The object in results.json, or None.
        licence: Of the weights.
        note: That the figures are those of another folder with the same weights; a sentence. They are then left out
            of the metadata.

    Returns:
        README.md with its metadata block.
    """
    body = ModelCard(text, ignore_metadata_errors=True).text.strip() if text else f"# {name}"
    if START in body and END in body:
        body = (body[: body.index(START)] + body[body.index(END) + len(END) :]).strip()
    if licence.notice not in body:
        body = f"{body}\n\n{licence.notice}"
    known = ModelCard(text, ignore_metadata_errors=True).data.to_dict() if text else {}
    known.pop("model-index", None)
    fields = known | dict(licence.fields) | {"pipeline_tag": "text-to-speech"}
    evaluated = {} if results is None or note else {"model_name": name, "eval_results": eval_results(results)}
    data = ModelCardData(**fields, **evaluated)
    measured = "Speech was not measured." if results is None else measured_table(results, note)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n\n{START}\n## Measured\n\n{measured}\n{END}\n"


def check_repo(repo: str | None) -> None:
    """Refuse a name that is no repository's.

    Args:
        repo: What was given as --repo.

    Raises:
        UserError: It is not "owner/name".
    """
    if repo is None:
        return
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--repo {repo}: {error}", "OWNER/NAME", "correct it") from error
    if "/" not in repo:
        raise UserError(f"--repo {repo}: no owner", "OWNER/NAME", f"put your name or organisation before it: ME/{repo}")


def _upload(out: Path, repo: str | None) -> Upload:
    files = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    return Upload(folder=out, files=files, repo=repo)


def _results_sha256(evaluation: Path | None) -> str | None:
    """Hash an evaluation's results, if there is one."""
    if evaluation is None:
        return None
    path = evaluation / "results.json"
    read_text(path)  # says what is wrong with it
    return sha256_file(path)


def _link(source: str, target: str) -> str:
    """Link a file, not a link to it, where the disk allows that, else copy it."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
    return target
