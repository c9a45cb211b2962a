"""Files and folders that are either complete or absent.

Writers work under a temporary name beside the final one and rename at the end, so a full disk, an error or
Ctrl-C leaves nothing half-written under the final name. Text files are UTF-8; anything else is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError  # the Rust part alone: no torch

from s2quant.errors import DiskError, UserError

MOST_READERS = 8  # threads that read and hash side by side; each holds what it reads
Item = TypeVar("Item")
Found = TypeVar("Found")


def side_by_side(work: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """Do work that mostly reads and hashes, which holds no other thread up, in a few threads.

    Args:
        work: What is done with an item; an error it raises is raised here, that of the first item in order.
        items: The items.

    Returns:
        What the work gives, in the order of the items.
    """
    with ThreadPoolExecutor(min(MOST_READERS, os.cpu_count() or 1)) as threads:
        return list(threads.map(work, items))


def sha256_file(path: Path) -> str:
    """Hash a file's bytes.

    Args:
        path: An existing file.

    Returns:
        64 lower-case hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Hash a text as UTF-8.

    Args:
        text: Any text.

    Returns:
        64 lower-case hexadecimal digits.
    """
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        UserError: The file is absent, not a file, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}", "a readable text file", "check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason})", "a UTF-8 text file", "convert it to UTF-8"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        UserError: The file is unreadable, is not JSON, or is not an object.
    """
    try:
        data = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: {error}", "a JSON object", "restore the file from its source") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a JSON {type(data).__name__}", "a JSON object", "restore the file from its source")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write one JSON object, indented, with a final newline.

    Args:
        path: The file, overwritten.
        data: What to write; the order of the keys is kept.
    """
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_new(path: Path) -> None:
    """Refuse an output path that is taken or cannot be made; nothing is created.

    Args:
        path: The final name of an output; folders above it may be absent.

    Raises:
        UserError: Something stands there, or the nearest folder above it cannot be written.
    """
    try:
        taken = path.exists() or path.is_symlink()
        above = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise UserError(
            f"{path}: {error.strerror or error}", "a path that can be made", "name another --out"
        ) from error
    if taken:
        raise UserError(f"{path} exists already", "a path that is free", "remove it or name another --out")
    if not above.is_dir():
        raise UserError(f"{above} is a file", "a folder that can be written", "name another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{above} cannot be written", "a folder that can be written", "name another --out")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or failing disk into one clear error.

    Args:
        path: What was being written, for the message.

    Yields:
        Nothing.

    Raises:
        DiskError: The operating system refused to write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:  # name a file only if it is not one of ours in the making
            elsewhere = error.filename is not None and ".partial-" not in str(error.filename)
            reason = f"{error.filename}: {error.strerror}" if elsewhere else error.strerror
        raise DiskError(
            f"writing {path} failed: {reason}{_free_bytes(path)}",
            "a disk with room for the output",
            "free some space or name another --out; nothing was left under the final name",
        ) from error


def _free_bytes(path: Path) -> str:
    try:
        return f" ({shutil.disk_usage(path.absolute().parent).free:,} bytes free)"
    except OSError:
        return ""


def partial_folder(out: Path) -> Path:
    """Name the folder of a run in progress.

    Args:
        out: The final folder.

    Returns:
        `OUT.partial` beside it.
    """
    return out.absolute().with_name(out.name + ".partial")


@contextmanager
def atomic_folder(path: Path, within: Path | None = None) -> Iterator[Path]:
    """Fill a temporary folder that takes its final name only when the block ends well.

    A process that is killed leaves the temporary folder behind, under a hidden name with ".partial-" in it.

    Args:
        path: The final name; must not exist.
        within: An existing folder on the same disk to work in, instead of the one above the final name.

    Yields:
        The temporary folder, on the same disk.

    Raises:
        UserError: The final name is taken, or the disk refuses.
    """
    check_new(path)
    parent = path.absolute().parent
    with disk_errors(path):
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{_short(path.name)}.partial-", dir=within or parent))
    try:
        with disk_errors(path):
            yield partial
            _open_permissions(partial)
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def atomic_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary file that takes its final name only when the block ends well.

    Args:
        path: The final name.
        overwrite: Whether an existing file may be replaced.

    Yields:
        The temporary file's path, on the same disk, with the same suffix.

    Raises:
        UserError: The final name is taken, or the disk refuses.
    """
    if not overwrite:
        check_new(path)
    parent = path.absolute().parent
    with disk_errors(path):
        parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{_short(path.stem)}.partial-", suffix=path.suffix, dir=parent)
        os.close(handle)
    partial = Path(name)
    try:
        with disk_errors(path):
            yield partial
            partial.chmod(0o666 & ~_umask())
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _short(name: str) -> str:
    """Cut a name, so that a temporary one made of it is not too long for the disk."""
    return name.encode()[:100].decode(errors="ignore")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _open_permissions(folder: Path) -> None:
    """Give a folder made by tempfile, and safetensors' private files in it, the user's ordinary permissions."""
    mask = _umask()
    folder.chmod(0o777 & ~mask)
    for child in folder.rglob("*"):
        child.chmod((0o777 if child.is_dir() else 0o666) & ~mask)
