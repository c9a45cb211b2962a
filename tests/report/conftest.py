from pathlib import Path

import pytest
from sample import write_sample


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run; tests that change it take a copy."""
    return write_sample(tmp_path_factory.mktemp("report") / "run", num_utterances=8, num_worst=6)
