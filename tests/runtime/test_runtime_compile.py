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
    first_x = re.search(r"@mine ld\.global\.v4\.b32|ld\.global\.v4\.b32 \{q0_0|@go ld\.global\.v4\.b32 \{x0_0_0", text)
    assert first_x is not None and first_x.start() > waits
    assert "mma.sync" in text and "red.shared" not in text


def test_without_it_they_meet_often():
    assert len(re.findall(r"\bbar(rier)?\.sync", ptx_of("w4", 2560, 4096, "residual", flat=False))) > 3


@pytest.mark.parametrize("kind", ["w4", "w8"])
def test_codes_of_many_rows_are_unpacked_where_they_are_multiplied(kind, monkeypatch):
    """No element of a packed weight goes back to shared memory, and the tensor cores read x from there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from s2quant.runtime.kernels.many import many, many_kernel
    from s2quant.runtime.kernels.weights import Block, Then, Weight

    scales, empty = torch.empty(16, dtype=torch.half), torch.empty(64, 1)
    weight = Weight(
        kind=kind, first=empty.int(), second=scales, out_features=2560, in_features=4096, group_size=32,
    )  # fmt: skip
    then = Then(
        epilogue="residual", out=torch.empty(64, 2560), place=empty, hidden=empty, norm=empty, squares_out=empty
    )
    block = Block(tiles=8, splits=4, stages=3, warps=4)
    asked = {}
    monkeypatch.setattr(
        type(many_kernel), "warmup", lambda kernel, *values, grid, **options: asked.setdefault(kernel.__name__, options)
    )
    many(weight, torch.empty(64, 4096, dtype=torch.bfloat16), 64, then, block, launch=False)
    constants = {name: value for name, value in asked["many_kernel"].items() if name in many_kernel.arg_names}
    types = NAMES | {"second": "*i32", "parts": "*fp32"}
    source = ASTSource(
        fn=many_kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in many_kernel.arg_names},
        constexprs={(many_kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={
            (number,): [["tt.divisibility", 16]]
            for number, name in enumerate(many_kernel.arg_names)
            if types.get(name, "").startswith("*")
        },
    )  # fmt: skip
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    products = [found.start() for found in re.finditer("wgmma.mma_async", text)]
    loop = text[products[0] : products[-1]]
    assert len(products) == 16 and "cp.async" in text
    assert "st.shared" not in loop and "stmatrix" not in loop and "bar.sync" not in loop
    assert text.index("griddepcontrol.launch_dependents") < text.index("griddepcontrol.wait") < text.index("cp.async")


DRAWN = NAMES | {
    "logits": "*fp32", "uniform": "*fp32", "temperature": "*fp32", "top_p": "*fp32", "top_k": "*i64", "first": "*i1",
    "ignore_end": "*i1", "windows": "*i64", "draws": "*i64", "positions": "*i64", "columns": "*i64",
    "slow_hidden": "*fp32", "slow_squares": "*fp32", "slow_norm": "*bf16", "slow_eps": "fp32", "embeddings": "*bf16",
    "norm": "*bf16", "squares": "*fp32", "batch": "i32", "first_semantic": "i32", "end_token": "i32", "number": "i32",
}  # fmt: skip


def draw_made(name, candidates, warps, **constants):
    """Compile a draw at the real size, or with fewer candidates."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from s2quant.runtime.kernels import steps
    from s2quant.runtime.kernels.launch import How

    kernel = getattr(steps, name)
    constants |= {
        "KEPT": 8,
        "NOISE": 17410,
        "D_BLOCK": 4096,
        **steps.vector_arguments(2560, torch.empty(1)),
        "DEVICE": True,
    }
    constants |= steps.draw_arguments(candidates, How(), warps)
    source = ASTSource(
        fn=kernel,
        signature={word: "constexpr" if word in constants else DRAWN[word] for word in kernel.arg_names},
        constexprs={(kernel.arg_names.index(word),): value for word, value in constants.items()},
        attrs={
            (number,): [["tt.divisibility", 16]]
            for number, word in enumerate(kernel.arg_names)
            if DRAWN.get(word, "").startswith("*")
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "launch_pdl": True})


def draw_ptx(*named, **constants):
    """Compile a draw: its text, and its bytes of shared memory."""
    made = draw_made(*named, **constants)
    return made.asm["ptx"], made.metadata.shared


@pytest.mark.parametrize(("warps", "candidates"), [(1, 64), (4, 200), (8, 300)])
def test_lanes_that_hold_copies_of_the_best_are_the_last(warps, candidates):
    """Triton 3.6 adds up wrongly where lanes or warps in the middle do: on a GPU a draw of 64 by one warp was wrong."""
    text = draw_made("residual_kernel", candidates, warps, R=candidates, BEFORE=8, CODEBOOKS=3, LAST=False).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.linear<(.*)>$", text, re.MULTILINE))
    used = {name for name in re.findall(r"\}\) : \(tensor<32x[fi]32, (#\w+)>\)", text) if name in layouts}
    assert used
    for name in used:
        for part, count in (("lane", 5), ("warp", warps.bit_length() - 1)):
            found = re.search(rf"{part} = \[((?:\[\d+\](?:, )?)*)\]", layouts[name])
            assert found is not None, layouts[name]
            bases = [int(base) for base in re.findall(r"\d+", found.group(1))]
            assert len(bases) == count, (part, layouts[name])
            holds = [base != 0 for base in bases]
            assert holds == sorted(holds, reverse=True), (part, layouts[name])


def test_a_draw_waits_for_nothing_but_logits_and_sorts_in_registers():
    from s2quant.runtime.kernels import steps

    residual = draw_ptx("residual_kernel", 1024, 4, R=1024, BEFORE=8194, CODEBOOKS=10, LAST=False)
    semantic = draw_ptx(
        "semantic_kernel", 4096, 8, C=4097, COLUMN=11, MAX_SQUARES=256, batch=1, **steps.swap_arguments()
    )
    for (text, shared), candidates, barriers in ((residual, 8, 26), (semantic, 16, 40)):
        before, _, after = text.rpartition("griddepcontrol.wait")
        assert before.count("ld.global.b32") >= candidates  # noise
        # a thread's candidates, the end, and two bytes of each of its up to 32 numbers of the row of the code drawn
        assert len(re.findall(r"ld\.global\.(b32|b64|v)", after)) <= candidates + 1
        assert len(re.findall(r"\bbar(rier)?\.sync", text)) <= barriers  # with those of loops that are hardly entered
        assert shared <= 4096  # sums of warps; candidates never go there
