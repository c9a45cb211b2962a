"""Modules loaded one ahead: in order, not further, errors in their turn."""

import threading

import pytest
import torch
from torch import nn

from s2quant.errors import UserError
from s2quant.quantize.copies import one_ahead, to_host

CPU = torch.device("cpu")


def loads(made, allowed):
    def load(number):
        def made_now():
            assert threading.current_thread() is not threading.main_thread()
            made.append(number)
            allowed[number].set()
            return nn.Linear(1, number + 1)

        return made_now

    return [load(number) for number in range(len(allowed))]


def test_each_is_loaded_while_the_one_before_is_in_use():
    made, allowed = [], [threading.Event() for _ in range(4)]
    for number, module in enumerate(one_ahead(loads(made, allowed), CPU)):
        assert module.out_features == number + 1
        if number + 1 < len(allowed):
            assert allowed[number + 1].wait(10)  # begun without being asked for
        assert made == list(range(min(number + 2, 4)))  # and no more than that


def test_nothing_is_loaded_beyond_what_was_used():
    made, allowed = [], [threading.Event() for _ in range(4)]
    modules = one_ahead(loads(made, allowed), CPU)
    next(modules)
    assert allowed[1].wait(10)
    modules.close()
    assert made == [0, 1]
    assert list(one_ahead([], CPU)) == []


def test_an_error_comes_in_its_turn():
    def fails():
        raise UserError("got", "expected", "what to do")

    modules = one_ahead([lambda: nn.Linear(1, 1), fails, lambda: nn.Linear(1, 3)], CPU)
    assert next(modules).out_features == 1
    with pytest.raises(UserError, match="got"):
        next(modules)


@pytest.mark.gpu
def test_what_is_loaded_beside_computing_is_whole():
    """Weights are made on a stream of their own and used at once; their memory is not filled again too early."""
    device, sums = torch.device("cuda"), []
    busy = torch.randn(2048, 2048, device=device)

    def load(number):
        module = nn.Linear(2048, 2048, bias=False, device="meta")
        module.weight = nn.Parameter(torch.full((2048, 2048), float(number)), requires_grad=False)
        return module

    with torch.no_grad():
        for module in one_ahead([lambda number=number: load(number) for number in range(20)], device):
            for _ in range(20):
                busy = torch.tanh(busy @ busy)  # so that the sum is computed long after it was asked for
            sums.append(module.weight.sum(dtype=torch.float64))
            del module
    assert [float(total) / 2048**2 for total in sums] == list(range(20))


@pytest.mark.gpu
def test_what_comes_to_the_host_is_what_was_computed():
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(10):
        x = torch.tanh(x @ x)
    host = to_host(x.T)
    assert host.is_pinned() and host.is_contiguous() and torch.equal(host, x.T.cpu())
    assert to_host(host) is host
