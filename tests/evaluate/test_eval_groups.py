"""Who speaks a clip, and how many share the work, does not matter to a single code."""

import pytest
import torch
from run_cases import TEXTS, write_suite

from s2quant.evaluate.generate import generate
from s2quant.evaluate.groups import GROUP_ROUNDS
from s2quant.evaluate.plan import EvalOptions, make_plan
from s2quant.evaluate.ranks import Ranks
from s2quant.evaluate.store import Store, load_array
from s2quant.runtime.engine import Engine
from s2quant.runtime.loading import load_engine

SLOTS = 2


@pytest.fixture(scope="module")
def plan(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("plan")
    suite = write_suite(folder, [*TEXTS, "It rains.", "Nobody is there."], seeds=[0, 1, 2, 3], floor_seeds=None)
    return make_plan(EvalOptions(suite=suite, model=tiny_folder, baseline=tiny_folder, out=folder / "run"))


def spoken(plan, folder, tiny_folder, monkeypatch, world):
    """Each process in turn, in a folder of its own: codes by clip, and by process the requests of each batch."""
    codes, batches = {}, []
    whole = Engine.generate
    for rank in range(world):
        sizes = []
        monkeypatch.setattr(Engine, "generate", lambda self, some, to=sizes: to.append(len(some)) or whole(self, some))
        store = Store(folder=folder / f"{world}-{rank}", rank=rank)
        loaders = dict.fromkeys(("baseline", "model"), lambda: load_engine(tiny_folder, num_slots=SLOTS))
        generate(plan, loaders, store, Ranks(rank=rank, world=world), SLOTS)
        codes |= {job.key: load_array(store.codes(job)) for job in plan.jobs() if job.key in store.clips()}
        batches.append(sizes)
    return codes, batches


def test_any_number_of_processes_speaks_the_same_codes(plan, tmp_path, tiny_folder, monkeypatch):
    one, batches = spoken(plan, tmp_path, tiny_folder, monkeypatch, 1)
    assert len(one) == len(plan.jobs()) == 40
    assert batches == [[8, 8, 4, 8, 8, 4]] and GROUP_ROUNDS * SLOTS == 8
    three, shared = spoken(plan, tmp_path, tiny_folder, monkeypatch, 3)
    assert shared == [[8, 8], [8, 8], [4, 4]]
    assert set(three) == set(one)
    assert all(torch.equal(three[key], one[key]) for key in one)
