"""Recognizers: audio in, text out, behind one small interface; all work offline.

- `whisper`: openai-whisper from a checkpoint file in its own format. Greedy (`temperature=0`: its fallback samples),
  float32, the language given, `condition_on_previous_text=False` (against loops), no timestamps for clips up to 30 s,
  so that clips can share a batch; longer clips go through its own windows. Chinese transcripts are brought to
  simplified characters by OpenCC, as seed-tts-eval does with another library.
- `pocketsphinx`: the English model that comes with it, or with an n-gram language model of the user's. Every clip
  starts from the same state and has silence around it, so a transcript does not depend on what was heard before.

Legend: S samples at 16 kHz unless a rate is given. Where a package or a file is missing, the message says so; a
recognizer that is not the one asked for is never taken.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import soxr
import torch
from torch import Tensor

from s2quant.errors import UserError
from s2quant.evaluate.sphinx_pool import SphinxPool
from s2quant.evaluate.sphinx_worker import RATE_HZ as RATE_HZ
from s2quant.evaluate.sphinx_worker import hear, new_decoder
from s2quant.files import sha256_file
from s2quant.suite import ASR_KINDS

WINDOW_S = 30
SILENCE_S = 0.2
OFFICIAL = "official:"

Audio = Tensor | npt.NDArray[np.float32]


class Asr(Protocol):
    """A recognizer.

    Its `name` is the kind with the first digits of the checkpoint's sha256, for the record beside every number.
    """

    name: str

    def transcribe(self, audio: Audio, sample_rate: int, lang: str) -> str:
        """Write down a clip.

        Args:
            audio: float32 [S], mono.
            sample_rate: Its rate in Hz.
            lang: ISO 639 code of what is spoken.

        Returns:
            The transcript as the recognizer gives it; empty when it hears nothing.
        """

    def transcribe_batch(self, clips: Sequence[Audio], sample_rate: int, lang: str) -> list[str]:
        """Write down clips of one language.

        Args:
            clips: float32 [S] each, mono.
            sample_rate: Their rate in Hz.
            lang: ISO 639 code of what is spoken.

        Returns:
            One transcript a clip.
        """


def load_asr(kind: str, model_path: Path | str | None = None, device: str = "cpu", processes: int = 1) -> Asr:
    """Load a recognizer.

    Args:
        kind: One of `s2quant.suite.ASR_KINDS`.
        model_path: For whisper a checkpoint file, or `official:NAME` to let openai-whisper take it from its cache or
            fetch it; for pocketsphinx a language model (ARPA or binary), or None for the one that comes with it.
        device: Where whisper runs.
        processes: Processes of pocketsphinx that share a batch of clips.

    Returns:
        The recognizer.

    Raises:
        UserError: The kind is unknown, its package is not installed, or the file is absent or not of its format.
    """
    if kind == "whisper":
        return WhisperAsr(model_path, device)
    if kind == "pocketsphinx":
        return PocketsphinxAsr(model_path, processes)
    raise UserError(f"recognizer {kind!r}", f"one of {', '.join(ASR_KINDS)}", "mend the suite")


def to_16khz(audio: Audio, sample_rate: int) -> npt.NDArray[np.float32]:
    """Bring a clip to the rate that recognizers and speaker models work at.

    Args:
        audio: float32 [S], mono, in [-1, 1].
        sample_rate: Its rate in Hz.

    Returns:
        float32 at 16 kHz (soxr, its default quality).

    Raises:
        UserError: The clip is not mono, or holds NaN or infinity.
    """
    samples = np.asarray(audio, dtype=np.float32)
    if samples.ndim != 1 or not np.isfinite(samples).all():
        what = f"of shape {samples.shape}" if samples.ndim != 1 else "with samples that are NaN or infinite"
        raise UserError(f"a clip {what}", "mono audio of finite samples", "make the clip again")
    if sample_rate == RATE_HZ or not len(samples):
        return samples
    resampled: npt.NDArray[np.float32] = soxr.resample(samples, sample_rate, RATE_HZ)
    return resampled


class WhisperAsr:
    """openai-whisper, greedy and in float32.

    Args:
        model_path: Checkpoint file, or `official:NAME`.
        device: Where it runs.

    Raises:
        UserError: The package is not installed, or the file is absent or no checkpoint of whisper.
    """

    def __init__(self, model_path: Path | str | None, device: str = "cpu") -> None:
        try:
            import whisper
        except ImportError as error:
            raise _not_installed("openai-whisper") from error
        self._whisper = whisper
        path = _whisper_file(whisper, model_path)
        try:
            self.model = whisper.load_model(str(path.absolute()), device=device).float().eval()
        except (KeyError, TypeError, RuntimeError, ValueError, EOFError, OSError, UnpicklingError) as error:
            raise _not_a_model(path, "a checkpoint of openai-whisper (dims and model_state_dict)", error) from error
        self.name = f"whisper:{sha256_file(path)[:12]}"

    def transcribe(self, audio: Audio, sample_rate: int, lang: str) -> str:
        """Write down a clip; see `Asr.transcribe`.

        Args:
            audio: float32 [S], mono.
            sample_rate: Its rate in Hz.
            lang: ISO 639 code of what is spoken.

        Returns:
            The transcript.
        """
        return self.transcribe_batch([audio], sample_rate, lang)[0]

    @torch.inference_mode()
    def transcribe_batch(self, clips: Sequence[Audio], sample_rate: int, lang: str) -> list[str]:
        """Write down clips of one language; those of 30 s at most share a batch.

        Args:
            clips: float32 [S] each, mono.
            sample_rate: Their rate in Hz.
            lang: ISO 639 code of what is spoken.

        Returns:
            One transcript a clip; empty for a clip without samples.

        Raises:
            UserError: The checkpoint does not know the language.
        """
        self._check_language(lang)
        samples = [to_16khz(clip, sample_rate) for clip in clips]
        texts = [""] * len(clips)
        short = [index for index, one in enumerate(samples) if 0 < len(one) <= WINDOW_S * RATE_HZ]
        if short:
            found = self._decode([samples[index] for index in short], lang)
            texts = [found[short.index(index)] if index in short else "" for index in range(len(clips))]
        for index, one in enumerate(samples):
            if len(one) > WINDOW_S * RATE_HZ:
                texts[index] = self._transcribe_long(one, lang)
        return [_simplified(text) if lang == "zh" else text for text in texts]

    def _decode(self, samples: Sequence[npt.NDArray[np.float32]], lang: str) -> list[str]:
        mels = [
            self._whisper.log_mel_spectrogram(self._whisper.pad_or_trim(one), self.model.dims.n_mels) for one in samples
        ]
        options = self._whisper.DecodingOptions(language=lang, temperature=0.0, without_timestamps=True, fp16=False)
        found = self._whisper.decode(self.model, torch.stack(mels).to(self.model.device), options)
        return [one.text.strip() for one in found]

    def _transcribe_long(self, samples: npt.NDArray[np.float32], lang: str) -> str:
        options: dict[str, Any] = {"temperature": 0.0, "condition_on_previous_text": False, "fp16": False}
        found = self._whisper.transcribe(self.model, samples, language=lang, verbose=None, **options)
        return str(found["text"]).strip()

    def _check_language(self, lang: str) -> None:
        known = self._whisper.tokenizer.LANGUAGES
        if (lang in known) and (self.model.is_multilingual or lang == "en"):
            return
        raise UserError(
            f"language {lang!r} for the recognizer {self.name}",
            "a language of the checkpoint" if self.model.is_multilingual else "'en', all that this checkpoint knows",
            "use a checkpoint that knows it, or leave the texts out",
        )


class PocketsphinxAsr:
    """pocketsphinx with its English model.

    Args:
        model_path: An n-gram language model (ARPA or binary) of words of its dictionary, or None for its own.
        processes: Processes that share a batch of clips; they are started with the first batch.

    Raises:
        UserError: The package is not installed, or the file is absent or no language model.
    """

    def __init__(self, model_path: Path | str | None = None, processes: int = 1) -> None:
        try:
            import pocketsphinx
        except ImportError as error:
            raise _not_installed("pocketsphinx") from error
        path = Path(pocketsphinx.get_model_path("en-us/en-us.lm.bin") if model_path is None else model_path)
        if not path.is_file():
            raise UserError(f"language model {path}: no such file", "an n-gram language model", "check the path")
        try:
            self.decoder = new_decoder(str(path))
        except RuntimeError as error:
            raise _not_a_model(path, "an n-gram language model, ARPA or binary", error) from error
        self.name = f"pocketsphinx:{sha256_file(path)[:12]}"
        self.path, self.processes = path, processes
        self.pool: SphinxPool | None = None

    def transcribe(self, audio: Audio, sample_rate: int, lang: str) -> str:
        """Write down a clip; see `Asr.transcribe`.

        Args:
            audio: float32 [S], mono.
            sample_rate: Its rate in Hz.
            lang: "en".

        Returns:
            The transcript, in lower case and without punctuation.

        Raises:
            UserError: The language is not English.
        """
        pcm = _pcm(audio, sample_rate, lang)
        return hear(self.decoder, pcm) if pcm else ""

    def transcribe_batch(self, clips: Sequence[Audio], sample_rate: int, lang: str) -> list[str]:
        """Write down clips one after the other, in each process.

        Args:
            clips: float32 [S] each, mono.
            sample_rate: Their rate in Hz.
            lang: "en".

        Returns:
            One transcript a clip.
        """
        if min(self.processes, len(clips)) < 2:
            return [self.transcribe(clip, sample_rate, lang) for clip in clips]
        self.pool = self.pool or SphinxPool(self.path, self.processes)
        sounds = [_pcm(clip, sample_rate, lang) for clip in clips]
        heard = iter(self.pool.hear([pcm for pcm in sounds if pcm]))
        return [next(heard) if pcm else "" for pcm in sounds]


def _pcm(audio: Audio, sample_rate: int, lang: str) -> bytes:
    """Give a clip as pocketsphinx takes it, with silence around it; nothing of a clip without a sample."""
    if lang != "en":
        raise UserError(f"language {lang!r} for pocketsphinx", "'en'", "use whisper")
    samples = to_16khz(audio, sample_rate)
    if not len(samples):
        return b""
    pad = np.zeros(int(SILENCE_S * RATE_HZ), np.float32)
    pcm = np.concatenate([pad, samples, pad]).clip(-1, 1) * 32767
    return np.round(pcm).astype("<i2").tobytes()


def _whisper_file(whisper: Any, model_path: Path | str | None) -> Path:
    """Find a checkpoint's file; only a name that the user marked as official may be fetched."""
    if isinstance(model_path, str) and model_path.startswith(OFFICIAL):
        name = model_path.removeprefix(OFFICIAL)
        if name not in whisper.available_models():
            names = ", ".join(whisper.available_models())
            raise UserError(f"whisper model {name!r}", f"one of {names}", "mend the name, or give a file")
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whisper"
        try:
            return Path(whisper._download(whisper._MODELS[name], str(root), in_memory=False))
        except OSError as error:
            raise UserError(
                f"whisper model {name!r}: {error}", "a model in the cache, or a network", "give a local file instead"
            ) from error
    if model_path is None or not Path(model_path).is_file():
        raise UserError(
            f"whisper checkpoint {model_path}: no such file",
            f"a checkpoint file of openai-whisper, or {OFFICIAL}large-v3 to let openai-whisper fetch it",
            "name the file in the suite (asr.model) or on the command line",
        )
    return Path(model_path)


def _simplified(text: str) -> str:
    """Bring Chinese to simplified characters."""
    try:
        import opencc
    except ImportError as error:
        raise _not_installed("opencc") from error
    return str(opencc.OpenCC("t2s").convert(text))


def _not_installed(package: str) -> UserError:
    return UserError(
        f"a recognizer that needs the package {package}, which is not installed",
        "the packages of s2quant[eval]",
        "pip install 's2quant[eval]'",
    )


def _not_a_model(path: Path, expected: str, error: Exception) -> UserError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{path}: {type(error).__name__}: {first}", expected, "check the file")
