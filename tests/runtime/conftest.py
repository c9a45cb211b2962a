import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import runtime_cases as cases

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.layout import expected_tensors
from s2quant.checkpoint.reader import open_checkpoint
from s2quant.checkpoint.writer import ShardWriter, carry_files
from s2quant.files import write_json
from s2quant.model import DualAR, disk_name
from s2quant.packing import pack
from s2quant.runtime.engine import Engine
from s2quant.runtime.loading import load_engine
from s2quant.runtime.sampler import Noise


@pytest.fixture(scope="session")
def small_models():
    """The two models of the golden, in float32."""

    def build(case):
        with torch.device("meta"):
            model = DualAR(S2Config.from_json(cases.raw_config(case)))
        state = {n: cases.weight(case, disk_name(n), tuple(p.shape)) for n, p in model.named_parameters()}
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval().requires_grad_(False)

    return {case: build(case) for case in ("project", "shared")}


class PromptEngine(Engine):
    """Speaks given prompts instead of texts: a request's text names them, with | between the batches."""

    def __init__(self, model, prompts, prefix=0, **options):
        super().__init__(model, None, **options)
        self.prompts, self.prefix = prompts, prefix

    def prepare(self, request):
        return request.text.split("|")

    def _prompt(self, request, text, history):
        return self.prompts[text]

    def _prefix_length(self, request):
        return self.prefix


@pytest.fixture
def prompt_engine(small_models):
    """Make an engine for a small model that speaks prompts of the case's sequence, named by their lengths."""

    def make(case="shared", num_slots=8, lengths=(5, 9, 12, 16, 20, 25, 31, 37), **options):
        prompts = {str(n): cases.prompt(case, n) for n in lengths}
        return PromptEngine(small_models[case], prompts, num_slots=num_slots, **options)

    return make


@pytest.fixture
def fed_draws(monkeypatch):
    """Replace the uniform numbers by those that the golden's generator used; a seed names the speech."""
    frames = {}

    def fill(noise, block):
        for row in block:
            frame = frames.get(noise, 0)
            frames[noise] = frame + 1
            row.copy_(cases.draws(noise.generator.initial_seed(), frame, len(row)))

    monkeypatch.setattr(Noise, "fill", fill)


@pytest.fixture
def wide_programs(monkeypatch):
    """In the interpreter, whose time is by operations, let four warps hold a program's outputs, not one in turns.

    The rule gives so small linears one; `test_runtime_kernels.py` has programs of one, two and four.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from s2quant.runtime.kernels import shapes

    rule = shapes.rule
    monkeypatch.setattr(shapes, "rule", lambda *given: replace(rule(*given), warps=4))


@pytest.fixture(scope="session")
def quantized_folder(tiny_folder, tmp_path_factory):
    """The tiny checkpoint with every linear of the Slow AR replaced by a random 4-bit weight with a shuffled g_idx."""
    return write_quantized(tiny_folder, tmp_path_factory.mktemp("quantized"), 4)


@pytest.fixture(scope="session")
def folder_of_8_bits(tiny_folder, tmp_path_factory):
    """The same in 8 bits."""
    return write_quantized(tiny_folder, tmp_path_factory.mktemp("quantized-8"), 8)


def write_quantized(dense, folder, bits):
    source = open_checkpoint(dense)
    quantization = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": 32,
        "desc_act": True,
        "sym": True,
    }
    write_json(folder / "config.json", {**source.config.raw, "quantization_config": quantization})
    carry_files(dense, folder)
    writer = ShardWriter(folder)
    for number, (name, spec) in enumerate(expected_tensors(source.config).items()):
        if spec.kind == "linear" and name.startswith("text_model."):
            weight = cases.quantized_weight(*spec.shape, seed=number, bits=bits)
            for part, tensor in pack(weight).items():
                writer.add(f"{spec.module}.{part}", tensor)
        else:
            writer.add(name, source.tensor(name))
    writer.finish()
    return folder


@pytest.fixture(scope="session")
def engine(tiny_folder):
    return load_engine(tiny_folder, dtype=torch.float32, num_slots=4)
