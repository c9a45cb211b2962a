"""Which of several processes does what; accelerate's own state is the oracle."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from s2quant.errors import UserError
from s2quant.evaluate.ranks import Ranks, find_ranks

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TOLD = """
import sys, time
from pathlib import Path
from accelerate import PartialState
from process_cases import check_group_ended
from s2quant.evaluate.ranks import find_ranks
ranks = find_ranks()
own = PartialState()
assert (ranks.rank, ranks.world, ranks.local_rank) == (own.process_index, own.num_processes, own.local_process_index)
assert ranks.is_first == own.is_main_process
items = list(range(7))
with own.split_between_processes(items) as part:  # accelerate's parts are runs, ours every world-th: the same union
    assert abs(len(part) - len(ranks.share(items))) <= 1
folder = Path(sys.argv[1])
if ranks.is_first:
    time.sleep(1)
    (folder / "first").touch()
ranks.wait()
assert (folder / "first").is_file()  # nobody went on before
(folder / f"rank-{ranks.rank}").write_text(" ".join(map(str, ranks.share(items))) + "|" + ranks.device("cuda"))
ranks.wait()
import torch._dynamo  # as building a model does
ranks.close()
check_group_ended()
"""


def test_one_process_does_everything(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = find_ranks()
    assert ranks == Ranks() and ranks.is_first
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    assert [ranks.device(name) for name in ("cuda", "cpu", "cuda:1")] == ["cuda", "cpu", "cuda:1"]


def test_parts_are_disjoint_and_all_of_it():
    items = [f"utt-{i}" for i in range(11)]
    for world in (1, 2, 3, 16):
        parts = [Ranks(rank=rank, world=world).share(items) for rank in range(world)]
        assert sorted(item for part in parts for item in part) == sorted(items)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_two_processes_agree_with_accelerate_and_wait_for_one_another(tmp_path):
    script = tmp_path / "told.py"
    script.write_text(TOLD, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port),
    ]  # fmt: skip
    paths = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "rank-0").read_text() == "0 2 4 6|cuda:0"
    assert (tmp_path / "rank-1").read_text() == "1 3 5|cuda:1"


def test_several_processes_without_accelerate_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UserError, match=r"accelerate is not installed(.|\n)*run one process"):
        find_ranks()


@pytest.mark.parametrize(("found", "device", "is_refused"), [(1, "cuda", True), (0, "cuda", True), (1, "cpu", False)])
def test_processes_without_a_gpu_each_are_refused_before_they_join(monkeypatch, found, device, is_refused):
    """In all alike, so that none waits for one that is gone, and the launcher says it once."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    monkeypatch.setitem(sys.modules, "accelerate", None)  # what comes next is refused for another reason
    said = "2 processes on --device cuda" if is_refused else "accelerate is not installed"
    with pytest.raises(UserError, match=said):
        find_ranks(device)
