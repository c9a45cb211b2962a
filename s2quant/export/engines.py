"""What vllm-omni and sglang-omni ask of a GPTQ folder: names, one configuration, and what they cannot load at all.

Both run the Slow AR with fused linears (q|k|v, gate|up) whose quantization is looked up by run-time name, and the
Fast AR in plain floating point. So a folder for them has to say three things right: which run-time linear is packed,
with which bits and group, and under which name each tensor lies. A linear looked up wrongly is not reported by the
engines: its tensors are skipped and it keeps uninitialised weights.

Refused: a packed Fast AR, bits other than 4 and 8, groups that the Marlin kernels lack, fused parts that differ.

Sources, read and executed (tests/golden/export/make_engines.py): vllm-omni 0.28.0 and 0.30.0 with the vllm of the
same number, sglang-omni's pull request 150 with sglang 0.5.8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.layout import FAST, SLOW, linears
from s2quant.checkpoint.reader import Checkpoint
from s2quant.errors import UserError, shorten_list

Engine = Literal["vllm-omni", "sglang-omni"]
ENGINES: tuple[Engine, ...] = ("vllm-omni", "sglang-omni")
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)

MODULES_IN_BLOCK = [
    *(f"self_attn.{name}" for name in ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_up_proj", "gate_proj", "up_proj", "down_proj")),
]
"""Without this list vLLM takes every packed name of the file, none of which is part of a run-time name."""

_RUN_TIME = {
    "vllm-omni": ("model.layers", "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "sglang-omni": (
        "text_model.model.layers",
        "attention.wqkv",
        "attention.wo",
        "feed_forward.gate_up_proj",
        "feed_forward.w2",
    ),
}
_PARTS = (("attention.wqkv",), ("attention.wo",), ("feed_forward.w1", "feed_forward.w3"), ("feed_forward.w2",))


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How one linear is packed.

    Args:
        bits: Bits per weight.
        group_size: Inputs that share a scale.
        g_idx: Group of each input, when it is known; plans do not know it.
        in_order: Whether input k belongs to group k // group_size, so that no engine needs g_idx.
    """

    bits: int
    group_size: int
    g_idx: tuple[int, ...] | None = None
    in_order: bool


def read_packings(checkpoint: Checkpoint) -> dict[str, Packing | None]:
    """Say how every linear of a checkpoint is packed; of the tensors only g_idx is read.

    Args:
        checkpoint: The checkpoint.

    Returns:
        By module name on disk; None for a linear in floating point.
    """
    packings: dict[str, Packing | None] = {}
    for name in linears(checkpoint.config):
        module = checkpoint.modules[name]
        packings[name] = None
        if module.bits is not None and module.group_size is not None:
            g_idx = tuple(checkpoint.tensor(f"{name}.g_idx").tolist())
            in_order = g_idx == tuple(k // module.group_size for k in range(len(g_idx)))
            packings[name] = Packing(bits=module.bits, group_size=module.group_size, g_idx=g_idx, in_order=in_order)
    return packings


def engine_config(engine: Engine, config: S2Config, packings: Mapping[str, Packing | None]) -> dict[str, Any]:
    """Write the `quantization_config` by which an engine loads a checkpoint.

    Args:
        engine: Which.
        config: The model's configuration.
        packings: How each linear is packed, by name on disk.

    Returns:
        The object; `desc_act` is true only if some linear needs its g_idx.

    Raises:
        UserError: The engine cannot load such a checkpoint; every offender is listed.
    """
    _refuse(engine, config, packings)
    packed = [one for one in packings.values() if one is not None]
    sizes = [(one.bits, one.group_size) for one in packed]
    bits, group_size = max(sizes, key=sizes.count)
    dynamic: dict[str, dict[str, Any]] = {r"-:^fast_ar\.": {}} if engine == "vllm-omni" else {}
    for names, run_time in fused_linears(engine, config):
        asked = (
            [run_time] if engine == "vllm-omni" else list(dict.fromkeys([*names, run_time]))
        )  # names of native tools
        one = packings[names[0]]
        for name in asked:
            pattern = f"^{re.escape(name)}$"
            if one is None:
                dynamic[f"-:{pattern}"] = {}
            elif (one.bits, one.group_size) != (bits, group_size):
                dynamic[f"+:{pattern}"] = {"bits": one.bits, "group_size": one.group_size}
    if engine == "sglang-omni":
        dynamic |= {f"-:^{re.escape(name)}$": {} for name in packings if name.startswith(f"{FAST}.")}
    made = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "desc_act": not all(one.in_order for one in packed),
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }
    return made | ({"modules_in_block_to_quantize": MODULES_IN_BLOCK} if engine == "vllm-omni" else {})


def fused_linears(engine: Engine, config: S2Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Go through the linears of the Slow AR as an engine builds them.

    Args:
        engine: Which.
        config: The model's configuration.

    Yields:
        The names on disk that one linear is made of, and the name by which the engine looks up its quantization.
    """
    root, *names = _RUN_TIME[engine]
    for layer in range(config.slow.n_layer):
        for parts, name in zip(_PARTS, names, strict=True):
            yield tuple(f"{SLOW}.layers.{layer}.{part}" for part in parts), f"{root}.{layer}.{name}"


def split_names(module: str) -> list[str]:
    """Name the q, k and v that vllm-omni wants in place of a packed wqkv of the Slow AR.

    Args:
        module: Name of the wqkv on disk.

    Returns:
        Three module names; only a dense wqkv is split by vllm-omni itself.
    """
    layer = module.removesuffix(".attention.wqkv")
    return [f"{layer}.self_attn.{part}_proj" for part in "qkv"]


def split_sizes(config: S2Config) -> list[int]:
    """Give the outputs of q, k and v.

    Args:
        config: The model's configuration.

    Returns:
        Three numbers that add up to the outputs of wqkv.
    """
    slow = config.slow
    return [slow.n_head * slow.head_dim, slow.n_local_heads * slow.head_dim, slow.n_local_heads * slow.head_dim]


def engine_notes(engine: Engine, quantization: Mapping[str, Any]) -> list[str]:
    """Say which releases load the folder.

    Args:
        engine: Which.
        quantization: What `engine_config` made.

    Returns:
        Sentences for the user.
    """
    if engine == "sglang-omni":
        return [
            "needs sglang-omni with its pull request 150 (and sglang 0.5.8, which that names); released sglang-omni up "
            "to 0.1.9 skips packed tensors without an error and leaves those linears uninitialised"
        ]
    if quantization["desc_act"]:
        return [
            "needs vllm and vllm-omni below 0.30: 0.30 refuses activation order (desc_act); for it, quantize by a "
            "recipe with desc_act: false"
        ]
    return ["loads with vllm and vllm-omni 0.28 and 0.30"]


def _refuse(engine: Engine, config: S2Config, packings: Mapping[str, Packing | None]) -> None:
    """List everything that the engine cannot load."""
    if all(one is None for one in packings.values()):
        raise UserError(
            "nothing in this checkpoint is quantized",
            f"a quantized checkpoint: {engine} reads the original layout as it is",
            "give the folder to the engine, or use --profile native",
        )
    faults = []
    for name, one in packings.items():
        if one is None:
            continue
        if name.startswith(f"{FAST}."):
            faults.append(f"{name} is packed; the Fast AR is loaded in floating point only")
        elif one.bits not in BITS:
            faults.append(f"{name} has {one.bits} bits; its kernels take {' and '.join(map(str, BITS))}")
        elif one.group_size not in GROUP_SIZES:
            faults.append(f"{name} has groups of {one.group_size}; its kernels take {', '.join(map(str, GROUP_SIZES))}")
    for names, run_time in fused_linears(engine, config):
        first, *rest = [packings[name] for name in names]
        faults += [
            f"{names[0]} and {other} are one linear ({run_time}) there and differ: {_difference(first, one)}"
            for other, one in zip(names[1:], rest, strict=True)
            if first != one
        ]
    if faults:
        raise UserError(
            f"{engine} cannot load this checkpoint:\n{shorten_list(faults)}",
            "a Fast AR in bf16, 4 or 8 bits, groups of 32, 64 or 128, and w1 and w3 of a layer packed alike",
            "quantize by a recipe that keeps to this, or use --profile bf16",
        )


def _difference(one: Packing | None, other: Packing | None) -> str:
    if one is None or other is None:
        return "one is packed, the other is not"
    if (one.bits, one.group_size) != (other.bits, other.group_size):
        return f"{one.bits} bits in groups of {one.group_size}, {other.bits} in groups of {other.group_size}"
    return "their inputs are grouped differently (g_idx)"
