"""Compile every kernel of the fused frame for a Hopper GPU on a machine without one, with the Triton that is installed.

    python tools/compile_check.py [--batch 1,8,12,24,32,64] [--layers 2] [--switch early,attention_warps=4]

A model of the real widths with few layers runs its frames; a launch compiles and computes nothing. Printed are the
kernels with their launch options, shared memory, compile time, and what ptxas says of registers, spilled bytes and
serialized products; exit status 1 if one does not compile. For another
Triton: `pip install --no-deps --target DIR triton==3.6.0` and `PYTHONPATH=DIR`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TARGET = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
SAID = ("KIND", "EPILOGUE", "K", "GROUPS", "T", "ROWS", "SPLITS", "STAGES", "TILES", "COLS", "LEAST")
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip
RECIPE = """
name: compile-check
quantize: {method: rtn, bits: 4, group_size: 32, sym: true, desc_act: true}
rules:
  - keep: text_model.model.embeddings
  - keep: audio_decoder.{codebook_embeddings,embeddings}
  - {quantize: "audio_decoder.layers.*.attention.{wqkv,wo}", bits: 8, group_size: 128}
  - {quantize: "audio_decoder.layers.*.feed_forward.{w1,w3,w2}", bits: 8, group_size: 128}
  - {quantize: audio_decoder.output, bits: 8, group_size: 128}
  - quantize: text_model.model.layers.*.attention.{wqkv,wo}
  - quantize: text_model.model.layers.*.feed_forward.{w1,w3,w2}
calibration: {source: none.jsonl}
"""


def assembled(ptx: str) -> str:
    """Ask ptxas for registers and spills."""
    ptxas = get_ptxas(TARGET.arch).path  # the one that Triton itself takes, which knows its PTX
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", "--gpu-name", "sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    words = [f"{registers.group(1)} registers" if registers else "", f"{spilled.group(1)} spilled" if spilled else ""]
    return ", ".join([*words, *(["wgmma serialized"] if "are serialized" in said else [])])


class Compiler:
    """Takes the place of a launch."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def __call__(self, kernel: Any, *args: Any, grid: object, warmup: object, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if named.get(name) is not None}
        values = dict(zip(kernel.arg_names, args, strict=False)) | named
        signature, constants, attributes = {}, {}, {}
        for number, parameter in enumerate(kernel.params):
            value = values.get(parameter.name, parameter.default if parameter.has_default else None)
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
                signature[parameter.name], constants[(number,)] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{TYPES[value.dtype]}"
                aligned = value.data_ptr() % 16 == 0
            else:
                signature[parameter.name] = {bool: "i1", int: "i32", float: "fp32"}[type(value)]
                aligned = type(value) is int and value % 16 == 0 and special
            if aligned:
                attributes[(number,)] = [["tt.divisibility", 16]]
        key = repr((kernel.__name__, signature, constants, attributes, options))
        if key in self.found:
            return
        started = time.perf_counter()
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        try:
            made = triton.compile(source, target=TARGET, options=options)
        except Exception as error:  # noqa: BLE001 - all of them are wanted, whatever Triton raises
            self.found[key] = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"FAILED {kernel.__name__} {options}: {self.found[key]}", flush=True)
            return
        self.found[key] = ""
        seconds = time.perf_counter() - started
        about = ", ".join(
            str(constants[n,]) for n, p in enumerate(kernel.params) if p.name in SAID and (n,) in constants
        )
        said = f"{made.metadata.shared} bytes shared, {assembled(made.asm['ptx'])}, {seconds:.1f} s"
        print(f"{kernel.__name__} ({about}) {options}: {said}", flush=True)


def switched(how: Any, word: str) -> tuple[str, Any]:
    """Read a part of `How` to be the other way round, or "name=number"."""
    name, _, number = word.partition("=")
    return name, int(number) if number else not getattr(how, name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,8,12,24,32,64")
    parser.add_argument("--layers", type=int, default=2, help="of each AR")
    parser.add_argument("--switch", default="", help="parts of `How` to be the other way round, or name=number")
    options = parser.parse_args()
    from s2quant.checkpoint.config import S2Config
    from s2quant.export.random import s2_pro_config
    from s2quant.runtime import fused_weights, triton_linear
    from s2quant.runtime.fast import FastDecoder
    from s2quant.runtime.fused import FusedFrame
    from s2quant.runtime.kernels.launch import measured
    from s2quant.runtime.prompt_graphs import KERNEL_PIECE
    from tools.speed import frames

    compiler = Compiler()
    triton.JITFunction.run = lambda kernel, *args, **named: compiler(kernel, *args, **named)
    triton_linear.triton_obstacle = fused_weights.triton_obstacle = lambda device: None  # nothing is run
    raw = s2_pro_config()
    raw["text_config"]["n_layer"] = raw["audio_decoder_config"]["n_layer"] = options.layers
    device = torch.device("cpu")
    dense = frames.random_model(S2Config.from_json(raw), device)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(RECIPE)
        packed, _ = frames.quantized_model(dense, recipe, "triton", device)
    for model in (dense, packed):
        for batch in (int(word) for word in options.batch.split(",")):
            decoder = FastDecoder(model, batch, 1024, 1024, graphs=False, fused=True)
            assert decoder.fused_obstacle is None and decoder._fused is not None, decoder.fused_obstacle
            if options.switch:
                how = measured(batch)
                how = replace(how, **dict(switched(how, word) for word in options.switch.split(",")))
                decoder._fused = FusedFrame(model, batch, 1024, decoder.max_positions, how)
            for context in (512, 1024):
                decoder.replay((batch, context, 32))
        decoder = FastDecoder(model, 1, 1024, 1024, graphs=False, fused=True)
        frame = FusedFrame(model, 1, 1024, decoder.max_positions, prompt_rows=KERNEL_PIECE)
        for rows in (16, 64, KERNEL_PIECE):  # of a prompt; two layers or more, for the last one attends to nothing
            columns = torch.zeros(rows, decoder.state.columns.shape[1], dtype=torch.int64)
            table = decoder._table.float()
            frame.read(columns, torch.arange(rows), torch.zeros(rows, dtype=torch.int64), decoder.cache, table, 512)
    failed = sum(bool(fault) for fault in compiler.found.values())
    print(f"Triton {triton.__version__}: {len(compiler.found)} kernels, {failed} not compiled")
    return 1 if failed or not compiler.found else 0


if __name__ == "__main__":
    sys.exit(main())
