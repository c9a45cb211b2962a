"""Write <case>.safetensors: what the reference implementation of S2 Pro computes on the two small models.

    python tests/golden/model/make_goldens.py --upstream DIR

DIR is a work tree of https://github.com/fishaudio/fish-speech (see `commit` in provenance.json). Needs torch, numpy,
safetensors and what the reference's model file imports (einops, loguru, loralib). Run on a CPU.

Four ways of running the reference's Slow AR are compared with each other in bfloat16: `steps` (how it speaks: a
cached prefill, then one position at a time under the plain-maths attention), `prefill` (all at once, explicit mask),
`maths` (the same under the plain-maths attention), `flash` (no mask, is_causal, how it was trained). For the Fast AR,
`steps` (one position at a time, cached), `whole` (all positions of all frames at once) and `fused` (the same through
the reference's own switch from plain softmax to torch's scaled dot product). The largest distance between any two is
stored as the noise that an exact re-implementation may show.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "model"))
import model_cases  # noqa: E402


def build(llama, case, dtype):
    """Build the reference model and load it the way its loader does."""
    model = llama.DualARTransformer(llama.BaseModelArgs._from_fish_qwen3_omni(model_cases.raw_config(case)))
    disk = {}
    for name, value in model.state_dict().items():
        if name.startswith("fast_"):
            name = "audio_decoder." + name.removeprefix("fast_")
        else:
            name = ("audio_decoder." if name.startswith("codebook_embeddings") else "text_model.model.") + name
        disk[name] = model_cases.weight(case, name, tuple(value.shape))
    report = model.load_state_dict(llama._remap_fish_qwen3_omni_keys(disk), strict=True, assign=True)
    assert not report.missing_keys and not report.unexpected_keys
    return model.to(dtype=dtype).eval(), disk


def slow_steps(model, tokens, num_prefill):
    """Run the Slow AR as generation does; its hidden vectors are caught before the projection of the Fast AR."""
    seen, logits = [], []
    hook = model.fast_project_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for block in model.layers:
        block.attention.kv_cache = None
    model.max_seq_len = model.max_batch_size = -1
    model.setup_caches(1, model.config.max_seq_len, dtype=model.embeddings.weight.dtype)
    # The prefill of generation keeps its last position only; the base class gives them all on request.
    prefill = (
        type(model)
        .__mro__[1]
        .forward_generate(model, tokens[..., :num_prefill], torch.arange(num_prefill), return_all=True)
    )
    seen.append(prefill.hidden_states), logits.append(prefill.logits)
    for position in range(num_prefill, tokens.shape[2]):
        with sdpa_kernel(SDPBackend.MATH):
            out = model.forward_generate(tokens[..., position : position + 1], torch.tensor([position]))
        logits.append(out.logits)
    hook.remove()
    return torch.cat(seen, dim=1)[0], torch.cat(logits, dim=1)[0]


def slow_variants(model, tokens, num_prefill):
    """Run the Slow AR in the four ways; returns {way: (hidden [T, D], logits [T, V])}."""
    base = type(model).__mro__[1]
    found = {"steps": slow_steps(model, tokens, num_prefill)}
    for block in model.layers:
        block.attention.kv_cache = None
    default = base.forward_generate(model, tokens, return_all=True)
    with sdpa_kernel(SDPBackend.MATH):
        maths = base.forward_generate(model, tokens, return_all=True)
    found["prefill"] = (default.hidden_states[0], default.logits[0])
    found["maths"] = (maths.hidden_states[0], maths.logits[0])
    entry = []
    hook = model.layers[0].register_forward_pre_hook(lambda _, args: entry.append(args[0]))
    base.forward_generate(model, tokens, return_all=True)
    hook.remove()
    x = entry[0]
    for block in model.layers:
        x = block(x, model.freqs_cis[: x.shape[1]], None)
    hidden = model.norm(x)
    found["flash"] = (hidden[0], torch.nn.functional.linear(hidden, model.embeddings.weight)[0])
    return found


def fast_variants(model, hidden, codes):
    """Run the Fast AR on frames in the three ways; returns {way: [F, N, codes]}."""
    model.setup_caches(1, model.config.max_seq_len, dtype=model.embeddings.weight.dtype)
    num_codebooks, rows = model.config.num_codebooks, []
    for one_hidden, one_codes in zip(hidden, codes, strict=True):
        x, logits = model.fast_project_in(one_hidden[None, None]), []
        with sdpa_kernel(SDPBackend.MATH):
            for i in range(num_codebooks):
                logits.append(model.forward_generate_fast(x, torch.tensor([i])))
                x = model.fast_embeddings(one_codes[i : i + 1])
        rows.append(torch.cat(logits, dim=1)[0])
    for block in model.fast_layers:
        block.attention.kv_cache = None
    found = {"steps": torch.stack(rows)}
    mask = model.causal_mask[None, None, :num_codebooks, :num_codebooks]
    for way in ("whole", "fused"):
        x = torch.cat([model.fast_project_in(hidden)[:, None], model.fast_embeddings(codes[:, :-1])], dim=1)
        for block in model.fast_layers:
            block.attention.use_sdpa = way == "fused"
            x = block(x, model.fast_freqs_cis[:num_codebooks], mask)
        found[way] = model.fast_output(model.fast_norm(x))
    return found


def distance(a, b):
    """Give (root mean square, largest) difference."""
    diff = a.double() - b.double()
    return math.sqrt(diff.square().mean().item()), diff.abs().max().item()


def noise(variants):
    """Give the largest (rms, max) distance between any two, and each by name."""
    pairs = {f"{a}-{b}": distance(variants[a], variants[b]) for a, b in itertools.combinations(variants, 2)}
    return {"rms": max(p[0] for p in pairs.values()), "max": max(p[1] for p in pairs.values()), "pairs": pairs}


@torch.inference_mode()
def one_case(llama, case):
    """Compute what is stored for one case."""
    tokens, positions = model_cases.tokens(case), model_cases.stored_positions(case)
    frames, step = model_cases.stored_frames(case), model_cases.LOGIT_STEP
    codes = tokens[0, 1:, frames].T
    tensors, facts = {}, {}
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model, disk = build(llama, case, dtype)
        slow = slow_variants(model, tokens, model_cases.PREFILL[case])
        hidden = slow["steps"][0][[t - 1 for t in frames]]
        fast = fast_variants(model, hidden, codes)
        for way in ("steps", "prefill"):
            tensors[f"{label}.{way}.hidden"] = slow[way][0][positions]
            tensors[f"{label}.{way}.logits"] = slow[way][1][positions][:, ::step]
        tensors[f"{label}.fast"] = fast["steps"][..., ::step]
        facts[label] = {
            "hidden": noise({way: out[0][positions] for way, out in slow.items()}),
            "logits": noise({way: out[1][positions][:, ::step] for way, out in slow.items()}),
            "fast": noise({way: out[..., ::step] for way, out in fast.items()}),
            "spread": {k: v.float().std().item() for k, v in tensors.items() if k.startswith(label)},
        }
        facts["weights_sha256"], facts["num_parameters"] = (
            model_cases.digest(disk),
            sum(map(torch.numel, disk.values())),
        )
    table = llama.precompute_freqs_cis(32768, 128, 1000000)
    tensors["table"] = table[[1, 255, 1000, 32767]]
    return {name: value.contiguous().clone() for name, value in tensors.items()}, facts


def main():
    """Write the golden files beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, required=True, help="a work tree of fishaudio/fish-speech")
    parser.add_argument("--commit", help="its commit, where the work tree has no .git")
    args = parser.parse_args()
    sys.path.insert(0, str(args.upstream))
    from fish_speech.models.text2semantic import llama

    commit = (
        args.commit or subprocess.check_output(["git", "-C", args.upstream, "rev-parse", "HEAD"], text=True).strip()
    )
    facts = {
        "source": "https://github.com/fishaudio/fish-speech",
        "commit": commit,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cases": {},
    }
    for case in model_cases.CASES:
        tensors, facts["cases"][case] = one_case(llama, case)
        save_file(tensors, HERE / f"{case}.safetensors")
        (HERE / f"{case}.safetensors").chmod(0o644)
    (HERE / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
