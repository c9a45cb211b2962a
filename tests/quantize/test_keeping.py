"""Stages are kept beside other work: nothing waits for the disk, and nothing begun is lost."""

import hashlib
import threading

import torch

from s2quant.packing import QuantizedWeight
from s2quant.quantize.keeping import Keeper, weight_sha256
from s2quant.quantize.store import StageStore

CPU = torch.device("cpu")


def weight_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return QuantizedWeight(
        codes=torch.randint(0, 16, (32, 64), dtype=torch.uint8, generator=generator),
        scales=torch.rand(2, 32, generator=generator).half(),
        zeros=torch.full((2, 32), 8, dtype=torch.uint8),
        g_idx=(torch.arange(64) // 32).int(),
        bits=4,
        group_size=32,
    )


def test_work_goes_on_while_a_stage_is_written(tmp_path, monkeypatch):
    may, save = threading.Event(), StageStore.save

    def slow(self, *args):
        assert may.wait(20)
        save(self, *args)

    monkeypatch.setattr(StageStore, "save", slow)
    store, weight = StageStore.open(tmp_path / "run", {}, resume=False), weight_of()
    with Keeper(store, CPU) as keeper:
        keeper.hash("a.w", weight)
        kept = keeper.keep("a", {"a.w": weight}, [{"module": "a.w"}])  # returns, though nothing is written yet
        assert kept is not None and not kept.done() and not store.has("a")
        may.set()
    assert kept.done() and store.names() == ["a"]  # leaving waited for it
    assert kept.result() == [{"module": "a.w", "weight_sha256": weight_sha256(weight)}]
    assert Keeper(None, CPU).keep("a", {}, []) is None


def test_the_hash_is_of_every_tensor_with_its_type_and_sizes():
    weight, digest = weight_of(), hashlib.sha256()
    for name in ("g_idx", "scales", "codes", "zeros"):
        values = getattr(weight, name)
        digest.update(f"{name} {values.dtype} {list(values.shape)} ".encode() + values.numpy().tobytes())
    assert weight_sha256(weight) == digest.hexdigest() != weight_sha256(weight_of(1))
    for name in ("scales", "codes", "zeros", "g_idx"):
        changed = weight_of()
        getattr(changed, name).view(-1)[5] += 1
        assert weight_sha256(changed) != weight_sha256(weight), name
