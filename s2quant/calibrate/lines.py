"""Calibration lines: the texts that the model to be quantized is shown or speaks.

A source is a `.jsonl` or `.json` file of objects, a `.parquet` table, a `.txt` file with a text on each line, or
`hf:NAME[:SPLIT][:COLUMN]` for a set of the Hugging Face hub, the only kind that may use the network.
Parquet and the hub go through `datasets`; the others need no library.
The schema stands in `recipes/README.md`. Every offender of a source is named in one message: a row that is not
JSON, an unknown key, a text that is missing or empty, an id that comes twice. Calibrating on a text that the
evaluation measures is refused by `check_disjoint`.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2quant.errors import UserError, shorten_list
from s2quant.files import read_text, sha256_file, sha256_text

KEYS = ("id", "lang", "text", "voice")
SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
HUB_PREFIX = "hf:"
# The split may carry a slice, which has a colon of its own: hf:owner/name:train[:500]:sentence
_HUB_SOURCE = re.compile(r"hf:(?P<name>[\w./-]+)(?::(?P<split>[\w.+-]+(?:\[[^\]]*\])?))?(?::(?P<column>[^:]+))?")
_SPEAKER = re.compile(r"<\|speaker:\d+\|>")
_TAG = re.compile(r"\[[^\[\]]*\]")
_MAX_FAULTS = 50


@dataclass(frozen=True, kw_only=True)
class CalibrationLine:
    """One text to calibrate on.

    Args:
        id: Unique within its source.
        text: What is spoken, with inline [tags] and speaker marks as the model takes them.
        lang: Language code such as "en", or None when the source does not say.
        voice: File name of the recording whose voice speaks it, or None for the model's own choice.
    """

    id: str
    text: str
    lang: str | None = None
    voice: str | None = None


# One row of a source before it is checked: how messages name it, its number from 1, and what stood there.
_Row = tuple[str, int, Any]


def read_lines(source: Path | str) -> list[CalibrationLine]:
    """Read and check a whole calibration source.

    Other columns of a parquet table or a hub set are passed over; in a `.jsonl` or `.json` file they are refused.
    Blank lines of a `.txt` file and blank texts of a hub set are passed over; elsewhere they are refused.
    A row without an id is called `row-N`, N counting from 1.

    Args:
        source: A file, or `hf:NAME[:SPLIT][:COLUMN]` (split "train" and column "text" unless named).

    Returns:
        The lines in the order of the source; at least one.

    Raises:
        UserError: The source cannot be read, is of an unknown kind, is empty, or has bad rows; all are listed.
    """
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        return _lines(_hub_rows(source), source)
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"calibration source {source}",
            f"a file ending in {', '.join(SUFFIXES)}, or hf:NAME[:SPLIT][:COLUMN]",
            "rename or convert the file",
        )
    if suffix == ".parquet":
        return _lines(_parquet_rows(path), str(path))
    text = read_text(path)
    if suffix == ".jsonl":
        return _lines(_jsonl_rows(text), str(path))
    if suffix == ".json":
        return _lines(_json_rows(text, path), str(path))
    rows = ((f"line {number}", number, {"text": line}) for number, line in enumerate(text.split("\n"), 1))
    return _lines((row for row in rows if row[2]["text"].strip()), str(path))


def select_lines(lines: Sequence[CalibrationLine], num: int, seed: int) -> list[CalibrationLine]:
    """Choose lines at random, the same ones for the same seed.

    The choice is `random.Random(seed).sample(lines, num)`, in the order drawn: it does not return to the order of
    the source, so any prefix of it is a random choice as well.

    Args:
        lines: The lines of a source.
        num: How many to choose.
        seed: Seed of the draw.

    Returns:
        `num` different lines.

    Raises:
        UserError: More lines are asked for than there are, or fewer than one.
    """
    if not 1 <= num <= len(lines):
        raise UserError(
            f"{num} lines wanted from a calibration source of {len(lines)} lines",
            f"a number from 1 to {len(lines)}",
            "give --sequences (or calibration.num_sequences in the recipe) a lower number, or name a longer source",
        )
    return random.Random(seed).sample(list(lines), num)


def check_disjoint(lines: Iterable[CalibrationLine], eval_folder: Path) -> None:
    """Refuse calibration texts that the evaluation measures.

    Texts are compared by their words alone, as `normalize_text` leaves them.

    Args:
        lines: The calibration lines.
        eval_folder: Folder with the suites' texts: objects with a "text" in the `*.jsonl` files in it and in the
            folders below it. When it is absent nothing is compared.

    Raises:
        UserError: A text stands in both, or a file of the evaluation is not JSONL; every offender is listed.
    """
    measured: dict[str, str] = {}
    faults: list[str] = []
    for path in sorted(eval_folder.rglob("*.jsonl")):
        for where, number, row in _jsonl_rows(read_text(path)):
            if isinstance(row, json.JSONDecodeError):
                faults.append(f"{path}: {where}: {_syntax(row)}")
            elif isinstance(row, dict) and isinstance(row.get("text"), str):
                measured.setdefault(normalize_text(row["text"]), f"{path.name} line {number}")
    if faults:
        raise UserError(
            f"texts of the evaluation that are not JSON:\n{shorten_list(faults, _MAX_FAULTS)}",
            "a JSON object on every line",
            "restore the files from their source",
        )
    keys = ((line, normalize_text(line.text)) for line in lines)
    shared = [f"{line.id}: {line.text!r} is {measured[key]}" for line, key in keys if key and key in measured]
    if shared:
        raise UserError(
            f"{len(shared)} calibration text(s) that the evaluation measures:\n{shorten_list(shared, _MAX_FAULTS)}",
            f"calibration texts that stand nowhere in {eval_folder}",
            "take them out of the calibration source; a model must not be measured on what it was calibrated on",
        )


def normalize_text(text: str) -> str:
    """Reduce a text to its words, to tell whether two texts are the same.

    Args:
        text: A text with tags and speaker marks.

    Returns:
        Its letters, marks and digits in compatibility form (NFKC), case folded, single spaces between words; tags,
        speaker marks, punctuation and symbols are gone.
    """
    plain = _TAG.sub(" ", _SPEAKER.sub(" ", text))
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", plain).casefold())
    return " ".join("".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in folded).split())


def lines_sha256(lines: Iterable[CalibrationLine]) -> str:
    """Hash lines: ids, texts, languages, voices and their order, whatever file they came from.

    Args:
        lines: The lines.

    Returns:
        64 lower-case hexadecimal digits.
    """
    return sha256_text("".join(json.dumps(asdict(line), sort_keys=True) + "\n" for line in lines))


def voice_hashes(lines: Iterable[CalibrationLine], folder: Path) -> dict[str, str]:
    """Hash what lines are spoken with: a voice's recording, and its transcript in a .txt file beside it.

    Args:
        lines: The lines.
        folder: Where recordings are.

    Returns:
        Both hashes by file name, sorted; empty where no line names a voice.

    Raises:
        UserError: A file is not there or cannot be read.
    """
    found = {}
    for voice in sorted({line.voice for line in lines if line.voice is not None}):
        files = [folder / voice, (folder / voice).with_suffix(".txt")]
        try:
            found[voice] = " ".join(sha256_file(file) for file in files)
        except OSError as error:
            raise UserError(
                f"{error.filename}: {error.strerror}, of the voice {voice}",
                "the recording that a calibration line names, and its transcript in a .txt file beside it",
                "put them there, or take the voice out of the line",
            ) from error
    return found


def _lines(rows: Iterable[_Row], source: str) -> list[CalibrationLine]:
    """Check rows and make lines of them; all faults go into one error."""
    lines: list[CalibrationLine] = []
    faults: list[str] = []
    first: dict[str, str] = {}
    for where, number, row in rows:
        found = _row_faults(row)
        faults += [f"{where}: {fault}" for fault in found]
        if found:
            continue
        line = CalibrationLine(**{"id": f"row-{number}", **{key: row[key] for key in KEYS if row.get(key) is not None}})
        if line.id in first:
            faults.append(f"{where}: id {line.id!r} stands already at {first[line.id]}")
        first.setdefault(line.id, where)
        lines.append(line)
    if faults:
        raise UserError(
            f"calibration source {source}: {len(faults)} fault(s)\n{shorten_list(faults, _MAX_FAULTS)}",
            f"rows with a text and nothing but {', '.join(KEYS)}, as in recipes/README.md",
            "mend the rows",
        )
    if not lines:
        raise UserError(f"calibration source {source}: no lines", "at least one line of text", "name another source")
    return lines


def _row_faults(row: Any) -> list[str]:
    if isinstance(row, json.JSONDecodeError):
        return [_syntax(row)]
    if not isinstance(row, dict):
        return [f"a JSON {type(row).__name__}, not an object"]
    faults = [f"unknown key {key!r}" for key in row if key not in KEYS]
    for key in KEYS:
        value = row.get(key)
        if value is None:
            faults += ["no text"] if key == "text" else []
        elif not isinstance(value, str):
            faults.append(f"{key} is {value!r}, not text")
        elif not value.strip():
            faults.append(f"{key} is empty")
    return faults


def _syntax(error: json.JSONDecodeError) -> str:
    return f"not JSON ({error.msg} at column {error.colno})"


def _jsonl_rows(text: str) -> Iterator[_Row]:
    """Parse one JSON value a line; a line that is not JSON gives its error as the value, a blank line gives no row."""
    # Not splitlines(): it also cuts at U+2028 and other separators that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = error
        yield f"line {number}", number, row


def _json_rows(text: str, path: Path) -> Iterator[_Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {error}", "a JSON list of objects", "mend it, or call it .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: a JSON {type(rows).__name__}", "a JSON list of objects", "put it in a list")
    return ((f"row {number}", number, row) for number, row in enumerate(rows, 1))


def _load_dataset(source: str, **arguments: Any) -> Any:
    """Call `datasets.load_dataset` and turn what it raises for a bad source into one clear error."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"calibration source {source}, and the package datasets is not installed",
            "the packages of s2quant[quantize]",
            "pip install 's2quant[quantize]'",
        ) from error
    try:
        return datasets.load_dataset(**arguments)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"calibration source {source}: {type(cause).__name__}: {cause}",
            "a set that `datasets` can load",
            "check the name, the split and the file; a hub set needs the network or a copy in its cache",
        ) from error


def _parquet_rows(path: Path) -> Iterator[_Row]:
    if not path.is_file():
        raise UserError(f"calibration source {path}: no such file", "a parquet file", "check the path")
    # Streaming leaves no copy of the table in the user's cache.
    data = _load_dataset(str(path), path="parquet", data_files=str(path), split="train", streaming=True)
    columns = [name for name in KEYS if name in _columns(data, "text", str(path))]
    return ((f"row {number}", number, row) for number, row in enumerate(data.select_columns(columns), 1))


def _hub_rows(source: str) -> Iterator[_Row]:
    match = _HUB_SOURCE.fullmatch(source)
    if match is None:
        raise UserError(f"calibration source {source}", "hf:NAME[:SPLIT][:COLUMN]", "mend the name of the set")
    column = match["column"] or "text"
    data = _load_dataset(source, path=match["name"], split=match["split"] or "train")
    _columns(data, column, source)
    rows = ((f"row {number}", number, {"text": text}) for number, text in enumerate(data[column], 1))
    return (row for row in rows if not isinstance(row[2]["text"], str) or row[2]["text"].strip())


def _columns(data: Any, wanted: str, source: str) -> list[str]:
    names: list[str] = list(data.column_names or [])
    if wanted not in names:
        raise UserError(
            f"calibration source {source}: no column {wanted!r} (columns: {', '.join(names) or 'none'})",
            f"a column {wanted!r} of texts",
            "rename the column, or name it as in hf:NAME:SPLIT:COLUMN",
        )
    return names
