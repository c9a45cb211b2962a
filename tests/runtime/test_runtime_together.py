"""Kernels of a frame are compiled side by side before the first of them is launched."""

import threading

import pytest
import torch

from tools.speed import frames
from tools.speed.parts import config_of

triton = pytest.importorskip("triton")


@pytest.fixture
def decoder(monkeypatch):
    """A decoder of fused frames and prompt pieces, which launches nothing as long as `JITFunction.run` is replaced."""
    from s2quant.runtime import fast, fused_weights, triton_linear
    from s2quant.runtime.kernels.launch import INTERPRETED

    if INTERPRETED:
        pytest.skip("Triton interprets here")
    monkeypatch.setattr(triton_linear, "triton_obstacle", lambda device: None)
    monkeypatch.setattr(fused_weights, "triton_obstacle", lambda device: None)
    model = frames.random_model(config_of("tiny"), torch.device("cpu"))
    return fast.FastDecoder(model, 20, 128, 64, graphs=False, fused=True, prompt_graphs=True)


@pytest.fixture
def seen(monkeypatch):
    """Kernels in the order in which they were asked for: name, and whether it was to be compiled only."""
    found = []

    def run(kernel, *values, grid, warmup, **options):
        from triton.runtime._async_compile import active_mode

        assert warmup == (active_mode.get() is not None)
        found.append((kernel.__name__, warmup))

    monkeypatch.setattr(triton.JITFunction, "run", run)
    return found


def test_what_is_launched_has_been_compiled_before(decoder, seen):
    from s2quant.runtime.kernels.launch import compile_together

    for work in (
        lambda: decoder._frame(1, 64, 0),
        lambda: decoder._frame(20, 64, 0),
        lambda: decoder.reader._piece(64, 64),
    ):
        decoder.reader._table = decoder._table.float()
        seen.clear()
        compile_together(work)
        compiled = [name for name, warmup in seen if warmup]
        assert len(compiled) == len(seen) > 10
        work()
        assert [name for name, warmup in seen[len(compiled) :] if not warmup] == compiled
    assert {"many_kernel", "attention_kernel", "keep_kernel", "embed_kernel"} <= set(compiled)


def test_other_threads_launch_meanwhile(decoder, seen):
    from s2quant.runtime.kernels.launch import compile_together

    def work():
        other = threading.Thread(target=decoder._frame, args=(1, 64, 0))
        other.start()
        other.join()

    compile_together(work)
    assert seen and not any(warmup for _, warmup in seen)


def test_threads_compile(monkeypatch):
    """With Triton's own mode: each kernel is compiled once, in a thread, and is there afterwards."""
    from triton.runtime import _async_compile

    from s2quant.runtime.kernels.launch import INTERPRETED, compile_together, start

    if INTERPRETED:
        pytest.skip("Triton interprets here")
    made, cache = [], {}

    class Kernel:
        def warmup(self, value, grid):
            mode = _async_compile.active_mode.get()

            def compiled():
                made.append((value, threading.current_thread() is threading.main_thread()))
                return value

            more = [lambda future: None] * (mode.submit.__code__.co_argcount - 4)
            mode.submit(value, compiled, lambda kernel: cache.setdefault(value, kernel), *more)

    compile_together(lambda: [start(Kernel(), (1,))(value) for value in (1, 2, 1)])
    assert sorted(made) == [(1, False), (2, False)] and cache == {1: 1, 2: 2}


def test_what_cannot_be_compiled_says_so_when_it_is_launched(monkeypatch):
    from triton.runtime import _async_compile

    from s2quant.runtime.kernels.launch import INTERPRETED, compile_together

    if INTERPRETED:
        pytest.skip("Triton interprets here")

    def failing():
        raise RuntimeError("no such instruction")

    def work():
        mode = _async_compile.active_mode.get()
        more = [lambda future: None] * (mode.submit.__code__.co_argcount - 4)
        mode.submit("key", failing, lambda kernel: None, *more)

    compile_together(work)
    assert _async_compile.active_mode.get() is None
    tried = []
    compile_together(lambda: (tried.append(1), 1 // 0))
    assert tried == [1]
    assert _async_compile.active_mode.get() is None
