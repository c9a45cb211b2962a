"""Captures: the garbage collector rests meanwhile, whatever happens."""

import contextlib
import gc

import pytest
import torch

from s2quant.runtime.captures import capture


@pytest.fixture
def asked(monkeypatch):
    found = []

    @contextlib.contextmanager
    def graph(graph, **options):
        found.append((graph, options, gc.isenabled()))
        yield
        found.append(gc.isenabled())

    monkeypatch.setattr(torch.cuda, "graph", graph)
    return found


def test_no_garbage_is_collected_meanwhile(asked):
    assert gc.isenabled()
    with capture("graph", "pool"):  # type: ignore[arg-type]
        assert not gc.isenabled()
    options = {"pool": "pool", "stream": None, "capture_error_mode": "thread_local"}
    assert asked == [("graph", options, False), False] and gc.isenabled()


def test_it_is_collected_again_after_an_error(asked):
    with pytest.raises(ValueError, match="mine"), capture("graph", "pool"):  # type: ignore[arg-type]
        raise ValueError("mine")
    assert gc.isenabled()


def test_it_stays_off_where_it_was_off(asked):
    gc.disable()
    try:
        with capture("graph", "pool"):  # type: ignore[arg-type]
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
