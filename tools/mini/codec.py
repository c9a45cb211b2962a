"""The small codec: the released one's topology, trained on frames of speech with losses on mel bands and harmonics.

Legend: B rows, F frames of 2048 samples at 44.1 kHz, D latent width, d codebook width, N codebooks.

Rows are runs of consecutive utterances. Training begins as a plain autoencoder; then the codebooks are laid out on
the latents it has (principal directions and k-means, stage by stage) and switched in. The classifier reads what the
first codebook keeps, so that this codebook carries the words, which are what the Slow AR has to predict. It reads
directions only, as the search does: reading lengths, it made them grow without end.

Another classifier reads the pitch off the whole latent, harmonics count beside mel bands, and half of the rows are
played faster or slower: without these the codec spoke each voice at one pitch.

Entries are running means of the points that chose them, not learned by gradients: Adam moves an entry by the learning
rate whatever its length, and points of length 14 left entries behind that moved 0.001 a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mini.codec_losses import LowBands, MelLoss, PhoneClassifier, PitchClassifier
from mini.common import FRAME_SIZE, Budget, Log, Speech, Step, cosine, release_memory, save
from s2quant.codec import Codec, CodecConfig, TransformerSize, codec_from_state, random_codec_state, unfold_state

CONFIG = CodecConfig(
    encoder_dim=8,
    encoder_rates=(2, 4, 8, 8),
    encoder_transformers=(None, None, None, TransformerSize(num_layers=1, intermediate_size=384)),
    decoder_dim=256,
    decoder_rates=(8, 8, 4, 2),
    latent_dim=192,
    downsample_factors=(2, 2),
    pre=TransformerSize(num_layers=1, intermediate_size=576),
    post=TransformerSize(num_layers=2, intermediate_size=576),
    codebook_dim=8,
    semantic_size=512,
    num_residual=9,
    residual_size=256,
)
BENT = 0.26  # half of the rows are played faster or slower, by at most exp(0.26): pitches beyond the voices' own
LOW_WEIGHT, PITCH_WEIGHT = 1.0, 1.0
RESTART_EVERY, USAGE_DECAY = 50, 0.98
PHONE_WEIGHT = 4.0
RESTART_SHARE = 1 / 32  # of a codebook's entries, at most, at a time


@torch.no_grad()
def cluster(points: Tensor, count: int, generator: torch.Generator, rounds: int = 12) -> Tensor:
    """k-means by angle: [n, d] -> entries [count, d], as long as their points are on average."""
    directions = functional.normalize(points)
    entries = points[torch.randperm(len(points), generator=generator)[:count].to(points.device)]
    if len(entries) < count:
        entries = entries.repeat(math.ceil(count / len(entries)), 1)[:count] + 0.01 * torch.randn(
            count, points.shape[1], generator=generator
        ).to(points)
    for _ in range(rounds):
        nearest = (directions @ functional.normalize(entries).T).argmax(1)
        sums = torch.zeros_like(entries).index_add_(0, nearest, points)
        sizes = torch.zeros(count, device=points.device).index_add_(0, nearest, torch.ones_like(points[:, 0]))
        entries = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], entries)
    return entries


@torch.no_grad()
def lay_out_codebooks(codec: Codec, latents: Tensor, generator: torch.Generator) -> None:
    """Place every codebook on latents [n, D]: the first where its classifier wants it, the others on what is left."""
    left = latents.clone()
    books = [codec.quantizer.semantic_quantizer.quantizers[0], *codec.quantizer.quantizer.quantizers]
    for number, book in enumerate(books):
        mean = left.mean(0)
        if number:
            _, vectors = torch.linalg.eigh((left - mean).T @ (left - mean) / len(left))
            basis = vectors[:, -book.in_proj.out_channels :].T  # [d, D]
            book.in_proj.weight.copy_(basis[..., None])
            book.in_proj.bias.copy_(-basis @ mean)
        points = functional.conv1d(left.T[None], book.in_proj.weight, book.in_proj.bias)[0].T  # [n, d]
        entries = cluster(points, book.codebook.num_embeddings, generator)
        book.codebook.weight.copy_(entries)
        rows = entries[book.nearest(points.T[None])[0]]
        design = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        ridge = 1e-3 * torch.eye(design.shape[1], device=design.device) * len(design)
        fit = torch.linalg.solve(design.T @ design + ridge * 1e-2, design.T @ left)  # [d + 1, D]
        book.out_proj.weight.copy_(fit[:-1].T[..., None])
        book.out_proj.bias.copy_(fit[-1])
        left = left - design @ fit


class Trainer:
    """Training of the codec."""

    def __init__(
        self, config: CodecConfig, device: str, seed: int, log: Log, compiled: bool, rows: int, row_frames: int
    ) -> None:
        torch.manual_seed(seed)
        self.device, self.log, self.rows, self.row_frames = device, log, rows, row_frames
        self.codec = codec_from_state(random_codec_state(config, seed)).to(device).train()
        self.mel, self.low = MelLoss().to(device), LowBands().to(device)
        self.phones = PhoneClassifier(config.codebook_dim).to(device)
        self.pitch = PitchClassifier(config.latent_dim).to(device)
        self.codec.requires_grad_(True)
        quantizer = self.codec.quantizer
        self.books = [quantizer.semantic_quantizer.quantizers[0], *quantizer.quantizer.quantizers]
        for book in self.books:
            book.codebook.weight.requires_grad_(False)
        learning = (self.codec, self.phones, self.pitch)
        self.parameters = [p for module in learning for p in module.parameters() if p.requires_grad]
        self.rate = torch.tensor(0.0, device=device)
        cuda = device != "cpu"
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.rate, betas=(0.8, 0.99), weight_decay=1e-4, capturable=cuda, foreach=cuda
        )
        self.usage = torch.ones(config.num_codebooks, max(config.codebook_sizes), device=device)
        self.sums = torch.zeros(*self.usage.shape, config.codebook_dim, device=device)  # of the points behind `usage`
        self.generator = torch.Generator().manual_seed(seed)
        self.random = np.random.default_rng(seed)

        def wrap(function: object) -> object:
            return torch.compile(function, dynamic=False) if compiled else function

        self.encode, self.decode = wrap(self.codec.encode_latent), wrap(self.codec.decode_latent)
        self.quantize = wrap(self.codec.quantize)

    # ---- one step ----------------------------------------------------------------------------------------------

    def _update(self, loss: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        return norm

    def _sound(self, latent: Tensor, wav: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What is lost of the sound wav [B, 1, S] in latent [B, D, F]: the sum to minimise, and its parts."""
        heard, target = self.decode(latent)[:, 0].float(), wav[:, 0]
        parts = {"mel": self.mel(heard, target), "low": self.low(heard, target), "pitch": self.pitch(latent, wav)}
        total = 15 * (parts["mel"] + LOW_WEIGHT * parts["low"]) + PITCH_WEIGHT * parts["pitch"]
        return total, {name: value.detach() for name, value in parts.items()}

    def plain_step(self, wav: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Without quantizing: wav [B, 1, S], labels int64 [B, F, 4]."""
        latent = self.encode(wav)
        lost, parts = self._sound(latent, wav)
        book = self.codec.quantizer.semantic_quantizer.quantizers[0]
        phone, accuracy = self.phones(book.in_proj(latent), labels)
        norm = self._update(lost + PHONE_WEIGHT * phone)
        return parts | {"phone": phone.detach(), "accuracy": accuracy, "norm": norm, "latent": latent.detach()}

    def step(self, wav: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """With codebooks: wav [B, 1, S], labels int64 [B, F, 4]."""
        q = self.quantize(self.encode(wav))
        lost, parts = self._sound(q.latent, wav)
        point = q.projected[:, 0] + (q.rows[:, 0] - q.projected[:, 0]).detach()
        phone, accuracy = self.phones(point, labels)
        scale = q.rows.detach().square().mean(dim=(0, 2, 3), keepdim=True) + 1e-6  # each codebook counts the same
        commitment = ((q.rows.detach() - q.projected).square() / scale).mean()
        norm = self._update(lost + PHONE_WEIGHT * phone + 0.5 * commitment)
        self.follow(q.codes, q.projected.detach())
        return parts | {
            "phone": phone.detach(), "accuracy": accuracy, "norm": norm, "commitment": commitment.detach(),
            "length": scale.max().sqrt(), "projected": q.projected.detach(),
        }  # fmt: skip

    @torch.no_grad()
    def follow(self, codes: Tensor, projected: Tensor) -> None:
        """Move every entry to the running mean of the points [B, N, d, F] whose codes [B, N, F] name it."""
        index = codes.transpose(0, 1).flatten(1)  # [N, B * F]
        points = projected.permute(1, 0, 3, 2).flatten(1, 2)  # [N, B * F, d]
        counts = torch.zeros_like(self.usage).scatter_add_(1, index, torch.ones_like(points[..., 0]))
        sums = torch.zeros_like(self.sums).scatter_add_(1, index[..., None].expand_as(points), points)
        self.usage.mul_(USAGE_DECAY).add_(counts, alpha=1 - USAGE_DECAY)
        self.sums.mul_(USAGE_DECAY).add_(sums, alpha=1 - USAGE_DECAY)
        for number, book in enumerate(self.books):
            size = book.codebook.num_embeddings
            usage = self.usage[number, :size, None]
            mean = self.sums[number, :size] / usage.clamp(min=1e-6)
            book.codebook.weight.copy_(torch.where(usage > 1e-3, mean, book.codebook.weight))

    @torch.no_grad()
    def settle(self) -> None:
        """Begin the running means at the entries as they are, each as if chosen once a step."""
        self.usage.fill_(1.0)
        for number, book in enumerate(self.books):
            self.sums[number, : book.codebook.num_embeddings] = book.codebook.weight

    @torch.no_grad()
    def restart_unused(self, projected: Tensor) -> int:
        """Move entries that nothing chooses onto points [B, N, d, F] of the last step; gives how many moved.

        Not those of the first codebook: with all of its entries in use, what tells most of them apart is the noise of
        the synthesizer's vocoder, which nobody can predict from a text.
        """
        moved = 0
        for number, book in enumerate(self.books):
            if number == 0:
                continue
            size = book.codebook.num_embeddings
            usage = self.usage[number, :size]
            most = max(1, int(size * RESTART_SHARE))
            unused = usage.argsort()[:most]
            unused = unused[usage[unused] < 0.03 * usage.mean()]
            if len(unused) == 0:
                continue
            points = projected[:, number].transpose(1, 2).flatten(0, 1)
            chosen = torch.from_numpy(self.random.integers(0, len(points), len(unused))).to(points.device)
            book.codebook.weight[unused] = points[chosen]
            self.usage[number, unused] = usage.mean()
            self.sums[number, unused] = points[chosen] * usage.mean()
            moved += len(unused)
        return moved

    # ---- the whole ---------------------------------------------------------------------------------------------

    def draw(self, sound: Tensor, labels: Tensor, starts: np.ndarray) -> dict[str, Tensor]:
        """Rows that begin at random utterances, from sound int16 [all F, 2048] and labels uint8 [all F, 4]."""
        starts = starts[starts <= len(sound) - math.ceil(self.row_frames * math.exp(BENT)) - 1]
        first = torch.from_numpy(self.random.choice(starts, self.rows)).to(self.device)[:, None]
        speeds = np.exp(self.random.uniform(-BENT, BENT, self.rows) * (self.random.random(self.rows) < 0.5))
        speed = torch.from_numpy(speeds).to(self.device)[:, None]
        place = torch.arange(self.row_frames * FRAME_SIZE, device=self.device) * speed
        before = place.long()
        flat, at = sound.flatten(), first * FRAME_SIZE + before
        wav = torch.lerp(flat[at].float(), flat[at + 1].float(), (place - before).float()) / 32768
        quarters = torch.arange(self.row_frames * labels.shape[1], device=self.device) + 0.5
        heard = labels.flatten()[first * labels.shape[1] + (quarters * speed).long()].long()
        return {"wav": wav[:, None], "labels": heard.view(self.rows, self.row_frames, -1)}

    def give_up_compiling(self) -> None:
        """Use the functions as they are."""
        self.encode, self.decode = self.codec.encode_latent, self.codec.decode_latent
        self.quantize = self.codec.quantize

    def warm_up(self) -> None:
        """Compile both kinds of step; nothing is learned."""
        size = self.rows, 1, self.row_frames * FRAME_SIZE
        wav = torch.randn(size, device=self.device) * 0.05
        labels = torch.zeros(self.rows, self.row_frames, 4, dtype=torch.int64, device=self.device)
        self.plain_step(wav, labels)  # the rate is 0
        self.step(wav, labels)
        self.optimizer.state.clear()

    def train(self, speech: Speech, budget: Budget, peak: float, path: Path, plain: float = 0.1) -> None:
        """Train; `plain` is the share of the time before the codebooks are switched in."""
        sound, loaded = speech.framed(0), len(speech.rows)
        labels, starts = speech.phones.to(self.device), speech.frame_starts
        latents: list[Tensor] = []
        step, quantized, restarts = Step(self.plain_step, self.log), False, 0
        saved = 0.0
        while not budget.over:
            if not quantized and budget.fraction > plain and len(latents) >= 8:
                points = torch.cat(latents[-32:]).transpose(1, 2).flatten(0, 1).float()
                lay_out_codebooks(self.codec, points, self.generator)
                self.settle()
                step, quantized = Step(self.step, self.log), True
                self.log("codebooks laid out", step=budget.steps, points=len(points))
            self.rate.fill_(peak * cosine(budget.fraction))
            out = step(**self.draw(sound, labels, starts))
            budget.steps += 1
            if not quantized and budget.steps % 4 == 0:
                latents.append(out["latent"].clone())
                latents = latents[-32:]
            if quantized and budget.steps % RESTART_EVERY == 0 and budget.fraction < 0.7:
                restarts += self.restart_unused(out["projected"])
            if budget.steps % 100 == 0:
                shown = {
                    name: float(out[name])
                    for name in ("mel", "low", "pitch", "phone", "accuracy", "norm", "length")
                    if name in out
                }
                self.log(
                    "train",
                    step=budget.steps,
                    quantized=quantized,
                    restarts=restarts,
                    part_done=budget.fraction,
                    **shown,
                )
                if not speech.complete and speech.refresh():
                    sound = torch.cat([sound, speech.framed(loaded)])
                    release_memory()
                    loaded, labels, starts = len(speech.rows), speech.phones.to(self.device), speech.frame_starts
            if quantized and budget.fraction > saved + 0.2:
                saved = budget.fraction
                self.save(path)
        self.round_weights()
        self.save(path)

    def round_weights(self) -> None:
        """Round to what the file holds, so that all that follows is made by the codec that is shipped."""
        with torch.no_grad():
            for p in self.codec.parameters():
                p.copy_(p.half().float())

    def save(self, path: Path) -> None:
        """Write codec.pth in 16 bit."""
        state = {key: value.half().cpu().clone() for key, value in unfold_state(self.codec.state_dict()).items()}
        save(path, state)


@torch.no_grad()
def encode_all(codec: Codec, speech: Speech, batch_frames: int | None = None) -> Tensor:
    """Encode every utterance on its own, as a reference recording would be: int16 [N, all F], on the host."""
    batch_frames = batch_frames or (24576 if codec.device.type == "cuda" else 256)  # caches of a CPU are small
    codes = torch.zeros(codec.num_codebooks, int(speech.frames.sum()), dtype=torch.int16)
    order, starts = np.argsort(speech.frames, kind="stable"), speech.frame_starts
    sound = speech.framed(0)
    first = 0
    while first < len(order):
        count = max(1, batch_frames // int(speech.frames[order[min(first + 400, len(order) - 1)]]))
        chosen = order[first : first + count]
        longest = int(speech.frames[chosen].max())
        index = torch.from_numpy(starts[chosen]).to(sound.device)[:, None] + torch.arange(longest, device=sound.device)
        inside = torch.arange(longest)[None] < torch.from_numpy(speech.frames[chosen])[:, None]
        wav = sound[index.clamp(max=len(sound) - 1)].float() / 32768 * inside.to(sound.device)[..., None]
        found = codec.quantize(codec.encode_latent(wav.flatten(1)[:, None])).codes.short().cpu()  # [B, N, F]
        places = torch.from_numpy(starts[chosen])[:, None] + torch.arange(longest)
        codes[:, places[inside]] = found.transpose(1, 2)[inside].T
        first += count
    return codes


def save_codes(path: Path, codes: dict[str, Tensor], stores: dict[str, Speech]) -> None:
    """Write codes by split, and how many frames each utterance has, by which a reader knows that they are its own."""
    frames = {f"{split} frames": torch.from_numpy(store.frames) for split, store in stores.items()}
    save(path, codes | frames)


def load_codes(path: Path, **stores: Speech) -> dict[str, Tensor]:
    """Read the codes of some splits; they belong to the utterances in the order in which `stores` have them."""
    saved = torch.load(path, weights_only=True)
    for split, store in stores.items():
        assert np.array_equal(saved[f"{split} frames"].numpy(), store.frames), f"codes of other speech: {split}"
    return {split: saved[split] for split in stores}


@torch.no_grad()
def round_trip(codec: Codec, codes: Tensor, speech: Speech, indices: Sequence[int], batch: int = 32) -> list[Tensor]:
    """Decode utterances from their codes [N, all F]: float [S] each, at the codec's rate, on the device."""
    starts, sounds = speech.frame_starts, []
    for first in range(0, len(indices), batch):
        chosen = indices[first : first + batch]
        longest = max(int(speech.frames[i]) for i in chosen)
        block = torch.zeros(len(chosen), codec.num_codebooks, longest, dtype=torch.int64)
        for row, i in zip(block, chosen, strict=True):
            row[:, : speech.frames[i]] = codes[:, starts[i] : starts[i] + speech.frames[i]].long()
        wav = codec.decode(block.to(codec.device))
        sounds += [w[0, : int(speech.frames[i]) * FRAME_SIZE] for w, i in zip(wav, chosen, strict=True)]
    return sounds


def entropies(codes: Tensor) -> list[float]:
    """Bits per codebook of codes [N, F] taken one by one."""
    bits = []
    for row in codes.long():
        share = torch.bincount(row).double() / len(row)
        bits.append(float(-(share[share > 0] * share[share > 0].log2()).sum()))
    return bits
