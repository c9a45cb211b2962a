"""Write prompts.json: the prompts that the reference's own code builds, with the tiny tokenizer of s2quant.

Its `generate_long` runs whole, with `generate` replaced: that records the prompt and answers with fixed codes, so
the reference's own turns, batches and templates are what is recorded. Run from the repository root, with the
reference's requirements installed (loguru, einops, click, loralib, transformers):

    python tests/golden/prompt/make_goldens.py --upstream DIR --commit SHA

Codes are random by seed (see `codes` in tests/prompt/prompt_cases.py), so only token ids and seeds are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers
import torch
import transformers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "prompt")]

from prompt_cases import (  # noqa: E402
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

from s2quant.prompt import tiny_tokenizer  # noqa: E402


class Model:
    """What generate_long asks of a model: a tokenizer, the sizes, and parameters to count."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.config = SimpleNamespace(max_seq_len=32768, num_codebooks=NUM_CODEBOOKS)

    def parameters(self) -> list[torch.Tensor]:
        return []


def run_case(inference: Any, model: Model, case: Case) -> dict[str, Any]:
    """Let the reference say one text, and record each prompt and batch."""
    prompts: list[torch.Tensor] = []

    def generate(*, prompt: torch.Tensor, **_: Any) -> torch.Tensor:
        reply = reply_codes(len(prompts))
        prompts.append(prompt.clone())
        tokens = torch.cat([reply[:1] + model.tokenizer.semantic_begin_id, reply])
        end = torch.zeros(1 + NUM_CODEBOOKS, 1, dtype=torch.int64)
        end[0] = model.tokenizer.get_token_id("<|im_end|>")
        return torch.cat([prompt, tokens, end], dim=1)

    inference.generate = generate
    responses = inference.generate_long(
        model=model,
        device="cpu",
        decode_one_token=None,
        text=case.text,
        chunk_length=case.max_bytes,
        prompt_text=[text for text, _, _ in case.voices] or None,
        prompt_tokens=[codes(seed, frames) for _, seed, frames in case.voices] or None,
    )
    batches = [response.text for response in responses if response.action == "sample"]
    return {
        "batches": batches,
        "prompts": [prompt[0].tolist() for prompt in prompts],
        "checksums": [row_checksums(prompt) for prompt in prompts],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, required=True, help="the reference's source tree")
    parser.add_argument("--commit", required=True, help="its commit")
    options = parser.parse_args()
    sys.path.insert(0, str(options.upstream))
    import fish_speech.conversation as reference_conversation
    import fish_speech.models.text2semantic.inference as inference
    from fish_speech.tokenizer import FishTokenizer
    from loguru import logger

    logger.remove()
    # It prints each prompt in colours, token by token, and changes nothing.
    reference_conversation.Conversation.visualize = lambda *args, **kwargs: None
    with tempfile.TemporaryDirectory() as folder:
        for name, content in tiny_tokenizer().items():
            Path(folder, name).write_bytes(content)
        model = Model(FishTokenizer(folder))
        cases = {case.name: run_case(inference, model, case) for case in CASES}
        randoms = [run_case(inference, model, random_case(seed)) for seed in range(NUM_RANDOM)]
    provenance = {
        "made_by": "tests/golden/prompt/make_goldens.py",
        "reference": f"https://github.com/fishaudio/fish-speech/tree/{options.commit}",
        "tokenizer_sha256": hashlib.sha256(tiny_tokenizer()["tokenizer.json"]).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    lines = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in cases.items()]
    digests = [prompts_digest(result["batches"], result["prompts"], result["checksums"]) for result in randoms]
    text = (
        '{"provenance": '
        + json.dumps(provenance)
        + ',\n"cases": {\n'
        + ",\n".join(lines)
        + '\n},\n"random": '
        + json.dumps(digests)
        + "}\n"
    )
    (HERE / "prompts.json").write_text(text, encoding="ascii")


if __name__ == "__main__":
    main()
