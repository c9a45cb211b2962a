"""Several processes, and low memory: the bytes of one process with the stream on its device."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint
from s2quant.files import read_json, sha256_file

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "tiny-w4a16-fast8.yaml"


def test_two_processes_end_with_the_bytes_of_one(tiny_folder: Path, tmp_path: Path) -> None:
    """Both speak (eight lines are a group at two slots), both sum, both solve; the one alone keeps its stream apart."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["quantize", str(RECIPE), "--model", str(tiny_folder), "--out", str(tmp_path / "two"), "--slots", "2"]
    processes = []
    for rank in range(2):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in ranks.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "s2quant.cli", *words]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "linears quantized, verified" in outputs[0]
    assert outputs[1] == ""
    quantize_checkpoint(
        QuantizeOptions(recipe=RECIPE, model=tiny_folder, out=tmp_path / "one", num_slots=8, low_memory=True)
    )
    for name in ("model.safetensors", "s2quant/calibration.safetensors", "config.json"):
        assert sha256_file(tmp_path / "two" / name) == sha256_file(tmp_path / "one" / name), name
    facts = [read_json(tmp_path / name / "manifest.json") for name in ("one", "two")]
    assert [(fact["num_processes"], fact["low_memory"]) for fact in facts] == [(1, True), (2, False)]
    assert [len(fact["processes"]) for fact in facts] == [1, 2]
    assert all(one["peak_host_bytes"] > 0 for fact in facts for one in (fact, *fact["processes"]))
    assert all(fact["processes"][0]["peak_host_bytes"] == fact["peak_host_bytes"] for fact in facts)
    dynamic = read_json(tmp_path / "one" / "quantize_config.json")["dynamic"]
    assert dynamic[r"+:^audio_decoder\.output$"] == {"bits": 8, "group_size": 64}
