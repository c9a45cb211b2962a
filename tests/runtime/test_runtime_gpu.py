"""The plain engine on a GPU: the CPU's numbers, the reference's speech, int4 within its rounding."""

import pytest
import runtime_cases as cases
import torch
from test_runtime_golden import FOLDER, expected, request
from test_runtime_linears import by_hand, int4_bound

from s2quant.runtime.engine import load_engine
from s2quant.runtime.linears import make_linear
from s2quant.runtime.speech import Request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

REAL_SHAPES = {"wqkv": (6144, 2560), "wo": (2560, 4096), "w1": (9728, 2560), "w2": (2560, 9728)}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Take TF32 away, from the codec's convolutions too, where torch allows it unasked."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def golden():
    from safetensors.torch import load_file

    return load_file(FOLDER / "runtime.safetensors")


@pytest.fixture(scope="module")
def cuda_engine(tiny_folder):
    return load_engine(tiny_folder, device="cuda", dtype=torch.float32, num_slots=3)


@pytest.mark.parametrize("number", range(len(cases.SPEECHES)))
def test_a_whole_speech_on_the_gpu_is_the_reference_s(golden, prompt_engine, fed_draws, number):
    case, length = cases.SPEECHES[number][:2]
    codes, stop_reason = expected(golden, number)
    engine = prompt_engine(case, lengths=(length,))
    model = engine.model
    engine.model, engine.device = model.to("cuda"), torch.device("cuda")
    try:
        speech = engine.speak(request(number))
    finally:
        model.to("cpu")
    assert speech.codes.device.type == "cpu" and torch.equal(speech.codes, codes)
    assert speech.stop_reason == stop_reason


@torch.no_grad()
def test_scores_on_the_gpu_are_those_of_the_cpu(engine, cuda_engine):
    said = Request(text="Hello there.", seed=1, max_frames=12)
    speech = cuda_engine.speak(said)
    tokens = engine.spoken_sequence(said, [speech.codes])[None]
    ours, oracle = cuda_engine.model(tokens.cuda()), engine.model(tokens)
    torch.testing.assert_close(ours.hidden.cpu(), oracle.hidden, atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.logits.cpu(), oracle.logits, atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.fast_logits.cpu(), oracle.fast_logits, atol=1e-3, rtol=0)
    torch.testing.assert_close(cuda_engine.decode(speech.codes), engine.decode(speech.codes), atol=2e-3, rtol=0)


def test_speech_on_the_gpu_does_not_depend_on_its_neighbours(cuda_engine):
    requests = [Request(text="word " * (n % 4 + 1), seed=n, max_frames=6 + 5 * n) for n in range(5)]
    for speech in cuda_engine.generate(requests):
        assert torch.equal(speech.codes, cuda_engine.speak(requests[speech.index]).codes)


def test_a_stream_on_the_gpu_is_the_whole_sound(cuda_engine):
    chunks, speeches = zip(*cuda_engine.stream_request(Request(text="Hi.", seed=2, max_frames=30)), strict=True)
    assert all(chunk.device.type == "cpu" for chunk in chunks)
    torch.testing.assert_close(torch.cat(chunks), cuda_engine.decode(speeches[-1].codes), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", REAL_SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 8, 33])
def test_int4_on_the_gpu_is_within_its_rounding(name, rows):
    weight = cases.quantized_weight(*REAL_SHAPES[name], seed=len(name)).to("cuda")
    linear = make_linear(weight, torch.bfloat16, "int4")
    assert linear.backend == "int4" and linear.packed.is_cuda
    x = torch.randn(rows, weight.in_features, generator=torch.Generator().manual_seed(rows)).bfloat16().cuda()
    y = linear(x)
    exact = weight.dequantize(torch.float32).double()
    error = (y.double() - x.double() @ exact.T).abs()
    assert (error <= int4_bound(exact, x)).all()
    bf16 = (torch.nn.functional.linear(x, exact.bfloat16()).double() - x.double() @ exact.T).square().mean().sqrt()
    assert error.square().mean().sqrt() < 2 * bf16


def test_int4_on_the_gpu_and_on_the_cpu_agree():
    weight = cases.quantized_weight(64, 192, seed=5)
    x = torch.randn(4, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    cpu = make_linear(weight, torch.bfloat16, "int4")(x).double()
    gpu = make_linear(weight.to("cuda"), torch.bfloat16, "int4")(x.cuda()).cpu().double()
    assert ((cpu - gpu).abs() <= 2 * int4_bound(by_hand(weight), x)).all()


def test_a_quantized_model_speaks_on_the_gpu(quantized_folder):
    engine = load_engine(quantized_folder, device="cuda")
    speech = engine.speak(Request(text="Hello.", seed=1, max_frames=10))
    assert speech.codes.shape[0] == 10
    assert {m.backend for m in engine.model.modules() if hasattr(m, "backend")} == {"int4"}


@pytest.mark.parametrize("num_slots", [1, 3])
def test_replayed_graphs_speak_as_the_plain_decoder(tiny_folder, num_slots):
    plain, fast = (
        load_engine(tiny_folder, device="cuda", dtype=torch.float32, num_slots=num_slots, decoder=kind)
        for kind in ("plain", "fast")
    )
    requests = [Request(text=f"Hello {n}.", seed=n, max_frames=40 + 3 * n) for n in range(5)]
    theirs = {speech.index: speech for speech in plain.generate(requests)}
    for _ in range(2):  # captured, then replayed
        for speech in fast.generate(requests):
            assert torch.equal(speech.codes, theirs[speech.index].codes)
            assert speech.stop_reason == theirs[speech.index].stop_reason
    assert fast._idle is not None and fast._idle._graphs
