"""The picture and the table of training logs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from mini import curves


def write_log(folder: Path, last: float) -> Path:
    folder.mkdir(parents=True)
    rows = [{"t": float(t), "part": "codec", "event": "train", "mel": 1.0 / t} for t in range(1, 20)]
    rows += [{"t": 20.0, "part": "codec", "event": "train", "mel": last}, {"t": 21.0, "part": "codec", "event": "warm"}]
    rows += [{"t": 22.0, "part": "codec", "event": "encoded", "bits": [7.25, 8.0]}]
    (folder / "codec.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_runs_are_drawn_over_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = [write_log(tmp_path / "a", 0.125), write_log(tmp_path / "b", 0.5)]
    report = tmp_path / "report"
    monkeypatch.setattr(sys, "argv", ["curves.py", *map(str, logs), "--report", str(report)])
    curves.main()
    root = ElementTree.parse(report / "training.svg").getroot()
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    drawn = [line.attrib["points"].split() for line in lines if line.attrib["points"]]
    assert [len(points) for points in drawn] == [20, 20]
    heights = [float(points[-1].split(",")[1]) for points in drawn]
    assert heights[1] < heights[0]  # a larger loss stands higher up
    table = (report / "training.md").read_text()
    assert "| codec: mel | 0.125 at 20 s | 0.5 at 20 s |" in table
    assert "| 7.2 8.0 | 7.2 8.0 |" in table
    assert "| Dual-AR: semantic code, nats | - | - |" in table
    assert (report / "run-2" / "codec.jsonl").read_text() == (logs[1] / "codec.jsonl").read_text()
