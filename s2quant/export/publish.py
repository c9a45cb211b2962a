"""Prepare a checkpoint folder for a model hub: a card with measured figures, everything else as it is, and upload it.

Figures come from an evaluation's results.json; a figure that was not measured is not written. Without figures the
card says so. Nothing is uploaded unless asked for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from s2quant.checkpoint.reader import open_checkpoint
from s2quant.errors import UserError
from s2quant.export.card import FISH, Licence, licence_of
from s2quant.files import atomic_folder, check_new, read_json, read_text

RESULTS_VERSION = 1
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
    """Make a hub folder of a checkpoint: its files, linked where that can be, and a card with the measured table.

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
    if repo is not None:
        _check_repo(repo)
    check_new(out)
    checkpoint = open_checkpoint(model)
    results = None if evaluation is None else _results(evaluation, checkpoint.folder)
    readme = model / "README.md"
    terms = licence_of(model)
    card = hub_card(read_text(readme) if readme.is_file() else "", model.absolute().name, results, terms)
    with atomic_folder(out) as folder:
        shutil.copytree(model, folder, dirs_exist_ok=True, copy_function=_link)
        (folder / "README.md").unlink(missing_ok=True)  # a link: writing through it would change the source
        (folder / "README.md").write_text(card, encoding="utf-8")
        said = "".join(f"{name}: {value}\n" for name, value in terms.fields.items())
        (folder / "NOTICE").unlink(missing_ok=True)
        (folder / "NOTICE").write_text(f"{terms.notice}\n\n{said}", encoding="utf-8")
    files = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    return Upload(folder=out, files=files, repo=repo)


def push(upload: Upload, api: HfApi | None = None) -> str:
    """Upload a prepared folder with the user's own login.

    Args:
        upload: What `prepare` made.
        api: The hub's client.

    Returns:
        Address of the commit.

    Raises:
        UserError: No repository is named, or the hub cannot be reached or refuses.
    """
    if upload.repo is None:
        raise UserError("--push without --repo", "the repository to upload to", "add --repo OWNER/NAME")
    api = api or HfApi()
    try:
        api.create_repo(upload.repo, repo_type="model", exist_ok=True)
        commit = api.upload_folder(repo_id=upload.repo, folder_path=str(upload.folder), repo_type="model")
    except (OfflineModeIsEnabled, OSError, *_HTTP_ERRORS) as error:
        raise UserError(
            f"upload to {upload.repo}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error)}",
            "a hub that can be reached and a login that may write there",
            f"log in with `hf auth login`, check the network, and try again; the folder {upload.folder} is kept",
        ) from error
    return str(commit)


def hub_card(text: str, name: str, results: Mapping[str, Any] | None, licence: Licence = FISH) -> str:
    """Put licence, base model and the measured table into a model card; an earlier table is replaced.

    Args:
        text: The card so far; may be empty.
        name: Name of the model.
        results: The object in results.json, or None.
        licence: Of the weights.

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
    evaluated = {} if results is None else {"model_name": name, "eval_results": _eval_results(results)}
    data = ModelCardData(**fields, **evaluated)
    measured = "Speech was not measured." if results is None else measured_table(results)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n\n{START}\n## Measured\n\n{measured}\n{END}\n"


def measured_table(results: Mapping[str, Any]) -> str:
    """Write the metrics as a table in markdown.

    Args:
        results: The object in results.json.

    Returns:
        Suite, table and verdict.
    """
    suite = results["suite"]
    lines = [
        f"Suite {suite['name']} version {suite['version']}, {suite['num_utterances']} utterances, "
        f"seeds {', '.join(map(str, suite['seeds']))}; the baseline spoke in the same runtime.",
        "",
        "| metric | unit | backend | baseline | this model | difference [95 % interval] | noise floor | n |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in results["metrics"]:
        low_high = "" if row.get("interval") is None else " [{}, {}]".format(*map(_number, row["interval"]))
        cells = [row["name"], row["unit"], row["backend"] or "", _number(row["baseline"]), _number(row["model"])]
        cells += [_number(row["delta"]) + low_high, _number(row["floor_delta"]), str(row["n"])]
        lines.append(f"| {' | '.join(cells)} |")
    sentence = (results.get("verdict") or {}).get("sentence")
    return "\n".join(lines + (["", f"Verdict: {sentence}."] if sentence else []))


def _eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    suite = results["suite"]
    return [
        EvalResult(
            task_type="text-to-speech",
            dataset_type=suite["name"],
            dataset_name=f"s2quant suite {suite['name']}",
            dataset_revision=str(suite["sha256"]),
            metric_type="wer" if row["name"].startswith("WER") else row["name"],
            metric_name=row["name"],
            metric_value=row["model"],
        )
        for row in results["metrics"]
        if row["model"] is not None
    ]


def _results(folder: Path, model: Path) -> dict[str, Any]:
    """Read results.json and refuse one that was measured on another checkpoint."""
    found = read_json(folder / "results.json")
    faults = [key for key in ("suite", "metrics") if not found.get(key)]
    if found.get("results_version") != RESULTS_VERSION or faults:
        raise UserError(
            f"{folder / 'results.json'}: version {found.get('results_version')!r}, without {', '.join(faults) or '-'}",
            f"results of version {RESULTS_VERSION} with suite and metrics",
            "evaluate again with this s2quant",
        )
    measured = ((found.get("provenance") or {}).get("inputs") or {}).get("model") or {}
    manifest = model / "manifest.json"
    known = read_json(manifest).get("files_sha256", {}) if manifest.is_file() else {}
    other = sorted(name for name in measured.keys() & known.keys() if measured[name] != known[name])
    if other:
        raise UserError(
            f"{folder} measured other weights than those in {model}: {', '.join(other)}",
            "an evaluation of this very checkpoint",
            "name the right --eval, or evaluate this checkpoint",
        )
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _link(source: str, target: str) -> str:
    """Link a file where the disk allows it, else copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--repo {repo}: {error}", "OWNER/NAME", "correct it") from error
