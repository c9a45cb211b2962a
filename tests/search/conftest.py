"""One finished run on the tiny checkpoint, made once and only read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from search_cases import measure

from s2quant.records import folder_hashes


@pytest.fixture(scope="session")
def measured(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("sensitivity") / "run"
    measure(tiny_folder, folder)
    before = folder_hashes(folder)
    yield folder
    assert folder_hashes(folder) == before, f"a test has changed {folder}"
