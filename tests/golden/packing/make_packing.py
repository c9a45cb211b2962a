"""Write packing.safetensors: a tiny weight at each bit width, packed by gptqmodel's own packer.

    GPTQMODEL_DISABLE_PACK_EXT=1 python tests/golden/packing/make_packing.py

Needs gptqmodel 7.6.x. For each width b, `b<b>.codes` uint8 [32, 64], `b<b>.scales` float16 [2, 32], `b<b>.g_idx`
int32 [64] are what goes in (g_idx shuffled, as desc_act makes it); `b<b>.gptq.*` and `b<b>.gptq_v2.*` come out.
"""

import importlib.metadata
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
OUT_FEATURES, IN_FEATURES, GROUP_SIZE = 32, 64, 32


def case(bits):
    """Random codes, scales and a shuffled grouping."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (OUT_FEATURES, IN_FEATURES), generator=generator, dtype=torch.uint8)
    groups = IN_FEATURES // GROUP_SIZE
    scales = (torch.rand(groups, OUT_FEATURES, generator=generator) * 0.01 + 0.001).half()
    g_idx = (torch.randperm(IN_FEATURES, generator=generator) // GROUP_SIZE).int()
    return codes, scales, g_idx


def gptqmodel_pack(codes, scales, g_idx, bits, checkpoint_format, packer="pack_block"):
    """Pack with gptqmodel: dequantize, hand over weight, scales [M, G] and zeros [M, G], take the buffers."""
    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"  # its C++ packer would be compiled first
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    rows, columns = codes.shape
    zero = 2 ** (bits - 1)
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = (codes.float() - zero) * scales.float().T[:, g_idx.long()]
    common = {"bits": bits, "group_size": GROUP_SIZE, "sym": True, "desc_act": True}
    module = TorchLinear(
        **common, in_features=columns, out_features=rows, bias=False, pack_dtype=torch.int32, register_buffers=False
    )
    exact = scales.float().T.contiguous()
    getattr(module, packer)(linear=linear, scales=exact, zeros=torch.full_like(exact, zero), g_idx=g_idx.clone())
    if checkpoint_format == "gptq":
        config = QuantizeConfig(**common, act_group_aware=False, offload_to_disk=False)
        convert_gptq_v2_to_v1_format_module(module, config)
    return {name: getattr(module, name).clone().contiguous() for name in ("qweight", "qzeros", "scales", "g_idx")}


def main():
    """Write the fixture and where it came from."""
    tensors = {}
    for bits in (2, 3, 4, 8):
        codes, scales, g_idx = case(bits)
        tensors |= {f"b{bits}.codes": codes, f"b{bits}.scales": scales, f"b{bits}.g_idx": g_idx}
        for checkpoint_format in ("gptq", "gptq_v2"):
            packed = gptqmodel_pack(codes, scales, g_idx, bits, checkpoint_format)
            tensors |= {f"b{bits}.{checkpoint_format}.{name}": tensor for name, tensor in packed.items()}
    save_file(tensors, HERE / "packing.safetensors")
    provenance = {
        "source": "https://github.com/ModelCloud/GPTQModel",
        "gptqmodel": importlib.metadata.version("gptqmodel"),
        "torch": torch.__version__,
        "packer": "TorchLinear.pack_block, then convert_gptq_v2_to_v1_format_module for gptq",
    }
    (HERE / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
