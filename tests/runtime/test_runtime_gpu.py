"""The plain engine on a GPU: the CPU's numbers, the reference's speech, int4 within its rounding."""

import pytest
import runtime_cases as cases
import torch
from test_runtime_golden import FOLDER, expected, request
from test_runtime_linears import by_hand, int4_bound

from s2quant.codec import CodecStream
from s2quant.runtime import streaming
from s2quant.runtime.linears import make_linear
from s2quant.runtime.loading import load_engine
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
    engine = load_engine(quantized_folder, device="cuda", linears="int4")
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
    assert fast._resting.newest is not None and fast._resting.newest._graphs


@pytest.mark.parametrize("num_slots", [1, 3])
def test_prompts_read_by_graphs_are_spoken_as_by_the_plain_decoder(tiny_folder, num_slots):
    from s2quant.prompt import Voice

    plain, fast = (
        load_engine(tiny_folder, device="cuda", dtype=torch.float32, num_slots=num_slots, decoder=kind, prompt_graphs=p)
        for kind, p in (("plain", None), ("fast", True))
    )
    voice = Voice(text="Said.", codes=torch.arange(10 * 90).view(10, 90) % 64)
    turns = "\n".join(f"<|speaker:{n % 2}|>Turn number {n}." for n in range(3))
    requests = [Request(text=f"Hello {n}.", voices=(voice,) * (n % 2), seed=n, max_frames=20 + 3 * n) for n in range(5)]
    requests.append(Request(text=turns, seed=5, max_frames=20, chunk_bytes=20))
    longer = [*requests, Request(text="Hello.", voices=(voice, voice), seed=6, max_frames=900)]
    for asked in (requests, requests, longer, longer):  # captured, replayed; given up where the cache grows, replayed
        theirs = {speech.index: speech for speech in plain.generate(asked)}
        for speech in fast.generate(asked):
            assert torch.equal(speech.codes, theirs[speech.index].codes)
        assert (
            fast._resting.newest is not None
            and fast._resting.newest.reader is not None
            and fast._resting.newest.reader._graphs
        )
    assert fast._resting.newest.cache.capacity > 512


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_many_streams_on_the_gpu_are_each_the_whole_sound(tiny_folder, kind):
    engine = load_engine(tiny_folder, device="cuda", dtype=torch.float32, num_slots=3, decoder=kind)
    requests = [Request(text=f"Number {n}.", seed=n, max_frames=30 + 11 * n) for n in range(7)]
    for _ in range(2):  # captured, then replayed
        chunks = list(engine.stream_requests(requests))
        for index, said in enumerate(requests):
            mine = [chunk for chunk in chunks if chunk.index == index]
            assert all(chunk.audio.device.type == "cpu" for chunk in mine)
            assert torch.equal(mine[-1].speech.codes, engine.speak(said).codes)
            sound = torch.cat([chunk.audio for chunk in mine])
            torch.testing.assert_close(sound, engine.decode(mine[-1].speech.codes), atol=1e-4, rtol=0)


@pytest.mark.parametrize("later", [(), (8, 16)])
def test_chunks_by_graphs_on_the_gpu_are_the_usual_ones(cuda_engine, later):
    from s2quant.runtime.chunk_graphs import ChunkGraphs, side_stream

    codec = cuda_engine.codec
    graphs = ChunkGraphs(codec, later)
    codes = torch.randint(0, 64, (3, codec.num_codebooks, 33), generator=torch.Generator().manual_seed(1))
    lanes, usual = [[CodecStream(codec) for _ in range(3)] for _ in range(2)]
    with torch.cuda.stream(side_stream(codec.device)):
        for part in codes.split([4, 8, 16, 5], dim=2):
            for row in range(3):
                one = part[row : row + 1].cuda()
                wanted = usual[row].step(one)
                taken = graphs.takes(lanes[row], one.shape[2])
                assert taken == (one.shape[2] in (4, *later))
                found = graphs.push(lanes[row], one) if taken else lanes[row].step(one)
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "fast"])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_streams_with_graphs_on_the_gpu_are_each_the_whole_sound(tiny_folder, kind, count):
    engine = load_engine(tiny_folder, device="cuda", dtype=torch.float32, num_slots=7, decoder=kind, codec_graphs=True)
    requests = [Request(text=f"Number {n}.", seed=n, max_frames=30 + 11 * n) for n in range(count)]
    for _ in range(2):
        chunks = list(engine.stream_requests(requests))
        for index in range(count):
            mine = [chunk for chunk in chunks if chunk.index == index]
            sound = torch.cat([chunk.audio for chunk in mine])
            torch.testing.assert_close(sound, engine.decode(mine[-1].speech.codes), atol=1e-4, rtol=0)
    assert engine._chunk_graphs is not None and engine._chunk_graphs.captured


def test_the_codec_does_not_hold_up_the_frames(tiny_folder, monkeypatch):
    """While the codec's stream is kept busy, frames go on being made and no chunk is given out."""
    engine = load_engine(tiny_folder, device="cuda", dtype=torch.float32, num_slots=2, decoder="fast")
    requests = [Request(text=f"Number {n}.", seed=n, max_frames=40, ignore_end=True) for n in range(2)]
    expected = {chunk.index: chunk.speech for chunk in engine.stream_requests(requests) if chunk.speech}
    step, order = CodecStream.step, []

    def slow(self, codes):
        torch.cuda._sleep(int(2e9))  # cycles: about a second
        return step(self, codes)

    def noted(events):
        for event in events:
            order.append("event")
            yield event

    monkeypatch.setattr(CodecStream, "step", slow)
    chunks = streaming.decoded(engine.codec, noted(engine.events(requests)), alone=False)
    first = next(chunks)
    assert len(order) > 20  # four frames of each were enough to ask for it; the frames went on meanwhile
    found = {chunk.index: chunk.speech for chunk in (first, *chunks) if chunk.speech}
    assert all(torch.equal(found[n].codes, expected[n].codes) for n in range(2))


def test_a_kept_prefix_on_the_gpu_is_the_same_speech(tiny_folder):
    from s2quant.prompt import Voice

    voice = Voice(text="Said.", codes=torch.arange(10 * 60).view(10, 60) % 64)
    requests = [Request(text=f"Number {n}.", voices=(voice,), seed=n, max_frames=30) for n in range(5)]
    for kind in ("plain", "fast"):
        for dtype in (torch.float32, torch.bfloat16):
            without, kept = (
                load_engine(tiny_folder, device="cuda", dtype=dtype, num_slots=2, decoder=kind, prefix_bytes=size)
                for size in (0, 2**26)
            )
            theirs = {speech.index: speech for speech in without.generate(requests)}
            for _ in range(2):
                for speech in kept.generate(requests):
                    assert torch.equal(speech.codes, theirs[speech.index].codes)
            assert kept.prefixes.hits == 9 and without.prefixes.hits == 0


def test_graphs_outlive_runs_of_other_numbers_of_utterances(tiny_folder):
    engine = load_engine(tiny_folder, device="cuda", dtype=torch.float32, num_slots=3, decoder="fast")
    requests = [Request(text=f"Number {n}.", seed=n, max_frames=12) for n in range(3)]
    seen = []
    for _ in range(2):
        for some in (requests, requests[:1]):
            codes = {speech.index: speech.codes for speech in engine.generate(some)}
            decoder = engine._resting.newest
            seen.append((decoder, dict(decoder._graphs), dict(decoder.reader._graphs), codes))
    for first, again in ((seen[0], seen[2]), (seen[1], seen[3])):
        assert first[:3] == again[:3] and first[1] and first[2]
        assert all(torch.equal(first[3][n], again[3][n]) for n in first[3])


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_a_lack_of_memory_under_a_limit_leaves_the_engine_usable(tiny_folder, kind):
    from s2quant.errors import OutOfMemory
    from s2quant.runtime.memory import CONTEXT_BYTES, limit_memory, release_memory

    device = torch.device("cuda:0")
    engine = load_engine(tiny_folder, device=device, dtype=torch.float32, num_slots=256, decoder=kind)
    short = [Request(text=f"Number {n}.", seed=n, max_frames=20) for n in range(3)]
    torch.cuda.reset_peak_memory_stats(device)
    fresh = {speech.index: speech.codes for speech in engine.generate(short)}
    needed = torch.cuda.max_memory_reserved(device)
    engine.release()
    try:
        limit_memory(device, CONTEXT_BYTES + needed + 100e6)
        many = [Request(text="Hi.", seed=n, max_frames=4000, ignore_end=True) for n in range(256)]
        with pytest.raises(OutOfMemory, match="while speaking, up to 256"):
            next(engine.generate(many))
        again = {speech.index: speech.codes for speech in engine.generate(short)}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        release_memory()
    assert all(torch.equal(again[n], fresh[n]) for n in fresh)


def test_loading_to_the_gpu_holds_nothing_twice(tmp_path):
    from s2quant.export.random import tiny_config, write_random
    from s2quant.runtime.load import load_model

    config = tiny_config()
    sizes = {"dim": 1024, "head_dim": 64, "n_head": 16, "n_local_heads": 8, "intermediate_size": 3072}
    config["text_config"] |= sizes | {"n_layer": 6}
    config["audio_decoder_config"] |= sizes | {"text_dim": 1024, "n_layer": 1}
    write_random(config, tmp_path / "larger", seed=0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model(tmp_path / "larger", "cuda")
    held = sum(tensor.nbytes for tensor in model.parameters())
    assert held > 2e8 and torch.cuda.max_memory_allocated() - before < 1.3 * held


def test_an_encoder_on_the_host_gives_the_same_codes(tiny_folder, tmp_path):
    import numpy as np
    import soundfile

    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(88200), 44100)
    whole, lean = (load_engine(tiny_folder, device="cuda", encoder_on_host=host) for host in (False, True))
    on_host = {name.split(".")[0] for name, weight in lean.codec.named_parameters() if not weight.is_cuda}
    assert on_host == {"encoder", "quantizer"} and lean.codec.device.type == "cuda"
    codes = whole.voice(tmp_path / "a.wav", "Said.").codes
    for _ in range(2):
        assert torch.equal(lean.voice(tmp_path / "a.wav", "Said.").codes, codes)
        assert torch.equal(lean.decode(codes), whole.decode(codes))
    assert {name.split(".")[0] for name, weight in lean.codec.named_parameters() if not weight.is_cuda} == on_host
