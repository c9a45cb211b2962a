"""The README's blocks run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_blocks_run(tmp_path: Path) -> None:
    """The bash blocks, then the python blocks, in one folder beside the recipes."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    assert len(blocks("bash")) == 1
    assert len(blocks("python")) == 1
    script = "\n".join(["set -euo pipefail", *blocks("bash")])
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=True, timeout=600)
    assert (tmp_path / "hello.wav").stat().st_size > 1000
    code = "\n".join([*blocks("python"), "assert sum(map(len, chunks)) > 0"])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=600)


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("fact", ["Apache-2.0", "Fish Audio Research License", "make demo", "make test"])
def test_first_things_are_said(fact: str) -> None:
    assert fact in README


def test_the_recipe_count_and_lines() -> None:
    lines = (ROOT / "recipes" / "calibration" / "s2-pro.jsonl").read_text("utf-8").splitlines()
    assert f"{len(lines)} lines of our own" in README
