"""Write ecapa.json: what the public speaker model of seed-tts-eval gives for small random weights.

    python make_ecapa.py --upstream DIR --s3prl DIR

DIR are checkouts of BytedanceSpeech/seed-tts-eval, with thirdparty/UniSpeech, and of s3prl/s3prl, from which its code
takes WavLM by `torch.hub`; here a random small one in s3prl's own wrapper, which chooses the hidden states. What these
import and is not used here (torchaudio, the printing of s3prl) is not needed. The weights are not stored:
`random_state` makes them again from names and shapes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import subprocess
import sys
import tempfile
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


def package(name: str, folder: Path, **contents) -> None:
    """Let modules of a folder be imported as those of a package, without its `__init__`."""
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(folder)]
    vars(sys.modules[name]).update(contents)


def commit_of(folder: Path) -> str:
    command = ["git", "-C", folder, "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def small_wavlm(s3prl: Path) -> torch.nn.Module:
    """Give s3prl's wrapper of WavLM a small model."""
    for name in ("s3prl", "s3prl.upstream", "s3prl.upstream.wavlm"):
        package(name, s3prl / name.replace(".", "/"))
    package("s3prl.utility", s3prl / "s3prl" / "utility")
    package("s3prl.utility.helper", s3prl, show=print)
    wavlm = importlib.import_module("s3prl.upstream.wavlm.WavLM")
    expert = importlib.import_module("s3prl.upstream.wavlm.expert")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wavlm.pt"
        torch.save({"cfg": WAVLM, "model": wavlm.WavLM(wavlm.WavLMConfig(WAVLM)).state_dict()}, path)
        return expert.UpstreamExpert(str(path))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--upstream", type=Path, required=True)
    parser.add_argument("--s3prl", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    np.random.seed(0)
    for name in ("torchaudio", "torchaudio.transforms"):
        sys.modules[name] = types.ModuleType(name)
    package("models", options.upstream / "thirdparty/UniSpeech/downstreams/speaker_verification/models")
    sys.modules["models.utils"] = types.ModuleType("models.utils")  # needs fairseq, and is for another model
    sys.modules["models.utils"].UpstreamExpert = None
    ecapa = importlib.import_module("models.ecapa_tdnn")
    torch.hub.load = lambda *_: small_wavlm(options.s3prl)
    model = ecapa.ECAPA_TDNN_SMALL(feat_dim=WAVLM["encoder_embed_dim"], feat_type="wavlm_large").eval()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(random_state(shapes))
    with torch.no_grad():
        embedding = model(torch.from_numpy(clip())[None])[0]
    out = {
        "provenance": {
            "repository": "BytedanceSpeech/seed-tts-eval",
            "commit": commit_of(options.upstream),
            "s3prl": commit_of(options.s3prl),
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
