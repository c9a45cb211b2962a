"""quantization_config, as gptqmodel, AutoGPTQ, vLLM and SGLang read it.

config.json keeps all of S2's own fields, first and unchanged, with `quantization_config` merged in;
quantize_config.json holds the same object. Modules kept dense are named by `dynamic` patterns, anchored at both
ends, because readers match such patterns from the start only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from s2quant.checkpoint.reader import Module
from s2quant.quantize.plan import Plan
from s2quant.recipe import LinearSettings
from s2quant.records import versions


def quantization_config(plan: Plan, records: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Describe a quantized checkpoint.

    Args:
        plan: What was done.
        records: One per quantized module: whose solver it was.

    Returns:
        The object for quantize_config.json and for config.json's `quantization_config`.
    """
    settings = [module.settings for module in plan.quantized.values() if module.settings is not None]
    base = _most_common(settings)
    dynamic: dict[str, dict[str, Any]] = {}
    for module in plan.modules:
        if module.kind != "linear":
            continue
        pattern = f"^{re.escape(module.name)}$"
        if module.settings is None:
            dynamic[f"-:{pattern}"] = {}
        elif (module.settings.bits, module.settings.group_size) != (base.bits, base.group_size):
            dynamic[f"+:{pattern}"] = {"bits": module.settings.bits, "group_size": module.settings.group_size}
    version = versions()
    makers = ["s2quant", *(["gptqmodel"] if any(record["solver"] == "gptqmodel" for record in records) else [])]
    desc_act = any(s.desc_act and s.method == "gptq" for s in settings)  # readers take g_idx only when it is true
    return _object(base.bits, base.group_size, desc_act, dynamic) | {
        "meta": {
            "quantizer": [f"{maker}:{version[maker]}" for maker in makers],
            "recipe": plan.recipe.name,
            "recipe_sha256": plan.recipe.sha256,
            "damp_percent": base.damp_percent,
            "damp_auto_increment": 0 if plan.recipe.strict else None,
            "static_groups": False,
            "true_sequential": True,
            "act_group_aware": base.act_group_aware,
        },
    }


def describe_modules(modules: Iterable[Module]) -> dict[str, Any]:
    """Describe a quantized checkpoint that came without a quantization_config, from its tensors.

    How it was quantized is not in the tensors and is left out; desc_act is true because readers take g_idx then.

    Args:
        modules: Its modules; at least one is quantized.

    Returns:
        As `quantization_config`.
    """
    linears = [module for module in modules if module.kind == "linear"]
    sizes = [(module.bits, module.group_size) for module in linears if module.bits is not None]
    bits, group_size = max(sizes, key=sizes.count)
    dynamic: dict[str, dict[str, Any]] = {}
    for module in linears:
        pattern = f"^{re.escape(module.name)}$"
        if module.bits is None:
            dynamic[f"-:{pattern}"] = {}
        elif (module.bits, module.group_size) != (bits, group_size):
            dynamic[f"+:{pattern}"] = {"bits": module.bits, "group_size": module.group_size}
    return _object(bits, group_size, True, dynamic) | {"meta": {"quantizer": []}}


def _object(bits: int | None, group_size: int | None, desc_act: bool, dynamic: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bits": bits,
        "dynamic": dict(dynamic),
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": True,
        "lm_head": False,
        "method": "gptq",
        "quant_method": "gptq",
        "format": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
    }


def merged_config(raw: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """Put a quantization_config into config.json, or take it out.

    Args:
        raw: config.json as it was read.
        quantization: The object to merge in; None to remove one.

    Returns:
        The new object; S2's own fields come first, unchanged.
    """
    merged = {key: value for key, value in raw.items() if key != "quantization_config"}
    return merged if quantization is None else merged | {"quantization_config": dict(quantization)}


def _most_common(settings: list[LinearSettings]) -> LinearSettings:
    sizes = [(one.bits, one.group_size) for one in settings]
    common = max(sizes, key=sizes.count)
    return next(one for one, size in zip(settings, sizes, strict=True) if size == common)
