"""Write goldens.safetensors: what the reference implementation of the codec computes with weights drawn by s2quant.

    python tests/golden/codec/make_goldens.py --upstream DIR

DIR is a work tree of https://github.com/fishaudio/fish-speech (see `commit` in provenance.json). Needs torch,
safetensors, hydra-core, einops and descript-audio-codec 1.0.0 (whose audiotools is replaced by an empty stand-in:
only a base class is taken from it). Needs 5 GB of memory: the reference tabulates 32768 x 32768 masks. Run on a CPU
with one thread.

The reference is built by its own configuration file, with the sizes of CodecConfig.tiny(), and loads the very
tensors that `random_codec_state` draws, strictly. The recording is the first of several whose nearest and second
nearest codebook entries are nowhere closer than MARGIN, so that its codes do not hang on the last bits.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "codec"))
import codec_cases as cases  # noqa: E402

from s2quant.codec import random_codec_state  # noqa: E402

MARGIN = 1e-5


def import_reference(upstream):
    """Import the reference's two files, with packages that would pull in training code replaced by shells."""
    sys.path.insert(0, str(upstream))
    dac = Path(importlib.util.find_spec("dac").submodule_search_locations[0])
    for name, folder in {"dac": dac, "dac.nn": dac / "nn", "dac.model": dac / "model"}.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    for name in ("audiotools", "audiotools.ml"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["audiotools"].AudioSignal = object
    sys.modules["audiotools.ml"].BaseModel = torch.nn.Module
    from fish_speech.models.dac import modded_dac, rvq

    return modded_dac, rvq


def build_tiny(upstream):
    """Build the reference from its configuration file, at the tiny sizes, and load our weights strictly."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    tiny = cases.TINY
    config = OmegaConf.load(upstream / "fish_speech/configs/modded_dac_vq.yaml")
    config.encoder_dim, config.decoder_dim, config.latent_dim = tiny.encoder_dim, tiny.decoder_dim, tiny.latent_dim
    config.encoder_transformer_layers = [size.num_layers if size else 0 for size in tiny.encoder_transformers]
    config.quantizer.input_dim = tiny.latent_dim
    for name, size in (("pre_module", tiny.pre), ("post_module", tiny.post)):
        module = config.quantizer[name]
        module.input_dim = module.config.dim = tiny.latent_dim
        module.config.n_head = tiny.latent_dim // tiny.head_dim
        module.config.n_layer, module.config.intermediate_size = size.num_layers, size.intermediate_size
    model = instantiate(config)
    model.load_state_dict(random_codec_state(tiny, cases.WEIGHT_SEED), strict=True)
    return model.eval()


def smallest_margin(model, wav):
    """Encode with the reference; how close the second nearest entry comes, over all frames and codebooks."""
    padded = F.pad(wav, (0, -wav.shape[-1] % cases.TINY.frame_size))
    result = model.quantizer(model.encoder(padded))
    books = [*model.quantizer.semantic_quantizer.quantizers, *model.quantizer.quantizer.quantizers]
    gaps = []
    for book, latent in zip(books, result.latents.split(cases.TINY.codebook_dim, dim=1), strict=True):
        cosine = F.normalize(latent.transpose(1, 2), dim=-1) @ F.normalize(book.codebook.weight).T
        best = cosine.topk(2).values
        gaps.append((best[..., 0] - best[..., 1]).min().item())
    return min(gaps), result


def tiny_goldens(model):
    """Encode a recording and decode codes, some of them past the end of their codebook."""
    for seed in range(100):
        margin, result = smallest_margin(model, cases.recording(seed))
        if margin > MARGIN:
            break
    else:
        raise SystemExit("no recording with a clear margin")
    codes, lengths = model.encode(cases.recording(seed))
    assert torch.equal(codes, result.codes) and lengths.tolist() == [cases.GOLDEN_FRAMES]
    decoded = model.from_indices(cases.random_codes(cases.TINY, 1, cases.GOLDEN_FRAMES, past_end=64))
    facts = {"recording_seed": seed, "margin": margin, "decoded_rms": decoded.square().mean().sqrt().item()}
    return {"tiny.codes": codes.to(torch.int16), "tiny.decoded": cases.excerpt(decoded)}, facts


def wide_goldens(modded_dac, rvq):
    """Run one real-width block of each kind."""
    from dac.nn.quantize import VectorQuantize

    def sizes(**kwargs):
        return modded_dac.ModelArgs(**kwargs, n_local_heads=-1, head_dim=64, rope_base=10000, norm_eps=1e-5)

    blocks = {
        "encoder_block": modded_dac.EncoderBlock(1024, 8, True, 1, sizes),
        "decoder_block": modded_dac.DecoderBlock(1536, 768, 8, True),
        "pre_module": modded_dac.WindowLimitedTransformer(
            sizes(n_layer=1, n_head=16, dim=1024, intermediate_size=3072), input_dim=1024, window_size=128
        ),
        "convnext": rvq.ConvNeXtBlock(1024),
        "codebook": VectorQuantize(1024, 4096, 8),
    }
    goldens = {}
    for name, block in blocks.items():
        block.load_state_dict(cases.file_state(cases.WIDE_BLOCKS[name][0]), strict=True)
        y = block.eval()(cases.wide_input(name))
        if name == "codebook":
            y, goldens["codebook.codes"] = y[0], y[3].to(torch.int16)
        goldens[name] = cases.excerpt(y)
    return goldens


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", type=Path, required=True, help="a work tree of fish-speech")
    parser.add_argument("--commit", help="its commit, when the work tree has no .git")
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = (
        args.commit or subprocess.check_output(["git", "-C", args.upstream, "rev-parse", "HEAD"], text=True).strip()
    )
    modded_dac, rvq = import_reference(args.upstream)
    with torch.no_grad():
        goldens, facts = tiny_goldens(build_tiny(args.upstream))
        goldens |= wide_goldens(modded_dac, rvq)
    save_file({name: tensor.contiguous() for name, tensor in goldens.items()}, HERE / "goldens.safetensors")
    provenance = {
        "source": "https://github.com/fishaudio/fish-speech",
        "commit": commit,
        "descript-audio-codec": "1.0.0",
        "torch": torch.__version__,
        "threads": 1,
        "weights": "s2quant.codec.random_state.random_tensor, seed 1",
        **facts,
    }
    (HERE / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main()
