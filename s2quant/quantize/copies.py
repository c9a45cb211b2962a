"""Copies between the host and a GPU beside what is being computed.

They go through page-locked memory: a copy from or to other memory keeps other threads from launching kernels meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn


def one_ahead(loads: Iterable[Callable[[], nn.Module]], device: torch.device) -> Iterator[nn.Module]:
    """Load modules in another thread, each while the one before it is in use.

    Args:
        loads: What loads each of them, on the CPU.
        device: Where they are needed; a GPU gets them on a stream of its own.

    Yields:
        The modules, in order.

    Raises:
        Exception: What a load raises, when its module is asked for.
    """
    using = copying = None
    if device.type == "cuda":
        using, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)

    def load(step: Callable[[], nn.Module]) -> nn.Module:
        module = step()
        if using is not None and copying is not None:
            with torch.cuda.stream(copying):
                for parameter in module.parameters():
                    parameter.data = parameter.data.pin_memory().to(device, non_blocking=True)
                    parameter.data.record_stream(using)  # else its memory might be filled again while it is in use
                copying.synchronize()
        return module

    thread = ThreadPoolExecutor(1)
    try:
        waiting: list[Future[nn.Module]] = []
        for step in loads:
            waiting.append(thread.submit(load, step))
            if len(waiting) > 1:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        thread.shutdown(cancel_futures=True)


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host, after what the current stream has been asked for.

    Args:
        tensor: On any device.

    Returns:
        It, contiguous on the CPU; page-locked if it was copied from a GPU.
    """
    if not tensor.is_cuda:
        return tensor.cpu().contiguous()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host
