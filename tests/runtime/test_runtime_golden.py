"""The sampler and the generation loop against the reference's own, on the same uniform numbers."""

import json
from pathlib import Path

import pytest
import runtime_cases as cases
import torch
from safetensors.torch import load_file

from s2quant.runtime import decoder as decoder_module
from s2quant.runtime.sampler import SamplingRows, draw_semantic, filtered_probs
from s2quant.runtime.speech import Request
from s2quant.sampling import Sampling

FOLDER = Path(__file__).parents[1] / "golden" / "runtime"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "runtime.safetensors")


def rows(temperature, top_p, top_k):
    return SamplingRows.of([Sampling(temperature=temperature, top_p=top_p, top_k=top_k)], CPU)


def request(number):
    _, length, seed, temperature, top_p, top_k, max_frames = cases.SPEECHES[number]
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    return Request(text=str(length), seed=seed, sampling=sampling, max_frames=max_frames)


def expected(golden, number):
    """Codes [N, F] and the stop reason of a golden speech, im_end's column taken off."""
    columns = golden[f"speech.{number}"].long()
    ended = int(columns[0, -1]) == cases.IM_END
    assert not (columns[0, :-1] == cases.IM_END).any()
    return columns[1:, :-1] if ended else columns[1:], "end" if ended else "limit"


@pytest.mark.parametrize("case", cases.filter_cases(), ids=lambda case: case[0])
def test_the_filter_keeps_the_reference_s_candidates(golden, case):
    name, logits, temperature, top_p, top_k = case
    probs, index = filtered_probs(logits[None], rows(temperature, top_p, top_k))
    ours = torch.zeros(len(logits)).index_add_(0, index[0], probs[0])
    kept = golden[f"{name}.index"].long()
    assert ours.nonzero().flatten().tolist() == kept.tolist()
    torch.testing.assert_close(ours[kept], golden[f"{name}.probs"], atol=1e-6, rtol=1e-5)


def test_the_draw_with_one_swap_is_the_reference_s(golden):
    ours, unswapped = [], []
    for number in range(cases.NUM_SWAPS):
        logits, window, *sampling, noise = cases.swap_case(number)
        args = logits[None], rows(*sampling), noise[None]
        ours.append(int(draw_semantic(*args, window[None], cases.SWAP_SEMANTIC)))
        unswapped.append(int(draw_semantic(*args, None, cases.SWAP_SEMANTIC)))
    found = golden["swaps"].tolist()
    assert ours == found
    swapped = [b for a, b in zip(unswapped, found, strict=True) if a != b]
    assert len(swapped) > 30 and cases.SWAP_SEMANTIC in swapped  # the hot draw may be the end
    assert found.count(cases.SWAP_SEMANTIC) > 20


@pytest.mark.parametrize("number", range(len(cases.SPEECHES)))
def test_a_whole_speech_is_the_reference_s(golden, prompt_engine, fed_draws, number):
    case, length = cases.SPEECHES[number][:2]
    codes, stop_reason = expected(golden, number)
    speech = prompt_engine(case, lengths=(length,)).speak(request(number))
    assert torch.equal(speech.codes, codes)
    assert speech.stop_reason == stop_reason and speech.num_prompt_tokens == length


@pytest.mark.parametrize("case", ["project", "shared"])
def test_a_batch_with_refilled_slots_is_the_reference_s(golden, prompt_engine, fed_draws, case):
    numbers = [number for number, row in enumerate(cases.SPEECHES) if row[0] == case]
    engine = prompt_engine(case, num_slots=2, lengths=[row[1] for row in cases.SPEECHES])
    speeches = list(engine.generate([request(number) for number in numbers]))
    assert sorted(speech.index for speech in speeches) == list(range(len(numbers)))
    for speech in speeches:
        codes, stop_reason = expected(golden, numbers[speech.index])
        assert torch.equal(speech.codes, codes)
        assert speech.stop_reason == stop_reason


def test_the_golden_has_long_speeches_that_end_by_themselves_and_swaps(golden, prompt_engine, fed_draws, monkeypatch):
    facts = json.loads((FOLDER / "provenance.json").read_text())["speeches"]
    assert sum(fact["ended"] and fact["columns"] > 60 for fact in facts) >= 4
    assert any(not fact["ended"] for fact in facts)
    swaps = []

    def counting(logits, rows, uniform, window, num_semantic):
        taken = draw_semantic(logits, rows, uniform, window, num_semantic)
        swaps.append(bool((taken != draw_semantic(logits, rows, uniform, None, num_semantic)).any()))
        return taken

    monkeypatch.setattr(decoder_module, "draw_semantic", counting)
    prompt_engine("project", lengths=(9,)).speak(request(2))
    assert sum(swaps) >= 3
