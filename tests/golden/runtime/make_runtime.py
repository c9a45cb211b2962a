"""Write runtime.safetensors: what the reference's own sampler and generation loop do in the cases of the tests.

    python tests/golden/runtime/make_runtime.py --upstream DIR

DIR is a work tree of https://github.com/fishaudio/fish-speech (see `commit` in provenance.json). Needs torch, numpy,
safetensors and what the reference's inference file imports. Run on a CPU.

The reference runs in float32. Its one source of randomness, the uniform numbers behind a draw, is replaced by the
numbers of `runtime_cases.draws`; nothing else is changed.

- filter.N.index, filter.N.probs: the candidates that survive `logits_to_probs` and their probabilities;
- swaps: the token of `decode_one_token_ar` for each case (a code, or their number for im_end);
- speech.N: tokens and codes int16 [1+N, F] of a whole `generate`, im_end's column included when there is one.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "runtime"))
import runtime_cases as cases  # noqa: E402

MARGIN = 2e-6  # of a cumulative probability from top_p: below it, rounding decides


class Feed:
    """Stands in for the reference's draw: the same formula, on given uniform numbers."""

    def __init__(self):
        self.queue = []

    def __call__(self, probs):
        uniform = self.queue.pop(0)
        assert uniform.shape == probs.shape, (uniform.shape, probs.shape)
        exponential = -torch.log(uniform.clamp(min=2.0**-25))
        return torch.argmax(probs / exponential, dim=-1, keepdim=True).to(dtype=torch.int)


def spread(uniform, size, begin, im_end):
    """Put uniform numbers of the allowed candidates at their token ids; the others cannot be drawn."""
    full = torch.full((size,), 0.5)
    full[begin : begin + len(uniform) - 1] = uniform[:-1]
    full[im_end] = uniform[-1]
    return full


def filtered(inference):
    """Run the reference's filter."""
    tensors, near = {}, 0
    for name, logits, temperature, top_p, top_k in cases.filter_cases():
        cumulative = logits.sort(descending=True).values.softmax(-1).cumsum(-1)[:top_k]
        near += top_p < 1 and bool(((cumulative - top_p).abs() < MARGIN).any())
        probs = inference.logits_to_probs(logits, torch.tensor(temperature), torch.tensor(top_p), top_k)
        index = probs.nonzero().flatten()
        tensors[f"{name}.index"], tensors[f"{name}.probs"] = index.to(torch.int16), probs[index].clone()
    assert near == 0, "a case stands on the edge: change it"
    return tensors


def swaps(inference, feed):
    """Run the reference's draw of the semantic token, with a model that gives the case's logits."""
    count, im_end = cases.SWAP_SEMANTIC, 3
    begin, vocabulary, found = 5, 40, []
    for number in range(cases.NUM_SWAPS):
        logits, window, temperature, top_p, top_k, noise = cases.swap_case(number)
        full = spread(logits, vocabulary, begin, im_end)[None, None]
        model = SimpleNamespace(
            forward_generate=lambda *_, full=full, **__: SimpleNamespace(
                logits=full, hidden_states=torch.zeros(1, 1, 1)
            ),
            forward_generate_fast=lambda *_: None,
            fast_embeddings=lambda code: code,
            config=SimpleNamespace(
                semantic_begin_id=begin, semantic_end_id=begin + count - 1, codebook_size=count, num_codebooks=1
            ),
        )
        bias = spread(torch.zeros(count + 1), vocabulary, begin, im_end)[None, None]
        bias = torch.where(bias == 0.5, float("-inf"), bias)
        ids = torch.where(window == count, im_end, window + begin).masked_fill(window < 0, 0)
        feed.queue = [spread(row, vocabulary, begin, im_end) for row in noise]
        column = inference.decode_one_token_ar(
            model,
            torch.zeros(1, 2, 1),
            torch.tensor([0]),
            torch.tensor(temperature),
            torch.tensor(top_p),
            top_k,
            bias,
            None,
            None,
            previous_tokens=ids[None].to(torch.int),
        )
        token = int(column.flatten()[0])
        found.append(count if token == im_end else token - begin)
    return torch.tensor(found, dtype=torch.int16)


def build(llama, case):
    """Build the reference model in float32 and load it the way its loader does."""
    model = llama.DualARTransformer(llama.BaseModelArgs._from_fish_qwen3_omni(cases.raw_config(case)))
    disk = {}
    for name, value in model.state_dict().items():
        if name.startswith("fast_"):
            name = "audio_decoder." + name.removeprefix("fast_")
        else:
            name = ("audio_decoder." if name.startswith("codebook_embeddings") else "text_model.model.") + name
        disk[name] = cases.weight(case, name, tuple(value.shape))
    model.load_state_dict(llama._remap_fish_qwen3_omni_keys(disk), strict=True, assign=True)
    model.tokenizer = SimpleNamespace(get_token_id=lambda _: cases.IM_END)
    return model.float().eval()


def speech(inference, feed, model, case, length, seed, temperature, top_p, top_k, max_frames):
    """Run the reference's generation; gives its new columns and how many draws were swapped."""
    vocabulary, num_residual = model.config.vocab_size, model.config.num_codebooks - 1
    slow, feed.queue = 2 * (cases.NUM_SEMANTIC + 1), []
    for frame in range(max_frames):
        noise = cases.draws(seed, frame, slow + num_residual * cases.RESIDUAL_SIZE)
        feed.queue += [spread(row, vocabulary, cases.BEGIN, cases.IM_END) for row in noise[:slow].view(2, -1)]
        feed.queue += noise[slow:].view(num_residual, -1)
    out = inference.generate(
        model=model,
        prompt=cases.prompt(case, length),
        max_new_tokens=max_frames,
        audio_masks=None,
        audio_parts=None,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )
    return out[:, length:]


def main():
    """Write the golden file beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, required=True, help="a work tree of fishaudio/fish-speech")
    parser.add_argument("--commit", help="its commit, where the work tree has no .git")
    args = parser.parse_args()
    sys.path.insert(0, str(args.upstream))
    from fish_speech.models.text2semantic import inference, llama

    commit = (
        args.commit or subprocess.check_output(["git", "-C", args.upstream, "rev-parse", "HEAD"], text=True).strip()
    )
    torch.set_num_threads(1)
    tensors = filtered(inference)
    feed = inference.multinomial_sample_one_no_sync = Feed()
    tensors["swaps"] = swaps(inference, feed)
    facts = []
    for number, (case, length, seed, *sampling, max_frames) in enumerate(cases.SPEECHES):
        columns = speech(inference, feed, build(llama, case), case, length, seed, *sampling, max_frames)
        tensors[f"speech.{number}"] = columns.to(torch.int16).contiguous()
        facts.append({"case": case, "columns": columns.shape[1], "ended": int(columns[0, -1]) == cases.IM_END})
        print(facts[-1])
    save_file(tensors, HERE / "runtime.safetensors")
    (HERE / "runtime.safetensors").chmod(0o644)
    provenance = {
        "source": "https://github.com/fishaudio/fish-speech",
        "commit": commit,
        "torch": torch.__version__,
        "threads": 1,
        "speeches": facts,
    }
    (HERE / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main()
