"""Packed folders made by integer formulas, the same on every machine; for the engine profiles and their oracle."""

import tempfile
from pathlib import Path

import torch
from folder_cases import REPOSITORY, SINGLE, link_copy, replace_bytes
from safetensors.torch import save_file

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.layout import expected_tensors
from s2quant.export.engines import Packing
from s2quant.export.random import s2_pro_config
from s2quant.packing import QuantizedWeight, pack, packed_shapes
from s2quant.quantize.plan import Plan, make_plan
from s2quant.recipe import load_recipe

L = "text_model.model.layers"
# What the recipes below leave in floating point, in every kind of linear, and what they pack otherwise.
DENSE = (f"{L}.0.attention.wqkv", f"{L}.1.feed_forward.w2", f"{L}.3.attention.wo", f"{L}.2.feed_forward.w1",
         f"{L}.2.feed_forward.w3")  # fmt: skip
EIGHT = {f"{L}.2.feed_forward.w2": (8, 64), f"{L}.1.attention.wqkv": (8, 32)}
EIGHT |= {f"{L}.3.feed_forward.{w}": (8, 32) for w in ("w1", "w3")}
VARIANTS = ("act_order", "in_order")


def dense(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """bf16 numbers between -2 and 2 that bf16 holds exactly."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7919 + seed * 104729) % 251 - 125).div(64).reshape(shape).to(torch.bfloat16)


def packed_weight(shape: tuple[int, int], bits: int, group_size: int, seed: int, in_order: bool) -> QuantizedWeight:
    """Every code, scale and group follows from its place; layers with equal `shape` share their g_idx."""
    rows, columns = shape
    place = torch.arange(rows)[:, None] * 131 + torch.arange(columns)[None] * 17 + seed * 7
    groups = columns // group_size
    order = torch.arange(columns) if in_order else torch.arange(columns) * 37 % columns
    scales = (torch.arange(groups)[:, None] * 29 + torch.arange(rows)[None] * 13 + seed) % 1021 + 3
    return QuantizedWeight(
        codes=(place // 3 % 2**bits).to(torch.uint8),
        scales=scales.div(65536).to(torch.float16),
        zeros=torch.full((groups, rows), 2 ** (bits - 1), dtype=torch.uint8),
        g_idx=(order // group_size).int(),
        bits=bits,
        group_size=group_size,
    )


def packing_of(module: str) -> tuple[int, int] | None:
    if module in DENSE or not module.startswith(L):
        return None
    return EIGHT.get(module, (4, 32))


def write_probe(tiny_folder: Path, out: Path, variant: str, others: dict[str, tuple[int, int] | None] | None = None,
                shuffled: tuple[str, ...] = ()) -> Path:  # fmt: skip
    """A packed folder of the tiny sizes; `others` packs modules otherwise, `shuffled` ones get a g_idx of their own."""
    link_copy(tiny_folder, out)
    config = S2Config.load(out)
    tensors: dict[str, torch.Tensor] = {}
    for seed, spec in enumerate(expected_tensors(config).values()):
        packing = packing_of(spec.module) if spec.kind == "linear" else None
        if others and spec.module in others:
            packing = others[spec.module]
        if packing is None:
            tensors[spec.name] = dense(spec.shape, seed)
            continue
        weight = packed_weight((spec.shape[0], spec.shape[1]), *packing, seed, variant == "in_order")
        if spec.module in shuffled:
            weight = QuantizedWeight(**(vars(weight) | {"g_idx": weight.g_idx.roll(1)}))
        tensors |= {f"{spec.module}.{part}": tensor for part, tensor in pack(weight).items()}
    (out / SINGLE).unlink()
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    replace_bytes(out / "README.md", b"a probe\n")
    return out


REAL_RECIPES = ("s2-pro-w4a16", "in-order-w4g128")
IN_ORDER = """
name: in-order-w4g128
quantize: {bits: 4, group_size: 128, desc_act: false, act_group_aware: true}
rules:
  - keep: audio_decoder.**
  - quantize: text_model.model.layers.{0,35}.feed_forward.{w1,w3}
    bits: 8
    group_size: 32
  - keep: text_model.model.layers.17.attention.wqkv
  - quantize: text_model.model.layers.*.attention.{wqkv,wo}
  - quantize: text_model.model.layers.*.feed_forward.{w1,w3,w2}
calibration: {source: none.jsonl}
"""


def real_plan(name: str) -> Plan:
    """Plan a recipe, one of the project's or the one above, at the real size."""
    if name == "s2-pro-w4a16":
        recipe = load_recipe(REPOSITORY / "recipes" / "s2-pro-w4a16.yaml")
    else:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "recipe.yaml").write_text(IN_ORDER, encoding="utf-8")
            recipe = load_recipe(Path(folder) / "recipe.yaml")
    return make_plan(recipe, S2Config.from_json(s2_pro_config()))


def planned_packings(plan: Plan) -> dict[str, Packing | None]:
    """How every linear of a plan will be packed."""
    return {
        module.name: None
        if module.settings is None
        else Packing(
            bits=module.settings.bits, group_size=module.settings.group_size, in_order=not module.settings.desc_act
        )
        for module in plan.modules
        if module.kind == "linear"
    }


def planned_headers(plan: Plan, is_split: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of the folder that a plan would end in; with wqkv split as vllm-omni wants it or not."""
    slow = plan.config.slow
    headers: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for module in plan.modules:
        if module.settings is None:
            name = module.name if module.kind == "bias" else f"{module.name}.weight"
            headers[name] = (torch.bfloat16, module.shape)
            continue
        parts = {module.name: module.shape[0]}
        if is_split and module.name.endswith("wqkv"):
            heads = {"q": slow.n_head, "k": slow.n_local_heads, "v": slow.n_local_heads}
            layer = module.name.removesuffix("attention.wqkv")
            parts = {f"{layer}self_attn.{part}_proj": number * slow.head_dim for part, number in heads.items()}
        for name, rows in parts.items():
            sizes = packed_shapes(rows, module.shape[1], module.settings.bits, module.settings.group_size)
            headers |= {f"{name}.{part}": size for part, size in sizes.items()}
    return headers
