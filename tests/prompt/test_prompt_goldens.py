"""Our prompts are the reference's, token for token (see tests/golden/prompt/make_goldens.py)."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from prompt_cases import (
    CASES,
    NUM_CODEBOOKS,
    NUM_RANDOM,
    Case,
    codes,
    prompts_digest,
    random_case,
    reply_codes,
    row_checksums,
)

from s2quant.prompt import Tokenizer, Voice, build_prompt, split_text, tiny_tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "prompt" / "prompts.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_json(tiny_tokenizer()["tokenizer.json"])


def prompts_of(tokenizer: Tokenizer, case: Case) -> tuple[list[str], list[torch.Tensor]]:
    """Say a text batch by batch, answering with the codes the golden was made with."""
    voices = [Voice(text=text, codes=codes(seed, frames)) for text, seed, frames in case.voices]
    batches = split_text(case.text, case.max_bytes)
    history: list[tuple[str, torch.Tensor]] = []
    prompts = []
    for number, batch in enumerate(batches):
        prompts.append(build_prompt(tokenizer, batch, voices, history, NUM_CODEBOOKS))
        history.append((batch, reply_codes(number)))
    return batches, prompts


def test_the_goldens_were_made_with_this_tokenizer():
    digest = hashlib.sha256(tiny_tokenizer()["tokenizer.json"]).hexdigest()
    assert digest == GOLDEN["provenance"]["tokenizer_sha256"], "run tests/golden/prompt/make_goldens.py again"
    assert list(GOLDEN["cases"]) == [case.name for case in CASES] and len(CASES) == 27


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prompts_are_the_references(tokenizer, case):
    golden = GOLDEN["cases"][case.name]
    batches, prompts = prompts_of(tokenizer, case)
    assert batches == golden["batches"]
    assert [prompt[0].tolist() for prompt in prompts] == golden["prompts"]
    assert [row_checksums(prompt) for prompt in prompts] == golden["checksums"]
    for prompt in prompts:
        assert prompt.dtype == torch.int64 and prompt.shape[0] == 1 + NUM_CODEBOOKS
        frames = (prompt[0] >= tokenizer.semantic_begin_id) & (prompt[0] <= tokenizer.semantic_end_id)
        assert torch.equal(prompt[0, frames] - tokenizer.semantic_begin_id, prompt[1, frames])
        assert not prompt[1:, ~frames].any()


def test_random_prompts_are_the_references(tokenizer):
    assert len(GOLDEN["random"]) == NUM_RANDOM
    for seed, golden in enumerate(GOLDEN["random"]):
        batches, prompts = prompts_of(tokenizer, random_case(seed))
        digest = prompts_digest(batches, [p[0].tolist() for p in prompts], [row_checksums(p) for p in prompts])
        assert digest == golden, f"random case {seed}"
