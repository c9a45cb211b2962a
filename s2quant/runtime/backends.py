"""What a model's linears and frames are computed by, for reports: a slower way that was taken must not be silent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from s2quant.model import DualAR
from s2quant.runtime.fused_weights import frame_obstacle


def list_linears(model: DualAR) -> list[dict[str, Any]]:
    """List the kinds of linears.

    Args:
        model: The model.

    Returns:
        One row per kind, in the model's order: kind ("slow w1", "fast output", ...), bits and group_size (None where
        it is not quantized), backend ("torch" for a dense one), count.
    """
    found: Counter[tuple[str, int | None, int | None, str]] = Counter()
    for name, module in model.named_modules():
        stack, _, rest = name.partition(".")
        last = rest.rpartition(".")[2].replace("pair", "w1+w3")
        if hasattr(module, "backend"):
            found[f"{stack} {last}", module.bits, module.group_size, module.backend] += 1
        elif isinstance(module, nn.Linear):
            found[f"{stack} {last}", None, None, "torch"] += 1
    names = ("kind", "bits", "group_size", "backend")
    return [dict(zip(names, key, strict=True)) | {"count": count} for key, count in found.items()]


def describe_decoding(model: DualAR, decoder: str, residual_size: int) -> dict[str, Any]:
    """Say how frames are made.

    Args:
        model: The model.
        decoder: "plain" or "fast".
        residual_size: Entries of a residual codebook.

    Returns:
        linears (see `list_linears`), frame ("fused": few large kernels of our own; "graph": torch's operations in one
        CUDA graph; "operations": one after the other), not_fused (why it is not fused, None if it is), text (all of it
        in a line).
    """
    reason = "the plain decoder" if decoder == "plain" else frame_obstacle(model, residual_size)
    on_gpu = model.slow.embeddings.weight.device.type == "cuda"
    frame = "fused" if reason is None else "graph" if on_gpu and decoder == "fast" else "operations"
    found = {"linears": list_linears(model), "frame": frame, "not_fused": reason}
    return found | {"text": _text(found)}


def _text(found: Mapping[str, Any]) -> str:
    backends: dict[str, list[str]] = {}
    for row in found["linears"]:
        width = "" if row["bits"] is None else f", {row['bits']} bits in groups of {row['group_size']}"
        backends.setdefault(f"{row['backend']}{width}", []).append(f"{row['count']} {row['kind']}")
    frame = {"fused": "fused frames", "graph": "frames of torch's operations in a graph"}.get(
        found["frame"], "one operation after the other"
    )
    why = "" if found["not_fused"] is None else f" (not fused: {found['not_fused']})"
    return f"{frame}{why}; linears by " + "; by ".join(f"{name}: {', '.join(what)}" for name, what in backends.items())
