"""whisper-mini: a small recognizer in openai-whisper's own classes and file format, trained on the same voices.

Legend: B batch, S samples at 16 kHz, L tokens, D width, U used tokens, T positions of the encoder, P phonemes.

The vocabulary of 51,864 tokens is whisper's; only the few hundred that our sentences use are trained. The rows of all
others are zero and stay zero: their logits are 0, and the softmax over the whole vocabulary is that over the used
tokens plus one class of log(number of others). So the file is small when compressed and training never touches it.

While it trains, a linear layer reads the phoneme off every position of the encoder (the synthesizer says which).
Without it the decoder first learns the grammar alone, for a quarter of the time, and the encoder nothing.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

try:
    import numba  # noqa: F401
except ImportError:  # whisper wants it for the times of words, which nobody asks for here
    sys.modules["numba"] = ModuleType("numba")
    sys.modules["numba"].jit = lambda *args, **kwargs: lambda function: function  # type: ignore[attr-defined]

import whisper
from torch import Tensor
from torch.nn import functional
from whisper.audio import mel_filters
from whisper.tokenizer import Tokenizer, get_tokenizer

from mini import grammar
from mini.common import CODEC_RATE, Budget, Log, Speech, Step, cosine, resample, save, word_errors
from mini.speech import FRAME_S, PHONES, SAMPLE_RATE, SUBFRAMES

DIMS = {
    "n_mels": 80,
    "n_audio_ctx": 1500,
    "n_audio_state": 96,
    "n_audio_head": 3,
    "n_audio_layer": 3,
    "n_vocab": 51864,
    "n_text_ctx": 448,
    "n_text_state": 96,
    "n_text_head": 3,
    "n_text_layer": 2,
}
MAX_SECONDS, MAX_TOKENS, MAX_PIECES = 12, 64, 3
POSITION_S, PHONE_WEIGHT = 0.02, 0.5


def new_model(dims: dict[str, int], used: Tensor, seed: int) -> whisper.model.Whisper:
    """A model with zero rows for the tokens that are not used."""
    torch.manual_seed(seed)
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**dims))
    with torch.no_grad():
        rows = torch.randn(len(used), dims["n_text_state"]) * 0.05
        model.decoder.token_embedding.weight.zero_()[used] = rows
        model.decoder.positional_embedding.normal_(std=0.02)
    return model


def used_tokens(tokenizer: Tokenizer) -> Tensor:
    """Every token that a text of the grammar's can hold: int64 [U], sorted."""
    words = {word for text in grammar.vocabulary() for word in (text, text.capitalize())}
    words |= {word for text in grammar.WORDS["name"] for word in (text,)}
    ids = {tokenizer.eot, tokenizer.sot, tokenizer.no_timestamps}
    for word in words:
        for text in (f" {word}", f" {word}.", f" {word}?", f" {word},", f" {word}. A", word):
            ids.update(tokenizer.encode(text))
    return torch.tensor(sorted(ids))


def log_mel(wav: Tensor, filters: Tensor) -> Tensor:
    """whisper's log-mel spectrogram of a batch, padded as if by silence to 30 s: [B, S] -> [B, 80, 3000]."""
    window = torch.hann_window(400, device=wav.device)
    power = torch.stft(wav, 400, 160, window=window, return_complex=True)[..., :-1].abs().square()
    mel = (filters @ power).clamp(min=1e-10).log10()
    top = mel.amax(dim=(1, 2), keepdim=True) - 8.0
    padded = torch.cat([torch.maximum(mel, top), top.expand(-1, 80, 3000 - mel.shape[2])], dim=2)
    return (padded + 4.0) / 4.0


class Batches:
    """Random clips of one to three utterances with leading silence, gaps, gain and noise; and their tokens."""

    def __init__(self, sources: list[Speech], tokenizer: Tokenizer, size: int, seed: int, max_seconds: float) -> None:
        self.sources, self.size, self.rng = sources, size, random.Random(seed)
        self.tokenizer, self.max_samples = tokenizer, int(max_seconds * SAMPLE_RATE)
        self.cache: dict[str, list[int]] = {}
        self.labels: dict[int, Tensor] = {}

    def _labels(self, source: Speech) -> Tensor:
        """Phonemes of a source on its device, all quarters of all frames."""
        key = id(source)
        if key not in self.labels or len(self.labels[key]) != source.phones.numel():
            self.labels[key] = source.phones.flatten().to(source.device)
        return self.labels[key]

    def _ids(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(f" {text}")
        return self.cache[text]

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give audio [B, S] on the device, tokens int64 [B, L + 1], padded with -1, on the host; phonemes [B, T]."""
        source = self.rng.choice(self.sources)
        starts, frame_starts, device, rng = source.starts, source.frame_starts, source.device, self.rng
        layout = np.zeros((MAX_PIECES, 4, self.size), np.int64)  # start in the store, offset, samples, first frame
        tokens = np.full((self.size, MAX_TOKENS + 1), -1, np.int64)
        for b in range(self.size):
            offset = int(rng.uniform(0, 0.6) * SAMPLE_RATE)
            ids = [self.tokenizer.sot, self.tokenizer.no_timestamps]
            for piece in range(rng.choice((1, 1, 1, 1, 2, 3))):
                i = rng.randrange(len(source.rows))
                more = self._ids(source.rows[i]["sentence"])
                samples = int(source.samples[i])
                too_long = offset + samples > self.max_samples or len(ids) + len(more) + 1 > MAX_TOKENS
                if piece and too_long:
                    break
                samples = min(samples, self.max_samples - offset)
                layout[piece, :, b] = starts[i], offset, samples, frame_starts[i]
                offset += samples + int(rng.uniform(0, 0.5) * SAMPLE_RATE)
                ids += more
            ids.append(self.tokenizer.eot)
            tokens[b, : len(ids)] = ids
        position = torch.arange(self.max_samples, device=device)[None]
        wav = torch.zeros(self.size, self.max_samples, device=device)
        middle = (
            torch.arange(int(self.max_samples / SAMPLE_RATE / POSITION_S), device=device)[None] + 0.5
        ) * POSITION_S
        phones = torch.zeros(self.size, middle.shape[1], dtype=torch.int64, device=device)
        labels = self._labels(source)
        for start, offset, samples, frame in torch.from_numpy(layout).to(device)[..., None].unbind():
            inside = (position >= offset) & (position < offset + samples)
            index = torch.where(inside, start + position - offset, 0)
            wav += source.audio[index] * inside / 32768
            since = middle - offset / SAMPLE_RATE
            spoken = (since >= 0) & (since < samples / SAMPLE_RATE)
            place = frame * SUBFRAMES + (since / (FRAME_S / SUBFRAMES)).long()
            found = labels[torch.where(spoken, place, 0).clamp(max=len(labels) - 1)]
            phones = torch.where(spoken, found.long(), phones)
        gain = 10 ** torch.empty(self.size, 1, device=device).uniform_(-0.4, 0.3)
        level = 10 ** torch.empty(self.size, 1, device=device).uniform_(-4.0, -2.2)  # noise 20 to 56 dB under speech
        noisy = (torch.rand(self.size, 1, device=device) < 0.6).float()
        return wav * gain + torch.randn_like(wav) * level * noisy, torch.from_numpy(tokens), phones


def hidden(model: whisper.model.Whisper, audio: Tensor, tokens: Tensor) -> Tensor:
    """The decoder's output before its head: [B, L, D]."""
    decoder = model.decoder
    x = (decoder.token_embedding(tokens) + decoder.positional_embedding[: tokens.shape[1]]).to(audio.dtype)
    for block in decoder.blocks:
        x = block(x, audio, mask=decoder.mask)
    return decoder.ln(x)


def loss_of(model: whisper.model.Whisper, audio: Tensor, tokens: Tensor, used: Tensor, column: Tensor) -> Tensor:
    """Cross-entropy over the whole vocabulary, the rows of the tokens that are not used being zero."""
    inputs, targets = tokens[:, :-1].clamp(min=0), tokens[:, 1:]
    logits = hidden(model, audio, inputs).float() @ model.decoder.token_embedding.weight[used].T
    others = torch.full_like(logits[..., :1], math.log(model.dims.n_vocab - len(used)))
    logits = torch.cat([logits, others], dim=-1)
    goal = torch.where(targets >= 0, column[targets.clamp(min=0)], -1)
    return functional.cross_entropy(logits.flatten(0, 1), goal.flatten(), ignore_index=-1)


def save_model(path: Path, model: whisper.model.Whisper) -> None:
    """Write the file that `whisper.load_model(path)` reads, in 16 bit."""
    state = {name: tensor.half().cpu() for name, tensor in model.state_dict().items()}
    save(path, {"dims": dict(vars(model.dims)), "model_state_dict": state})


@torch.no_grad()
def transcribe(model: whisper.model.Whisper, wav: Tensor) -> list[str]:
    """Read clips [B, S] at 16 kHz greedily, through whisper's own decoder."""
    options = whisper.DecodingOptions(
        language="en", without_timestamps=True, temperature=0.0, sample_len=60, fp16=False
    )
    mel = log_mel(wav.float(), mel_filters(wav.device, 80))
    results = whisper.decode(model, mel, options)
    return [result.text for result in results]


def word_error_rate(
    model: whisper.model.Whisper, speech: Speech, count: int, audio: list[Tensor] | None = None
) -> float:
    """WER over the first utterances of a split, of their own sound or of `audio` (16 kHz, float [S] each)."""
    model.eval()
    errors = words = 0
    for first in range(0, min(count, len(speech.rows)), 50):
        indices = range(first, min(first + 50, count, len(speech.rows)))
        if audio is None:
            wav = speech.cut(indices, MAX_SECONDS * SAMPLE_RATE)
        else:
            wav = torch.zeros(len(indices), MAX_SECONDS * SAMPLE_RATE, device=speech.device)
            for row, i in zip(wav, indices, strict=True):
                row[: len(audio[i])] = audio[i][: len(row)]
        for i, text in zip(indices, transcribe(model, wav), strict=True):
            reference = grammar.words_of(speech.rows[i]["text"])
            errors += word_errors(reference, grammar.words_of(text))
            words += len(reference)
    model.train()
    return errors / max(words, 1)


class Trainer:
    """Training of the recognizer, in one or more stretches."""

    def __init__(self, dims: dict[str, int], device: str, seed: int, log: Log, compiled: bool) -> None:
        self.log, self.device = log, device
        self.tokenizer = get_tokenizer(multilingual=False)
        self.used = used_tokens(self.tokenizer).to(device)
        self.column = torch.full((dims["n_vocab"],), -1, device=device)
        self.column[self.used] = torch.arange(len(self.used), device=device)
        self.model = new_model(dims, self.used.cpu(), seed).to(device)
        self.filters = mel_filters(device, 80)
        self.rate = torch.tensor(0.0, device=device)
        self.phone_head = torch.nn.Linear(dims["n_audio_state"], len(PHONES)).to(device)
        self.parameters = [p for p in (*self.model.parameters(), *self.phone_head.parameters()) if p.requires_grad]
        cuda = device != "cpu"
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.0, capturable=cuda, foreach=cuda
        )
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def load(self, path: Path) -> None:
        """Go on from a file of `save_model`."""
        self.model.load_state_dict(torch.load(path, weights_only=True)["model_state_dict"])

    def _step(self, mel: Tensor, tokens: Tensor, phones: Tensor) -> dict[str, Tensor]:
        audio = self.model.encoder(mel.to(self.dtype))
        loss = self.loss(self.model, audio, tokens, self.used, self.column)
        scores = self.phone_head(audio[:, : phones.shape[1]].float())
        phone = functional.cross_entropy(scores.flatten(0, 1), phones.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        (loss + PHONE_WEIGHT * phone).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return {"loss": loss.detach(), "phone": phone.detach(), "norm": norm}

    def train(
        self, batches: Batches, budget: Budget, peak: float, path: Path, check: Speech, refresh: list[Speech]
    ) -> None:
        """Train for a stretch of time; the file is written every half minute or so."""
        step, saved, summed, count = Step(self._step, self.log), budget.since, 0.0, 0
        while not budget.over:
            self.rate.fill_(peak * cosine(budget.fraction))
            wav, tokens, phones = batches.draw()
            out = step(mel=log_mel(wav, self.filters), tokens=tokens.to(self.device), phones=phones)
            budget.steps += 1
            if budget.steps % 20 == 0:
                summed, count = summed + float(out["loss"]), count + 1
            if budget.steps % 200 == 0:
                shown = {name: float(out[name]) for name in ("phone", "norm")}
                self.log("train", step=budget.steps, loss=summed / count, part_done=budget.fraction, **shown)
                summed, count = 0.0, 0
                for source in refresh:
                    if not source.complete:
                        source.refresh()
            if budget.fraction - (saved - budget.since) / max(budget.seconds, 1e-9) > 0.25:
                saved = budget.since + budget.fraction * budget.seconds
                save_model(path, self.model)
                self.log("checked", step=budget.steps, wer=word_error_rate(self.model, check, 100))
        save_model(path, self.model)
        self.log("stretch done", step=budget.steps, wer=word_error_rate(self.model, check, 400))


def to_recognizer(wav: Tensor) -> Tensor:
    """The codec's sound at the recognizer's rate: [B, S'] -> [B, S]."""
    return resample(wav, CODEC_RATE, SAMPLE_RATE)
