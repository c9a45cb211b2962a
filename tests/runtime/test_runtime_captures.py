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


def test_what_fails_within_is_raised_not_what_torch_finds_afterwards(monkeypatch):
    class Broken(contextlib.AbstractContextManager):
        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: Broken())
    with pytest.raises(torch.OutOfMemoryError, match="tried"), capture("graph", "pool"):  # type: ignore[arg-type]
        raise torch.OutOfMemoryError("tried to allocate")
    with pytest.raises(KeyboardInterrupt), capture("graph", "pool"):  # type: ignore[arg-type]
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="previous error"), capture("graph", "pool"):  # type: ignore[arg-type]
        pass
    assert gc.isenabled()
