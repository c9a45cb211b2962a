"""Exports in a layout that only another engine reads, told by their manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2quant.errors import UserError
from s2quant.files import read_json

FOREIGN = ("vllm-omni",)  # profiles of such exports


def is_foreign(record: Mapping[str, Any]) -> bool:
    """Tell such an export.

    Args:
        record: A folder's manifest, ours or anybody's.

    Returns:
        Whether it is one.
    """
    return record.get("stage") == "export" and record.get("profile") in FOREIGN


def check_layout(folder: Path) -> None:
    """Refuse such an export, which would otherwise look like a damaged folder.

    Args:
        folder: A checkpoint folder, or none.

    Raises:
        UserError: Its manifest.json says that it is one.
    """
    try:
        record = read_json(folder / "manifest.json")
    except UserError:  # none, or none of ours
        return
    if is_foreign(record):
        raise UserError(
            f"{folder} is an export for {record['profile']}, in that engine's own layout",
            "a folder in the layout of the original, bf16 or packed",
            "name the folder that it was exported from",
        )
