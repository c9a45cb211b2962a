"""The kernels compiled for a Hopper GPU where there is none: what a barrier or a branch too many would cost is seen."""

import re

import pytest
import torch

triton = pytest.importorskip("triton")

NAMES = {
    "weight": "*i32", "second": "*fp16", "x": "*bf16", "place": "*i32", "squares_in": "*fp32", "norm": "*bf16",
    "hidden": "*fp32", "out": "*bf16", "squares_out": "*fp32", "num_rows": "i32", "num_outputs": "i32",
    "num_squares": "i32", "eps": "fp32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def compiles():
    from s2quant.runtime.kernels.launch import INTERPRETED

    if INTERPRETED:
        pytest.skip("Triton interprets here")
    pytest.importorskip("triton.backends.nvidia")


def ptx_of(kind, out_features, in_features, epilogue, **off):
    """Compile a linear of one row at the real size."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from s2quant.runtime.kernels.launch import How
    from s2quant.runtime.kernels.linear import linear_arguments, linear_kernel
    from s2quant.runtime.kernels.shapes import rule
    from s2quant.runtime.kernels.weights import Then, Weight

    empty = torch.empty(1, 1)
    weight = Weight(
        kind=kind, first=empty, second=empty.half(), out_features=out_features, in_features=in_features,
        gated=epilogue == "gate",
    )  # fmt: skip
    then = Then(
        epilogue=epilogue, out=empty, place=None if epilogue == "store" else empty,
        squares_in=None if epilogue == "residual" else torch.empty(1, 160),
    )  # fmt: skip
    shape = rule(weight, 1)
    constants = linear_arguments(weight, 1, then, shape, How(early=True, **off))
    names = [name for name in linear_kernel.arg_names if name not in constants]
    source = ASTSource(
        fn=linear_kernel,
        signature={name: "constexpr" if name in constants else NAMES[name] for name in linear_kernel.arg_names},
        constexprs={(linear_kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={
            (linear_kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name in names if NAMES[name].startswith("*")
        },
    )  # fmt: skip
    options = {"num_warps": shape.warps, "launch_pdl": True, "maxnreg": 128}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.mark.parametrize(
    ("kind", "out_features", "in_features", "epilogue"),
    [("w4", 2560, 9728, "residual"), ("w8", 6144, 2560, "store"), ("bf16", 19456, 2560, "gate")],
)
def test_warps_meet_once_and_weights_are_asked_for_first(kind, out_features, in_features, epilogue):
    text = ptx_of(kind, out_features, in_features, epilogue)
    assert len(re.findall(r"\bbar(rier)?\.sync", text)) == 1
    waits = text.index("griddepcontrol.wait")
    assert text.index("ld.global.L1::no_allocate.L2::128B.v4.b32") < waits
    first_x = re.search(r"@mine ld\.global\.v4\.b32|@go ld\.global\.v4\.b32 \{x0_0_0", text)
    assert first_x is not None and first_x.start() > waits
    assert "mma.sync" in text and "red.shared" not in text


def test_without_it_they_meet_often():
    assert len(re.findall(r"\bbar(rier)?\.sync", ptx_of("w4", 2560, 4096, "residual", flat=False))) > 3
