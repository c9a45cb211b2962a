"""Speaker similarity: a clip becomes an embedding, two embeddings a cosine.

- `wavlm-xvector`: `WavLMForXVector` of transformers from a local folder (`microsoft/wavlm-base-plus-sv`).
- `wavlm-ecapa`: the model of seed-tts-eval from its local checkpoint, see `s2quant.evaluate.ecapa`.
- `resemblyzer`: comes with its weights, so it needs no file. It shortens silences and normalizes loudness first.

Cosines of different back ends do not compare: what one calls 0.7 another calls 0.9. So the name of the back end, with
the first digits of its checkpoint's sha256, stands beside every number. A clip shorter than half a second or without
sound has no embedding: it counts as missing, never as 0.

Legend: S samples, E embedding size.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from s2quant.errors import UserError
from s2quant.evaluate.asr import RATE_HZ, Audio, to_16khz
from s2quant.evaluate.ecapa import ecapa_from_state
from s2quant.files import sha256_file
from s2quant.suite import SIMILARITY_KINDS

MIN_S = 0.5
SILENCE_PEAK = 1e-4


class SpeakerModel(Protocol):
    """A back end.

    Its `name` is the kind with the first digits of the checkpoint's sha256, for the record beside every number.
    """

    name: str

    def embed(self, audio: Audio, sample_rate: int) -> Tensor | None:
        """Embed a clip.

        Args:
            audio: float32 [S], mono.
            sample_rate: Its rate in Hz.

        Returns:
            float32 [E] on the CPU, or None for a clip that is too short or silent.
        """


def load_similarity(kind: str, model_path: Path | str | None = None, device: str = "cpu") -> SpeakerModel:
    """Load a back end.

    Args:
        kind: One of `s2quant.suite.SIMILARITY_KINDS`.
        model_path: Folder (wavlm-xvector) or file (wavlm-ecapa); None takes the weights that come with resemblyzer.
        device: Where it runs.

    Returns:
        The back end.

    Raises:
        UserError: The kind is unknown, its package is not installed, or the file is absent or not of its format.
    """
    if kind == "wavlm-xvector":
        return XVectorModel(model_path, device)
    if kind == "wavlm-ecapa":
        return EcapaModel(model_path, device)
    if kind == "resemblyzer":
        return ResemblyzerModel(model_path, device)
    raise UserError(f"similarity back end {kind!r}", f"one of {', '.join(SIMILARITY_KINDS)}", "mend the suite")


def cosine(a: Tensor | None, b: Tensor | None) -> float | None:
    """Compare two embeddings of one back end.

    Args:
        a: float32 [E], or None when missing.
        b: float32 [E], or None when missing.

    Returns:
        Their cosine, from -1 to 1; None when one is missing.
    """
    if a is None or b is None:
        return None
    assert a.ndim == 1 and a.shape == b.shape, "embeddings of two back ends"
    if torch.equal(a, b):
        return 1.0  # exactly, so that identical arms differ by exactly 0
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


class XVectorModel:
    """transformers' WavLMForXVector.

    Args:
        model_path: Folder with config.json, preprocessor_config.json and the weights.
        device: Where it runs.

    Raises:
        UserError: transformers is not installed, or the folder is absent or does not hold all of the model.
    """

    def __init__(self, model_path: Path | str | None, device: str = "cpu") -> None:
        try:
            from transformers import AutoFeatureExtractor, WavLMForXVector
        except ImportError as error:
            raise _not_installed("transformers") from error
        folder = _existing(model_path, "a folder with a WavLMForXVector, such as microsoft/wavlm-base-plus-sv")
        weights = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
        if not weights:
            raise UserError(f"{folder}: no model.safetensors", "a folder with a WavLMForXVector", "check the folder")
        try:
            self.extract = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
            model, info = WavLMForXVector.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise _not_a_model(folder, "a folder with a WavLMForXVector", error) from error
        # The weights of the loss that it was trained with are of no use here and often left out.
        missing = sorted(key for key in info["missing_keys"] if not key.startswith("objective."))
        if missing:
            raise UserError(
                f"{folder}: no tensors for {', '.join(missing[:5])}" + (", ..." if len(missing) > 5 else ""),
                "all the weights of a WavLMForXVector",
                "take a checkpoint trained to verify speakers (a bare WavLM has no such head)",
            )
        self.device = device
        self.model = model.float().to(device).eval()
        self.name = f"wavlm-xvector:{sha256_file(weights[0])[:12]}"

    @torch.inference_mode()
    def embed(self, audio: Audio, sample_rate: int) -> Tensor | None:
        """Embed a clip; see `SpeakerModel.embed`.

        Args:
            audio: float32 [S], mono.
            sample_rate: Its rate in Hz.

        Returns:
            float32 [E], or None.
        """
        samples = _audible(audio, sample_rate)
        if samples is None:
            return None
        inputs = self.extract(samples, sampling_rate=RATE_HZ, return_tensors="pt").to(self.device)
        embedding: Tensor = self.model(**inputs).embeddings[0].float().cpu()
        return embedding


class EcapaModel:
    """The WavLM-large ECAPA of seed-tts-eval.

    Args:
        model_path: `wavlm_large_finetune.pth`.
        device: Where it runs.

    Raises:
        UserError: transformers is not installed, or the file is absent or not that checkpoint.
    """

    def __init__(self, model_path: Path | str | None, device: str = "cpu") -> None:
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise _not_installed("transformers") from error
        path = _existing(model_path, "the checkpoint wavlm_large_finetune.pth of seed-tts-eval")
        expected = "a checkpoint with the tensors under 'model'"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)["model"]
        except (KeyError, TypeError, RuntimeError, ValueError, EOFError, OSError, UnpicklingError) as error:
            raise _not_a_model(path, expected, error) from error
        self.device = device
        self.model = ecapa_from_state(state, str(path)).to(device)
        self.name = f"wavlm-ecapa:{sha256_file(path)[:12]}"

    @torch.inference_mode()
    def embed(self, audio: Audio, sample_rate: int) -> Tensor | None:
        """Embed a clip; see `SpeakerModel.embed`.

        Args:
            audio: float32 [S], mono.
            sample_rate: Its rate in Hz.

        Returns:
            float32 [E], or None.
        """
        samples = _audible(audio, sample_rate)
        if samples is None:
            return None
        embedding: Tensor = self.model(torch.from_numpy(samples)[None].to(self.device))[0].float().cpu()
        return embedding


class ResemblyzerModel:
    """resemblyzer's voice encoder.

    Args:
        model_path: Weights of its format, or None for those that come with it.
        device: Where it runs.

    Raises:
        UserError: The package is not installed whole, or the file is absent or not of its format.
    """

    def __init__(self, model_path: Path | str | None = None, device: str = "cpu") -> None:
        try:
            import resemblyzer
        except ImportError as error:
            raise _not_installed("resemblyzer", f" ({error}; eval/README.md says how)") from error
        own = Path(resemblyzer.__file__).parent / "pretrained.pt"
        path = own if model_path is None else _existing(model_path, "weights of resemblyzer")
        try:
            self.encoder: Any = resemblyzer.VoiceEncoder(device, verbose=False, weights_fpath=path)
        except (KeyError, TypeError, RuntimeError, ValueError, EOFError, OSError, UnpicklingError) as error:
            raise _not_a_model(path, "weights of resemblyzer", error) from error
        self.preprocess = resemblyzer.preprocess_wav
        self.name = f"resemblyzer:{sha256_file(path)[:12]}"

    def embed(self, audio: Audio, sample_rate: int) -> Tensor | None:
        """Embed a clip; see `SpeakerModel.embed`.

        Args:
            audio: float32 [S], mono.
            sample_rate: Its rate in Hz.

        Returns:
            float32 [256], or None; also when its voice detector finds no speech.
        """
        samples = _audible(audio, sample_rate)
        if samples is None:
            return None
        voiced = self.preprocess(samples)
        if not len(voiced):
            return None
        return torch.from_numpy(np.asarray(self.encoder.embed_utterance(voiced), dtype=np.float32))


def _audible(audio: Audio, sample_rate: int) -> npt.NDArray[np.float32] | None:
    """Bring a clip to 16 kHz, or give None when there is too little to hear."""
    samples = to_16khz(audio, sample_rate)
    if len(samples) < MIN_S * RATE_HZ or float(np.abs(samples).max()) < SILENCE_PEAK:
        return None
    return samples


def _existing(path: Path | str | None, expected: str) -> Path:
    if path is None or not Path(path).exists():
        raise UserError(
            f"speaker model {path}: no such file or folder",
            expected,
            "name it in the suite (similarity.model) or on the command line",
        )
    return Path(path)


def _not_installed(package: str, more: str = "") -> UserError:
    return UserError(
        f"a speaker model that needs the package {package}, which is not installed{more}",
        "the packages of s2quant[eval]",
        "pip install 's2quant[eval]'",
    )


def _not_a_model(path: Path, expected: str, error: Exception) -> UserError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{path}: {type(error).__name__}: {first}", expected, "check the file")
