"""The folder of an evaluation, as the report needs it.

Refuses a folder without records or results, and results of another version; everything else may be missing.
Audio is looked up inside the folder only, so that a report never carries a file that is not part of the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2quant.errors import UserError
from s2quant.files import read_json, read_text
from s2quant.report.format import ARMS, get

RESULTS_VERSION = 1
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished evaluation.

    Args:
        folder: Where it lies.
        records: One per arm, utterance and seed.
        results: The object in results.json.
        index: The records by (arm, utterance, seed).
    """

    folder: Path
    records: Sequence[Record]
    results: dict[str, Any]
    index: dict[tuple[str, str, int], Record]

    def suite(self, key: str) -> Any:
        """Look up a fact of the suite.

        Args:
            key: A key of "suite" in results.json.

        Returns:
            The value, or None.
        """
        return get(self.results, "suite", key)

    def rows(self, key: str) -> list[dict[str, Any]]:
        """Take a list of objects from the results.

        Args:
            key: "metrics" or "failures".

        Returns:
            The objects; empty when there are none.
        """
        return [row for row in self.results.get(key) or [] if isinstance(row, dict)]

    def arm_label(self, arm: str) -> str:
        """Name an arm with its checkpoint.

        Args:
            arm: "baseline", "model" or "floor".

        Returns:
            For example "Model (w4a16)".
        """
        name = get(self.results, "arms", arm, "path_name")
        return f"{arm.capitalize()} ({name})" if name else arm.capitalize()

    def arms(self) -> list[str]:
        """Name the arms that the run has.

        Returns:
            Some of "baseline", "model", "floor", in this order.
        """
        spoken = {record["arm"] for record in self.records} | set(get(self.results, "arms") or {})
        return [arm for arm in ARMS if arm in spoken]

    def audio(self, relative: Any) -> Path | None:
        """Find an audio file of the run.

        Args:
            relative: Its path as a record has it, relative to the folder.

        Returns:
            The path; None when there is none, or it is not inside the folder.
        """
        if not isinstance(relative, str) or not relative:
            return None
        path, root = (self.folder / relative).resolve(), self.folder.resolve()
        return path if path.is_relative_to(root) and path.is_file() else None

    def pairs(self) -> list[tuple[str, int]]:
        """Name what can be listened to in both arms.

        Returns:
            (utterance, seed), sorted, of those whose two audio files exist.
        """
        both = {key[1:] for key in self.index if key[0] == "model"} & {
            key[1:] for key in self.index if key[0] == "baseline"
        }
        sides = ("baseline", "model")
        return sorted(key for key in both if all(self.audio(self.index[arm, *key].get("audio")) for arm in sides))


def load_run(folder: Path) -> Run:
    """Read the records and results of an evaluation.

    Args:
        folder: What `s2quant eval` wrote.

    Returns:
        The run.

    Raises:
        UserError: A file is absent or is not what it should be.
    """
    results = read_json(folder / "results.json")
    if results.get("results_version") != RESULTS_VERSION:
        raise UserError(
            f"{folder / 'results.json'}: results_version {results.get('results_version')!r}",
            f"results_version {RESULTS_VERSION}",
            "use the s2quant that wrote it, or run `s2quant eval` again",
        )
    records = _read_records(folder / "records.jsonl")
    index = {(record["arm"], record["utt"], record["seed"]): record for record in records}
    return Run(folder=folder, records=records, results=results, index=index)


def _read_records(path: Path) -> list[Record]:
    records = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _bad_record(path, number, str(error)) from error
        keys = {"arm": str, "utt": str, "seed": int}
        if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in keys.items()):
            raise _bad_record(path, number, "no arm, utt and seed")
        records.append(record)
    return records


def _bad_record(path: Path, number: int, reason: str) -> UserError:
    return UserError(
        f"{path}, line {number}: {reason}", "one record of an utterance per line", "run `s2quant eval --resume` again"
    )
