"""Write ecapa.json: what the public speaker model of seed-tts-eval gives for small random weights.

    python make_ecapa.py --upstream DIR     # a checkout of BytedanceSpeech/seed-tts-eval, with thirdparty/UniSpeech

The public code takes WavLM from s3prl, which gives the inputs of all layers and the output of the last as hidden
states, of clips normalized to mean 0 and variance 1 (s3prl/upstream/wavlm/expert.py at
0fb2953385f183f910d7d048edfcf852e8c4c004); `Upstream` does the same around the WavLM of UniSpeech. torchaudio, which
the code imports for features that are not used here, is not needed. The weights are not stored: `random_state` makes
them again from names and shapes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import torch

CHANNELS_NOTE = "the public class fixes 512 channels and 1536 pooled"
WAVLM = {
    "extractor_mode": "layer_norm",
    "encoder_layers": 3,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "layer_norm_first": True,
    "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
    "normalize": True,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "relative_position_embedding": True,
    "num_buckets": 32,
    "max_distance": 800,
    "gru_rel_pos": True,
}


def random_state(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Make the same small weights from names and shapes, whatever the version of torch."""
    state = {}
    for name, shape in shapes.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        values = np.random.default_rng(seed).standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.int64)
            continue
        if name.endswith(("running_var", "weight_g", "grep_a")):
            values = 0.5 + np.abs(values)
        elif len(shape) > 1:
            values = values / np.sqrt(np.prod(shape[1:]))
        state[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return state


def clip() -> np.ndarray:
    """A second of 16 kHz audio: four tones that rise, and noise."""
    seconds = np.arange(16000) / 16000
    tones = sum(np.sin(2 * np.pi * (110 * n * seconds + 40 * seconds**2)) / n for n in (1, 2, 3, 5))
    noise = np.random.default_rng(5).standard_normal(16000)
    return np.asarray(0.2 * tones + 0.01 * noise, dtype=np.float32)


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--upstream", type=Path, required=True)
    upstream = parser.parse_args().upstream
    torch.manual_seed(0)
    np.random.seed(0)
    unispeech = upstream / "thirdparty" / "UniSpeech"
    for name in ("torchaudio", "torchaudio.transforms"):
        sys.modules[name] = types.ModuleType(name)
    load("modules", unispeech / "WavLM" / "modules.py")
    wavlm = load("WavLM", unispeech / "WavLM" / "WavLM.py")
    ecapa = load("ecapa_tdnn", unispeech / "downstreams" / "speaker_verification" / "models" / "ecapa_tdnn.py")

    class Upstream(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = wavlm.WavLM(wavlm.WavLMConfig(WAVLM))

        def forward(self, wavs):
            wavs = torch.stack([torch.nn.functional.layer_norm(wav, wav.shape) for wav in wavs])
            states = []
            layers = self.model.encoder.layers
            hooks = [
                layer.register_forward_pre_hook(lambda _, given: states.append(given[0].transpose(0, 1).clone()))
                for layer in layers
            ]
            last, _ = self.model.extract_features(wavs, padding_mask=torch.zeros_like(wavs, dtype=torch.bool))
            for hook in hooks:
                hook.remove()
            return {"hidden_states": [*states, last]}

    torch.hub.load = lambda *_: Upstream()
    model = ecapa.ECAPA_TDNN_SMALL(feat_dim=WAVLM["encoder_embed_dim"], feat_type="wavlm_large").eval()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(random_state(shapes))
    with torch.no_grad():
        embedding = model(torch.from_numpy(clip())[None])[0]
    commit = ["git", "-C", upstream, "rev-parse", "HEAD"]
    out = {
        "provenance": {
            "repository": "BytedanceSpeech/seed-tts-eval",
            "commit": subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip(),
            "torch": torch.__version__,
            "sizes": WAVLM,
            "note": CHANNELS_NOTE,
        },
        "shapes": shapes,
        "embedding": [round(value, 6) for value in embedding.tolist()],
    }
    Path(__file__).with_name("ecapa.json").write_text(json.dumps(out) + "\n", encoding="utf-8")
    print(embedding.norm(), len(shapes))


if __name__ == "__main__":
    main()
