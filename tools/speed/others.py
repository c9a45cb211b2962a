"""Other libraries' kernels for the same linears, where they are ready: gptqmodel's Marlin and ExLlamaV2.

gptqmodel compiles its kernels at first use, which takes minutes; only those that are loaded already (`--preload`) are
timed. Act order is left to them, as in their own models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from s2quant.packing import pack
from tools.speed.linears import ROTATED_BYTES, Case, random_quantized
from tools.speed.timing import captured, replayed

SPACES = {"marlin": "gptqmodel_marlin_bf16", "exllamav2": "gptqmodel_exllamav2"}  # of torch.ops


def libraries(case: Case, device: torch.device) -> dict[str, Callable[[int], float]]:
    """Give, per kernel that is ready for a linear, what times it at a number of rows; the others say why not."""
    found: dict[str, Callable[[int], float]] = {}
    for name, make in (("marlin", _marlin), ("exllamav2", _exllama)):
        if case.kind == "bf16" or (case.kind == "w8" and name == "exllamav2"):
            continue
        reason = _obstacle(name)
        if reason is None:
            try:
                found[name] = _timer(_modules(case, device, make), case, device)
            except Exception as error:  # noqa: BLE001 - another library that fails must not lose our own figures
                reason = f"{type(error).__name__}: {str(error)[:300]}"
        if reason is not None:
            print(f"  {case.kind} {case.name}: {name} is not timed: {reason}", flush=True)
    return found


def _obstacle(name: str) -> str | None:
    try:
        import gptqmodel  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        return f"gptqmodel cannot be imported ({error})"
    loaded = {operator.split("::")[0] for operator in torch._C._dispatch_get_all_op_names()}
    if SPACES[name] not in loaded:
        return "its extension is not loaded (--preload)"
    return None


def _timer(modules: list[nn.Module], case: Case, device: torch.device) -> Callable[[int], float]:
    def seconds(rows: int) -> float:
        x = torch.randn(rows, case.in_features, device=device).bfloat16()
        with torch.inference_mode():
            return replayed(captured(lambda: [module(x) for module in modules])) / len(modules)

    return seconds


def _modules(case: Case, device: torch.device, make: Callable[..., nn.Module]) -> list[nn.Module]:
    """Make as many modules of one weight as no cache holds."""
    bits = 4 if case.kind == "w4" else 8
    weight = random_quantized(case.out_features, case.in_features, case.group_size, device, bits)
    tensors = pack(weight, "gptq_v2")
    count = max(2, -(-ROTATED_BYTES // (tensors["qweight"].numel() * 4)))
    settings = {
        "bits": bits,
        "group_size": case.group_size,
        "desc_act": True,
        "sym": True,
        "in_features": case.in_features,
        "out_features": case.out_features,
        "bias": False,
        "dtype": torch.bfloat16,
    }
    return [make({name: tensor.clone() for name, tensor in tensors.items()}, settings, device) for _ in range(count)]


def _marlin(tensors: dict[str, Tensor], settings: dict[str, Any], device: torch.device) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear  # type: ignore[import-untyped]

    module: nn.Module = MarlinLinear(**settings).to(device)
    tensors["scales"] = tensors["scales"].bfloat16()
    for name, tensor in tensors.items():
        getattr(module, name).data = tensor
    module.post_init()
    return module


def _exllama(tensors: dict[str, Tensor], settings: dict[str, Any], device: torch.device) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.exllamav2 import (  # type: ignore[import-untyped]
        ExllamaV2Linear,
        ScratchSpace,
    )

    module: nn.Module = ExllamaV2Linear(**settings).to(device)
    for name, tensor in tensors.items():
        setattr(module, name, tensor)
    module.post_init(ScratchSpace(module.scratch_space_fixed(), device))  # type: ignore[operator]
    return module
