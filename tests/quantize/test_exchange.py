"""Several processes, and low memory: the bytes of one process with the stream on its device."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s2quant.errors import DiskError, OutOfMemory, UserError
from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint
from s2quant.files import read_json, sha256_file
from s2quant.quantize import rows
from s2quant.quantize.exchange import Exchange

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "tiny-w4a16-fast8.yaml"
PATHS = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
RUN = """
import sys
from process_cases import check_group_ended
from s2quant.cli import main
status = main(sys.argv[1:])
check_group_ended()
sys.exit(status)
"""
SPLIT = """
from s2quant.quantize import rows
rows.kernel_obstacle = lambda device: None
"""
SUM = """
import sys
import torch
from torch import distributed as dist
from s2quant.errors import UserError
from s2quant.quantize.exchange import Exchange, join_exchange
from s2quant.quantize.hessian import Hessian

rank, world = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"tcp://127.0.0.1:{sys.argv[3]}")
exchange = join_exchange(rank, world, torch.device("cpu"))


def inputs_of(index, inputs):
    generator = torch.Generator().manual_seed(index)
    rows = torch.randn(5 + index, inputs, generator=generator)
    return rows, torch.rand(5 + index, generator=generator) * (index != 3)  # of one batch no row counts


def summed(by, inputs, batches, bad=None):
    hessian = Hessian(inputs, "wo", "cpu")

    def product_of(index):
        rows, weights = inputs_of(index, inputs)
        return hessian.product(torch.full_like(rows, float("nan")) if index == bad else rows, weights)

    counts = [(len(rows) * bool(weights.any()), float(weights.double().sum()))
              for rows, weights in (inputs_of(index, inputs) for index in range(batches))]
    by.sum(hessian, counts, product_of)
    return hessian


def written_out(inputs, batches):
    products = {}
    hessian = Hessian(inputs, "wo", "cpu")
    for index in range(batches):
        product = hessian.product(*inputs_of(index, inputs))
        products[index] = torch.zeros(inputs, inputs) if product is None else product.matrix
    zeros = torch.zeros(inputs, inputs)
    lanes = []
    for lane in range(4):
        lanes.append(zeros)
        for index in range(lane, batches, 4):
            lanes[lane] = lanes[lane] + products[index]
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]), sum(product.double() for product in products.values())


for inputs, batches in ((7, 11), (2, 5), (16, 1), (5, 0)):
    ours, alone = summed(exchange, inputs, batches), summed(Exchange(), inputs, batches)
    if batches:
        expected, exact = written_out(inputs, batches)
        assert torch.equal(ours._sum, expected) and (ours._sum - exact).norm() < 1e-5 * exact.norm()
    assert ours.num_tokens == alone.num_tokens and ours._total == alone._total
    assert (ours._sum is None) == (alone._sum is None) == (batches == 0)
    assert batches == 0 or torch.equal(ours.matrix(), alone.matrix())
for bad in (0, 7):
    try:
        summed(exchange, 7, 8, bad).matrix()
    except UserError as error:  # in every process, also in those that have no batch
        assert f"{5 + bad} of {sum(range(5, 13)) - 8} calibration inputs hold NaN" in str(error), error
    else:
        raise AssertionError("no error")
dist.destroy_process_group()
"""


def run_two(folder: Path, words: list[str], script: str = RUN) -> tuple[list[int], list[str], list[str]]:
    """Run `s2quant` with these words in two processes; give their exit statuses, outputs, and errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, logs = [], [folder / f"stderr-{rank}" for rank in range(2)]
    for rank, log in enumerate(logs):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in ranks.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
        environment |= {"PYTHONFAULTHANDLER": "1"}  # an abort says where
        command = [sys.executable, "-c", script, *words]
        with log.open("w") as errors:
            one = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        processes.append(one)
    outputs = [_wait(process) for process in processes]
    return [process.returncode for process in processes], outputs, [log.read_text() for log in logs]


def _wait(process: subprocess.Popen[str], limit_s: float = 300.0) -> str:
    try:
        return process.communicate(timeout=limit_s)[0]
    except subprocess.TimeoutExpired:  # it may wait for days for the other
        process.kill()
        return process.communicate()[0]


def test_two_processes_end_with_the_bytes_of_one(tiny_folder: Path, tmp_path: Path) -> None:
    """Both speak (eight lines are a group at two slots), both sum, both solve; the one alone keeps its stream apart."""
    words = ["quantize", str(RECIPE), "--model", str(tiny_folder), "--out", str(tmp_path / "two"), "--slots", "2"]
    statuses, outputs, errors = run_two(tmp_path, words)
    assert statuses == [0, 0], "\n".join(error[-4000:] for error in errors)
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


def test_linears_in_two_parts_are_solved_by_both(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, though gptqmodel solves the parts here."""
    recipe = ROOT / "recipes" / "tiny-w4a16.yaml"
    words = ["quantize", str(recipe), "--model", str(tiny_folder), "--sequences", "4"]
    words += ["--calibration", str(tmp_path / "calibration.safetensors")]
    statuses, _, errors = run_two(tmp_path, [*words, "--out", str(tmp_path / "two")], SPLIT + RUN)
    assert statuses == [0, 0], "\n".join(error[-4000:] for error in errors)
    asked = []

    def split(device: object) -> None:
        asked.append(device)

    monkeypatch.setattr(rows, "kernel_obstacle", split)
    options = QuantizeOptions(
        recipe=recipe, model=tiny_folder, out=tmp_path / "one", num_sequences=4,
        calibration=tmp_path / "calibration.safetensors",
    )  # fmt: skip
    quantize_checkpoint(options)
    assert asked
    for name in ("model.safetensors", "config.json"):
        assert sha256_file(tmp_path / "two" / name) == sha256_file(tmp_path / "one" / name), name


@pytest.mark.parametrize("world", [2, 3, 5])
def test_sums_of_several_processes_are_those_of_one(world: int) -> None:
    """And of the lanes written out; fewer rows or batches than processes; an error of one is one of all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    processes = [
        subprocess.Popen([sys.executable, "-c", SUM, str(rank), str(world), str(port)], env=environment)
        for rank in range(world)
    ]
    for process in processes:
        _wait(process)
    assert [process.returncode for process in processes] == [0] * world


def test_an_error_ends_both(tiny_folder: Path, tmp_path: Path) -> None:
    """The first process finds it; the second is told, and none leaves a thread of the group behind."""
    words = ["quantize", str(RECIPE), "--model", str(tiny_folder), "--out", str(tmp_path)]
    statuses, outputs, errors = run_two(tmp_path, words)
    assert statuses == [2, 2], "\n".join(error[-4000:] for error in errors)
    assert outputs == ["", ""]
    assert all(f"{tmp_path} exists already" in error for error in errors)


@pytest.mark.parametrize("kind", [UserError, DiskError, OutOfMemory])
def test_an_error_of_one_process_is_raised_in_all_before_they_exchange_results(monkeypatch, kind):
    """Two exchanges in one process: what each of them would be sent is played back to the other."""
    fault = kind("got", "expected", "todo")

    def failing():
        raise fault

    for rank, action in ((0, failing), (1, lambda: {1: "one"})):
        sent = []

        def all_gather(parts, mine, rank=rank, sent=sent):
            sent.append(mine)
            other = {1 - rank: (None if rank == 0 else {"kind": kind.__name__} | vars(fault), {})}
            parts[rank], parts[1 - rank] = mine, other

        monkeypatch.setattr("s2quant.quantize.exchange.dist.all_gather_object", all_gather)
        with pytest.raises(kind, match="expected") as raised:
            Exchange(rank=rank, world=2).gather(action)
        assert len(sent) == 1 and str(raised.value) == str(fault)
        assert type(raised.value) is kind
    with pytest.raises(kind, match="expected"):
        Exchange().gather(failing)
    assert Exchange().gather(lambda: {2: "two", 1: "one"}) == {1: "one", 2: "two"}


@pytest.mark.parametrize("size", [10, 9000])
def test_small_objects_go_by_the_gpu_and_large_ones_by_the_host(monkeypatch, size):
    """Two exchanges in one process, "on a GPU": what each of them sends is put beside what the other would send."""
    objects = [{rank: "x" * (size if rank else 3)} for rank in range(2)]
    sent, asked = {}, []

    def by_gpu(found, row, group=None):
        sent[asked[-1]] = row[0].clone()
        for rank, other in sent.items():
            found[rank] = other

    def by_host(parts, mine):
        parts[:] = objects

    monkeypatch.setattr("s2quant.quantize.exchange.dist.all_gather_into_tensor", by_gpu)
    monkeypatch.setattr("s2quant.quantize.exchange.dist.all_gather_object", by_host)
    for rank in (0, 1, 0):  # so that the first one's last turn has both
        asked.append(rank)
        exchange = Exchange(rank=rank, world=2, device=torch.device("cpu"))
        sent.setdefault(1 - rank, torch.zeros(8192, dtype=torch.uint8))
        if not int(sent[1 - rank][0]):  # nothing to read as yet
            sent[1 - rank] = small_of({}, 1 - rank)
        found = exchange.merge(objects[rank], at_once=True)
    assert found == {0: "xxx", 1: "x" * size}
    assert (exchange._small(objects[0], torch.device("cpu")) is None) == (size > 8192)


def small_of(value, rank):
    """Give what an exchange would send of an object."""
    data = pickle.dumps(value)
    row = torch.zeros(8192, dtype=torch.uint8)
    row[0] = len(data)
    row[8 : 8 + len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    return row
