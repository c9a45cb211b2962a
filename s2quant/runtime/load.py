"""A checkpoint folder -> a model on a device, dense or quantized, every tensor accounted for.

The model is built on the meta device and filled module by module, and a shard's pages are let go when its last
tensor has been taken, so nothing is held twice. Needs neither gptqmodel nor transformers.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import nn

from s2quant.checkpoint.reader import Checkpoint, open_checkpoint
from s2quant.errors import UserError
from s2quant.layers import without_values
from s2quant.model import DualAR, module_name
from s2quant.packing import QuantizedWeight
from s2quant.runtime.linears import Backend, make_linear
from s2quant.runtime.memory import trim_heap

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # by the names of the command line
TRIM_BYTES = 32 * 2**20  # read from disk between two clean-ups of the host's heap


def parse_device(device: str | torch.device) -> torch.device:
    """Check that a device can be used.

    Args:
        device: "cpu", "cuda", "cuda:1", ...

    Returns:
        The device.

    Raises:
        UserError: It is neither the CPU nor a CUDA device, or it is not there.
    """
    unknown = UserError(f"device {str(device)!r}", "cpu, cuda or cuda:N", "check --device")
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise unknown from error
    if parsed.type not in ("cpu", "cuda"):
        raise unknown
    count = torch.cuda.device_count()
    if parsed.type == "cuda" and (parsed.index or 0) >= count:
        raise UserError(
            f"device {str(device)!r}, but torch sees {count} CUDA devices", "a device of this machine", "use cpu"
        )
    return parsed


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Check that a dtype can be used.

    Args:
        dtype: One of torch's floating dtypes, or a name of the command line.

    Returns:
        The dtype.

    Raises:
        UserError: It is neither.
    """
    parsed = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        names = ", ".join(DTYPES)
        raise UserError(f"dtype {dtype!r}", f"one of {names}, or a floating dtype of torch", "correct the dtype")
    return parsed


def device_name(device: torch.device) -> str:
    """Name a device for a manifest.

    Args:
        device: The device.

    Returns:
        The GPU's product name, or "cpu" with the number of threads.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread(s)"


def load_model(
    path: Path | str | Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.bfloat16,
    linears: Backend = "auto",
) -> DualAR:
    """Load the speech model of a checkpoint, bf16 or quantized.

    Args:
        path: The folder, or an opened checkpoint.
        device: Where to put the model.
        dtype: Of everything that is not quantized, and of the activations; a name will do, see `parse_dtype`.
        linears: Backend of the quantized linears, see `s2quant.runtime.linears`.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        UserError: The folder, the device or the dtype cannot be used; every fault of the folder is listed.
    """
    target, dtype = parse_device(device), parse_dtype(dtype)
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    with without_values():
        model = DualAR(checkpoint.config)
    left_in = Counter(entry.file for entry in checkpoint.entries.values())
    untrimmed = 0
    for name in checkpoint.modules:
        weight = checkpoint.weight(name, target)
        if isinstance(weight, QuantizedWeight):
            set_module(model, module_name(name), make_linear(weight, dtype, linears))
        else:
            owner, parameter = (name.rpartition(".")[0], "bias") if name.endswith(".bias") else (name, "weight")
            module = model.get_submodule(module_name(owner))
            setattr(module, parameter, nn.Parameter(weight.to(dtype), requires_grad=False))
        del weight
        for entry in (checkpoint.entries[key] for key in checkpoint.keys(name)):
            untrimmed += entry.num_bytes
            left_in[entry.file] -= 1
            if not left_in[entry.file]:
                checkpoint.close(entry.file)
        if untrimmed > TRIM_BYTES:
            trim_heap()
            untrimmed = 0
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert not left, left
    return model.eval()


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule, in place.

    Args:
        model: The model.
        name: Dotted name of the submodule.
        module: What takes its place.
    """
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
