"""Write engines.json: what the engines' own loading code does with folders that s2quant exports for them.

    python tests/golden/export/make_engines.py --upstream DIR

DIR holds unpacked releases, each in a folder of its own: vllm-0.28.0, vllm-0.30.0, vllm-omni-0.28.0,
vllm-omni-0.30.0 and sglang-0.5.8 (`pip download --no-deps NAME==VERSION`, then unzip the wheel;
only the Python files are needed) and sglang-omni-pr150, a work tree of https://github.com/sgl-project/sglang-omni at
8ee127c8f170f3b3a6b87ed94cead3ccd98aa754, the head of pull request 150.

Executed are the engines' model classes (Slow AR, and vllm-omni's Fast AR), their linear layers and parameter classes
with the weight loaders, their GPTQ configuration classes and linear methods, and the models' `load_weights`. Shells
stand for attention, norms, embeddings, kernels and process groups (upstream.py); nothing is computed with the weights.

For each engine release and each folder of engine_cases.py (tiny sizes, made by formulas) and of recipes at the real
size (shapes only): the text with which it was refused, or
- dense: the run-time linears of the Slow AR that the engine builds in floating point;
- packed: how often which bits, group and desc_act occur among the others;
- skipped: tensors of the folder that no parameter took;
- unfilled: elements of parameters that no tensor was copied to (tiny sizes only: they still hold a marker);
- params: sha256 of every Slow AR linear's parameters after loading (tiny sizes only).
"""

import argparse
import hashlib
import importlib.util
import json
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "export")]
import engine_cases as cases  # noqa: E402
from upstream import Platform, Pluggable, Shell, Shells, Sized  # noqa: E402

from s2quant.checkpoint.config import S2Config  # noqa: E402
from s2quant.export.engines import engine_config  # noqa: E402
from s2quant.export.profiles import export_checkpoint  # noqa: E402
from s2quant.export.random import s2_pro_config, tiny_config, write_random  # noqa: E402

VLLM = "vllm.model_executor."
VLLM_QUANT = VLLM + "layers.quantization."
FISH = "vllm_omni.model_executor.models.fish_speech."
SGLANG_QUANT = "sglang.srt.layers.quantization."
MARKER = -0x5A5A5A5B
S2PRO = "sglang_omni.models.fishaudio_s2_pro.sglang_model"


class Copies(TorchFunctionMode):
    """Counts the elements that are copied into tensors."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_function__(self, func, kinds, arguments=(), keywords=None):
        if func is torch.Tensor.copy_:
            self.num_elements += arguments[0].numel()
        return func(*arguments, **(keywords or {}))


class Kernel:
    """Stands for the kernel that would be chosen on a GPU."""

    def __init__(self, *arguments, **keywords):
        pass


def set_attributes(weight, attributes):
    """Do as both engines' set_weight_attrs."""
    for name, value in (attributes or {}).items():
        setattr(weight, name, value)


def make_layers(number, make, prefix=""):
    """Do as both engines' make_layers on one device; they differ in what they call and give."""
    return torch.nn.ModuleList([make(idx=index, prefix=f"{prefix}.{index}") for index in range(number)])


def vllm_shells(upstream, version):
    """The hook for vllm and vllm-omni of a version."""
    only = types.SimpleNamespace(is_first_rank=True, is_last_rank=True)
    given = {
        VLLM + "custom_op.PluggableLayer": Pluggable,
        VLLM + "kernels.linear.choose_mp_linear_kernel": lambda config: Kernel,
        VLLM + "layers.layernorm.RMSNorm": Sized,
        VLLM + "layers.vocab_parallel_embedding.VocabParallelEmbedding": Sized,
        VLLM + "layers.vocab_parallel_embedding.ParallelLMHead": Sized,
        VLLM + "model_loader.weight_utils.default_weight_loader": lambda param, loaded: param.data.copy_(loaded),
        VLLM + "models.utils.make_layers": lambda number, make, prefix: (
            0, number, make_layers(number, lambda idx, prefix: make(prefix=prefix), prefix)
        ),
        VLLM + "models.utils.maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
        VLLM + "utils.set_weight_attrs": set_attributes,
        "vllm.config.get_current_vllm_config_or_none": lambda: None,
        "vllm.distributed.divide": lambda one, other: one // other,
        "vllm.distributed.get_pp_group": lambda: only,
        "vllm.distributed.get_tensor_model_parallel_rank": lambda: 0,
        "vllm.distributed.get_tensor_model_parallel_world_size": lambda: 1,
        "vllm.platforms.current_platform": Platform(),
        "vllm.transformers_utils.config.set_default_rope_theta": lambda config, default_theta: None,
        "vllm_omni.attention.fish_kvcache_attn.is_fish_kvcache_attn_enabled": lambda: False,
    }  # fmt: skip
    real = {
        *(VLLM + name for name in ("parameter", "layers.linear", "models.qwen2", "models.qwen3")),
        *(VLLM_QUANT + name for name in ("base_config", "auto_gptq", "utils.gptq_utils", "utils.marlin_utils")),
        *(FISH + name for name in ("fish_speech_slow_ar", "fish_speech_fast_ar", "configuration_fish_speech")),
        "vllm.scalar_type", "vllm.utils.collection_utils", "vllm.utils.math_utils",
    }  # fmt: skip
    folders = {"vllm": upstream / f"vllm-{version}", "vllm_omni": upstream / f"vllm-omni-{version}"}
    return Shells(folders, real, given)


def build_vllm(raw):
    """Build vllm-omni's Slow AR with its Fast AR from a config.json, as `get_quant_config` and the loader do."""
    quantization = importlib.import_module(VLLM_QUANT + "base_config")
    resolve = getattr(quantization, "resolve_quant_method", None)  # 0.30: imported from the package
    if resolve is not None:
        importlib.import_module(VLLM + "layers.quantization").resolve_quant_method = resolve
    importlib.import_module(VLLM + "layers.linear")
    gptq = importlib.import_module(VLLM_QUANT + "auto_gptq")
    slow = importlib.import_module(FISH + "fish_speech_slow_ar")
    settings = importlib.import_module(FISH + "configuration_fish_speech")
    config = settings.FishSpeechConfig(**raw)
    config.text_config.rope_parameters = {}  # set by a helper of vLLM that transformers' versions differ in
    method = gptq.AutoGPTQConfig.override_quantization_method(config.quantization_config, None)
    assert method == gptq.AutoGPTQConfig.get_name(), method
    quant = gptq.AutoGPTQConfig.from_config(config.quantization_config)
    model_class = slow.FishSpeechSlowARForConditionalGeneration
    assert not hasattr(model_class, "packed_modules_mapping") and not hasattr(model_class, "hf_to_vllm_mapper")
    quant.maybe_update_config("a folder that must not be read")
    vllm_config = Shell()
    vllm_config.model_config = types.SimpleNamespace(model="", hf_config=config)
    vllm_config.cache_config, vllm_config.quant_config = None, quant
    return model_class(vllm_config=vllm_config), "AutoGPTQLinearMethod"


def sglang_shells(upstream, version, omni):
    """The hook for sglang of a version and a sglang-omni; the compiled sgl_kernel has the same scalar types as vLLM."""
    spec = importlib.util.spec_from_file_location("scalar_type", upstream / "vllm-0.28.0/vllm/scalar_type.py")
    source = importlib.util.module_from_spec(spec)
    sys.modules["scalar_type"] = source
    spec.loader.exec_module(source)
    scalar_types = source.scalar_types
    given = {
        "sglang.srt.distributed.divide": lambda one, other: one // other,
        "sglang.srt.distributed.get_tensor_model_parallel_rank": lambda: 0,
        "sglang.srt.distributed.get_tensor_model_parallel_world_size": lambda: 1,
        "sglang.srt.layers.layernorm.RMSNorm": Sized,
        "sglang.srt.layers.utils.MultiPlatformOp": type("MultiPlatformOp", (torch.nn.Module,), {}),
        "sglang.srt.layers.vocab_parallel_embedding.VocabParallelEmbedding": Sized,
        "sglang.srt.layers.vocab_parallel_embedding.ParallelLMHead": Sized,
        "sglang.srt.utils.get_device_capability": lambda: (9, 0),
        "sglang.srt.utils.is_cuda": lambda: True,
        "sglang.srt.utils.set_weight_attrs": set_attributes,
        "sglang_omni.utils.add_prefix": lambda name, prefix: f"{prefix}.{name}" if prefix else name,
        "sglang_omni.vendor.sglang.utils.make_layers": make_layers,
        "sgl_kernel.scalar_type.scalar_types": scalar_types,
    }
    real = {
        *(SGLANG_QUANT + name for name in ("base_config", "gptq", "utils", "marlin_utils", "unquant")),
        "sglang.srt.layers.linear", "sglang.srt.layers.parameter", "sglang_omni.vendor.sglang.layers", S2PRO,
    }  # fmt: skip
    folders = {"sglang": upstream / f"sglang-{version}", "sglang_omni": upstream / omni}
    return Shells(folders | dict.fromkeys(("sgl_kernel", "vllm"), upstream), real, given)


def build_sglang(raw):
    """Build sglang-omni's Slow AR from a config.json."""
    gptq = importlib.import_module(SGLANG_QUANT + "gptq")
    settings = raw["quantization_config"]
    method = gptq.GPTQMarlinConfig.override_quantization_method(settings, None)
    assert method == gptq.GPTQMarlinConfig.get_name(), method
    quant = gptq.GPTQMarlinConfig.from_config(settings)
    config = types.SimpleNamespace(text_config=types.SimpleNamespace(**raw["text_config"]))
    model = importlib.import_module(S2PRO).S2ProSGLangTextModel(config=config, quant_config=quant)
    return model, "GPTQMarlinLinearMethod"


def outcome(build, raw, tensors, device):
    """Build a model, load a folder into it and say what came of it."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model, packed_method = build(raw)
            taken, copies = set(), Copies()
            for param in model.parameters():
                param.data.fill_(MARKER if param.dtype == torch.int32 else float("nan"))
            with copies:
                model.load_weights(watched(tensors, taken, copies))
    except (ValueError, AssertionError, KeyError, RuntimeError, AttributeError) as error:
        return {"refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    finally:
        torch.set_default_dtype(torch.float32)
    linears = {
        getattr(layer, "prefix", "") or name: layer  # sglang keeps no prefix
        for name, layer in model.named_modules()
        if hasattr(layer, "quant_method") and not name.startswith("fast_ar")
    }
    packed = {name: layer for name, layer in linears.items() if type(layer.quant_method).__name__ == packed_method}
    kinds = Counter()
    for layer in packed.values():
        used = layer.quant_method.quant_config
        kinds[f"{used.weight_bits} bits, group {used.group_size}, desc_act {used.desc_act}"] += 1
    return {
        "dense": [name for name in linears if name not in packed],
        "packed": dict(sorted(kinds.items())),
        "skipped": sorted(set(tensors) - taken),
    } | ({"unfilled": unfilled(model), "params": hashes(model)} if device == "cpu" else {})


def unfilled(model):
    """Count elements that still hold the marker."""
    marks = [(p == MARKER) if p.dtype == torch.int32 else p.isnan() for p in model.parameters()]
    return int(sum(mark.sum() for mark in marks))


def watched(tensors, taken, copies):
    """Hand out tensors by name; one after which nothing was copied was skipped."""
    for name, tensor in tensors.items():
        before = copies.num_elements
        yield name, tensor
        if copies.num_elements > before:
            taken.add(name)


def hashes(model):
    """Hash the parameters of the linears of the Slow AR."""
    found = {}
    for name, param in model.named_parameters():
        if "layers." in name and "norm" not in name and not name.startswith("fast_ar"):
            content = param.data.contiguous().view(torch.uint8).numpy().tobytes()
            found[name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def tiny_folders(profile, scratch):
    """Export the folders of engine_cases for a profile; gives config.json and tensors by case."""
    for variant in cases.VARIANTS:
        probe = cases.write_probe(scratch / "tiny", scratch / f"probe-{profile}-{variant}", variant)
        out = scratch / f"{profile}-{variant}"
        export_checkpoint(probe, out, profile)
        yield variant, json.loads((out / "config.json").read_text("utf-8")), load_file(out / cases.SINGLE)


def real_folders(profile):
    """Lay out recipes at the real size; gives config.json and tensors without data by case."""
    config = S2Config.from_json(s2_pro_config())
    for name in cases.REAL_RECIPES:
        plan = cases.real_plan(name)
        raw = s2_pro_config() | {"quantization_config": engine_config(profile, config, cases.planned_packings(plan))}
        headers = cases.planned_headers(plan, is_split=profile == "vllm-omni")
        yield (
            name,
            raw,
            {key: torch.empty(shape, dtype=dtype, device="meta") for key, (dtype, shape) in headers.items()},
        )


def main():
    """Write the fixture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--upstream", type=Path, required=True)
    upstream = parser.parse_args().upstream
    engines = [
        ("vllm-omni", "vllm and vllm-omni 0.28.0", vllm_shells(upstream, "0.28.0"), build_vllm),
        ("vllm-omni", "vllm and vllm-omni 0.30.0", vllm_shells(upstream, "0.30.0"), build_vllm),
        ("sglang-omni", "sglang-omni #150", sglang_shells(upstream, "0.5.8", "sglang-omni-pr150"), build_sglang),
    ]
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_random(tiny_config(), scratch / "tiny", seed=0)
        tiny = {name: list(tiny_folders(name, scratch)) for name in ("vllm-omni", "sglang-omni")}
        for profile, release, shells, build in engines:
            with shells:
                result[release] = {"profile": profile} | {
                    case: outcome(build, raw, tensors, device)
                    for folders, device in ((tiny[profile], "cpu"), (real_folders(profile), "meta"))
                    for case, raw, tensors in folders
                }
    text = json.dumps(result, indent=1)
    (HERE / "engines.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
