"""What is needed next is loaded while the present one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import nn


def one_ahead(loads: Iterable[Callable[[], nn.Module]], device: torch.device) -> Iterator[nn.Module]:
    """Load modules in another thread, each while the one before it is in use.

    On a GPU weights are copied on a stream of their own, beside what is being computed.

    Args:
        loads: What loads each of them, onto the device.
        device: The device.

    Yields:
        The modules, in order.

    Raises:
        Exception: What a load raises, when its module is asked for.
    """
    using = copying = None
    if device.type == "cuda":
        using, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)

    def load(step: Callable[[], nn.Module]) -> nn.Module:
        with nullcontext() if copying is None else torch.cuda.stream(copying):
            module = step()
            if using is not None and copying is not None:
                for parameter in module.parameters():
                    parameter.data.record_stream(using)  # else its memory might be filled again while it is in use
                copying.synchronize()
        return module

    with ThreadPoolExecutor(1) as thread:
        waiting: list[Future[nn.Module]] = []
        for step in loads:
            waiting.append(thread.submit(load, step))
            if len(waiting) > 1:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
