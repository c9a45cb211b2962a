"""Load a codec.pth, strictly.

Every absent, left-over, misshapen, non-floating or non-finite tensor is named in one error before anything is built;
a file that is absent, truncated or holds anything but tensors is refused (it is read with weights_only, so it cannot
run code). The reference loads non-strictly, which lets a codec with random parts speak noise.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2quant.codec.codec import Codec
from s2quant.codec.config import CodecConfig
from s2quant.codec.layout import buffer_keys, config_from_state, fold_weight, parameter_shapes, weight_norm_styles
from s2quant.errors import UserError, shorten_list
from s2quant.layers import without_values

FILE_NAME = "codec.pth"

# What torch.load raises on files that are cut short, damaged or something else altogether.
_UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
)


def load_codec(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Codec:
    """Load the codec of a checkpoint.

    Args:
        path: A folder that holds codec.pth, or such a file.
        device: Where to put it.
        dtype: Dtype of its weights; the file's is float32.

    Returns:
        The codec in evaluation mode, weight norm folded.

    Raises:
        UserError: The file is absent, cannot be read, or is not exactly a codec.
    """
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    return codec_from_state(read_state(file), str(file)).to(device=device, dtype=dtype).eval()


def read_codec_config(path: str | Path) -> CodecConfig:
    """Read the sizes of a checkpoint's codec without building it.

    Args:
        path: A folder that holds codec.pth, or such a file.

    Returns:
        Its sizes.

    Raises:
        UserError: The file is absent or cannot be read, or its sizes do not fit together.
    """
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    state = unwrap_state(read_state(file))
    return config_from_state({key: value for key, value in state.items() if isinstance(value, Tensor)})


def codec_from_state(state: Mapping[str, Any], source: str = "the state dict") -> Codec:
    """Build the codec that a codec.pth's tensors are.

    Args:
        state: Tensors by key, perhaps wrapped or prefixed; weight-normed or folded. The codec may share their memory.
        source: What it is called in errors.

    Returns:
        The codec, float32, on the tensors' device.

    Raises:
        UserError: Keys are absent, left over or misshapen, or hold anything but finite floating values.
    """
    state = unwrap_state(state)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    faults = [f"{key}: {type(value).__name__}, not a tensor" for key, value in state.items() if key not in tensors]
    try:
        config = config_from_state(tensors)
    except UserError as error:
        raise UserError(f"{source}: {error.got}", error.expected, error.todo) from error
    folded, more = _check_and_fold(config, tensors)
    faults += more
    if faults:
        raise UserError(
            f"{source}: {len(faults)} faults\n" + shorten_list(sorted(faults), limit=50),
            "exactly the tensors of an S2 codec",
            "fetch the file again from the model it belongs to",
        )
    with without_values():
        codec = Codec(config)
    codec.load_state_dict(folded, strict=True, assign=True)
    return codec


def read_state(file: Path) -> Mapping[str, Any]:
    """Read a file of tensors, never running code from it.

    Args:
        file: A file that torch.save wrote.

    Returns:
        What it holds, on the CPU.

    Raises:
        UserError: The file is absent, is not readable, or does not hold a dict.
    """
    if not file.is_file():
        raise UserError(
            f"{file} is not there", "a codec.pth", f"fetch {FILE_NAME} along with the model, or fix the path"
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise UserError(
            f"{file} ({file.stat().st_size:,} bytes) cannot be read: {(str(error) or repr(error)).splitlines()[0]}",
            "a complete file of tensors",
            "fetch the file again",
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{file} holds a {type(state).__name__}", "a dict of tensors by name", "fetch the file again")
    return state


def unwrap_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Take a `state_dict` wrapper and a `generator.` prefix off.

    Args:
        state: As read from a file; not changed.

    Returns:
        Values by bare key. Of a training checkpoint, the discriminator is dropped.
    """
    inner = state.get("state_dict")
    keys = dict(inner if isinstance(inner, Mapping) else state)
    if any(key.startswith("generator.") for key in keys):
        keys = {key: value for key, value in keys.items() if not key.startswith("discriminator.")}
    return {key.removeprefix("generator."): value for key, value in keys.items()}


def _check_and_fold(config: CodecConfig, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Give the parameters of `Codec` in float32, and every fault of the tensors, one line each."""
    ignored = buffer_keys(config)
    rest = {key: tensor for key, tensor in tensors.items() if key not in ignored}
    folded: dict[str, Tensor] = {}
    faults: list[str] = []

    def take(key: str, shape: tuple[int, ...]) -> Tensor | None:
        tensor = rest.pop(key, None)
        fault = _fault(tensor, shape)
        if tensor is None or fault:
            faults.append(f"{key}: {fault}")
            return None
        return tensor.float()

    for name, shape in parameter_shapes(config).items():
        styles = weight_norm_styles(name)
        if not styles or name in rest:  # plain, or folded already
            weight = take(name, shape)
        else:
            stem = name.removesuffix(".weight")
            style = next((s for s in styles if stem + s[0] in rest or stem + s[1] in rest), styles[0])
            g, v = take(stem + style[0], (shape[0], *[1] * (len(shape) - 1))), take(stem + style[1], shape)
            weight = None if g is None or v is None else fold_weight(g, v)
            if weight is not None and not bool(torch.isfinite(weight).all()):
                faults.append(f"{stem}{style[1]}: rows of zeros, which weight norm cannot scale")
        if weight is not None:
            folded[name] = weight
    return folded, faults + [f"{key}: left over" for key in rest]


def _fault(tensor: Tensor | None, shape: tuple[int, ...]) -> str | None:
    if tensor is None:
        return "missing"
    if tuple(tensor.shape) != shape:
        return f"shape {list(tensor.shape)}, expected {list(shape)}"
    if not tensor.is_floating_point():
        return f"dtype {tensor.dtype}, expected floating"
    if not bool(torch.isfinite(tensor).all()):
        return f"{int((~torch.isfinite(tensor)).sum())} values are NaN or infinite"
    return None
