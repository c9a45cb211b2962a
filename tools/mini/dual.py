"""The small Dual-AR: sizes, optimizer, training on packed rows, and the files of the checkpoint.

Legend: B rows, T positions, N codebooks, D width, G chosen targets, V tokens, C codes.

The model is `s2quant.model.DualAR`; only attention gets a mask, so that a row can hold several conversations. At
every chosen target the Slow AR is scored on the token (over its whole vocabulary), and at every frame the Fast AR on
the nine residual codes. Some of the frames that the Slow AR reads are replaced by others, in some rows many: what it
says next has to come from the text. Without that it learned runs of codes by heart (training accuracy 0.87, held out
0.48) and spoke legal sentences with other words. For the same reason a linear layer, which is not kept, reads the
phonemes of this frame and of a later one off its hidden vector: a code of flite's voices is a noisy label, since their
vocoder is (other noise in it changes 26 % of the semantic codes), a phoneme is not.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mini.common import Budget, Log, Step, cosine
from mini.prompts import AHEAD
from mini.speech import PHONES, SUBFRAMES
from mini.tokenizer import layout, write_tokenizer
from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.writer import ShardWriter
from s2quant.export.random import s2_pro_config
from s2quant.files import write_json
from s2quant.model import DualAR, disk_name
from s2quant.runtime.load import load_model

SHARD_BYTES = 10_000_000
LENGTH = 512  # positions of a training row
WRONG_FRAMES = (0.03, 0.35)  # share replaced, in half of the rows each
PHONE_WEIGHT = 1.0
EASY_UNTIL = 0.35  # share of the time in which only conversations of one turn are read


def config_json(
    num_semantic: int = 512,
    dim: int = 256,
    slow_layers: int = 6,
    fast_layers: int = 3,
    slow_ffn: int = 768,
    fast_ffn: int = 512,
) -> dict[str, Any]:
    """config.json of s2-mini: the real one's fields with small numbers."""
    config = copy.deepcopy(s2_pro_config())
    ids = layout(num_semantic)
    sizes = {"dim": dim, "head_dim": 64, "n_head": dim // 64, "n_local_heads": max(1, dim // 128)}
    vocab_size = (ids.num_tokens // 64 + 1) * 64
    config["text_config"] |= sizes | {
        "n_layer": slow_layers, "intermediate_size": slow_ffn, "max_seq_len": 2048, "vocab_size": vocab_size
    }  # fmt: skip
    config["audio_decoder_config"] |= sizes | {
        "n_layer": fast_layers, "intermediate_size": fast_ffn, "text_dim": dim, "vocab_size": num_semantic
    }  # fmt: skip
    return config | {
        "pad_token_id": ids.pad_id,
        "eos_token_id": ids.im_end_id,
        "audio_pad_token_id": ids.semantic_begin_id - 1,
        "semantic_start_token_id": ids.semantic_begin_id,
        "semantic_end_token_id": ids.num_tokens - 1,
    }


def initialise(model: DualAR, seed: int) -> None:
    """Small embeddings, linears that keep the size of what they read, branches that start at nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2:
                continue
            if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")):
                p.zero_()
                continue
            scale = 0.02 if name.endswith(("embeddings.weight", "fast.output.weight")) else p.shape[1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)


class Muon:
    """Momentum whose update of a matrix is made orthogonal by five Newton-Schulz steps; same shapes go together.

    Source: https://kellerjordan.github.io/posts/muon/
    """

    def __init__(
        self, parameters: list[nn.Parameter], rate: Tensor, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        self.rate, self.momentum, self.decay = rate, momentum, decay
        shapes = dict.fromkeys(p.shape for p in parameters)
        self.groups = [[p for p in parameters if p.shape == shape] for shape in shapes]
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    @torch.no_grad()
    def step(self) -> None:
        """Update all matrices from their gradients."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([p.grad for p in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            x = gradient.lerp(buffer, self.momentum).to(torch.bfloat16)
            wide = x.shape[1] > x.shape[2]
            x = x.mT if wide else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = (x.mT if wide else x).float() * max(1.0, group[0].shape[0] / group[0].shape[1]) ** 0.5
            for p, update in zip(group, x, strict=True):
                p.mul_(1 - self.rate * self.decay).sub_(self.rate * update)


def masked_attention(allowed: Tensor) -> Any:
    """Attention in which each query sees only what is allowed: bool [B, 1, T, T]."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        y = functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed)
        return y.transpose(1, 2)

    return attend


class Losses(nn.Module):
    """The model with its losses."""

    def __init__(self, model: DualAR, table: Tensor, fast_every: int = 1) -> None:
        super().__init__()
        self.model, self.table, self.fast_every = model, table, fast_every
        self.phone_head = nn.Linear(model.config.slow.dim, len(AHEAD) * SUBFRAMES * len(PHONES)).to(table.device)
        nn.init.normal_(self.phone_head.weight, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        heard: Tensor,
        document: Tensor,
        position: Tensor,
        chosen: Tensor,
        counts: Tensor,
        phones: Tensor,
    ) -> dict[str, Tensor]:
        """Score the chosen targets.

        tokens int64 [B, 1+N, T] what is right; heard: what the Slow AR reads; document, position int64 [B, T];
        chosen int64 [G] flat places b * T + t with t >= 1; counts float [G] 1 where a place counts; phones int64
        [G, H] of the chosen places.
        """
        slow, fast, config = self.model.slow, self.model.fast, self.model.config
        same = document[:, :, None] == document[:, None, :]
        allowed = (same & torch.ones_like(same[0]).tril())[:, None]
        attends = [masked_attention(allowed)] * len(slow.layers)
        hidden = slow.norm(slow.blocks(slow.embed(heard), self.table[position], attends))
        before = hidden.flatten(0, 1)[chosen - 1]  # [G, D]
        right = tokens.transpose(1, 2).flatten(0, 1)[chosen]  # [G, 1 + N]
        scores = slow.head(before).float()
        slow_loss = functional.cross_entropy(scores, right[:, 0], reduction="none")
        some = slice(None, None, self.fast_every)
        is_frame = ((right[:, 0] != config.im_end_id).float() * counts)[some]
        logits = fast(before[some], right[some, 1:])[:, 1:].float()  # [G', N - 1, C]
        fast_loss = functional.cross_entropy(logits.flatten(0, 1), right[some, 2:].flatten(), reduction="none")
        fast_loss = fast_loss.view(len(is_frame), -1).mean(1)
        hit = (scores.detach().argmax(-1) == right[:, 0]).float()
        spoken = self.phone_head(before).float().view(-1, len(PHONES))
        phone_loss = functional.cross_entropy(spoken, phones.flatten(), reduction="none").view(len(right), -1).mean(1)
        total, frames = counts.sum().clamp(min=1), is_frame.sum().clamp(min=1)
        return {
            "semantic": (slow_loss * counts).sum() / total,
            "residual": (fast_loss * is_frame).sum() / frames,
            "phone": (phone_loss * counts).sum() / total,
            "accuracy": (hit * counts).sum() / total,
        }


class Rows:
    """Packed rows on the device, growing as chunks appear."""

    def __init__(self, folder: Path, device: str, validation: bool = False) -> None:
        self.folder, self.device, self.validation = folder, device, validation
        self.seen: set[str] = set()
        self.tokens: list[Tensor] = []
        self.document: list[Tensor] = []
        self.target: list[Tensor] = []
        self.phones: list[Tensor] = []
        self.easy: list[bool] = []

    def refresh(self) -> int:
        """Load chunks that have appeared; gives how many rows there are."""
        for path in sorted(self.folder.glob("rows-[0-9][0-9][0-9].npz")):
            if path.name in self.seen or (path.name == "rows-000.npz") != self.validation:
                continue
            with np.load(path) as data:
                self.tokens.append(torch.from_numpy(data["tokens"]).to(self.device))
                self.document.append(torch.from_numpy(data["document"]).to(self.device))
                self.target.append(torch.from_numpy(data["target"]).to(self.device))
                self.phones.append(torch.from_numpy(data["phones"]).to(self.device))
                self.easy.append(bool(data["easy"]) if "easy" in data else False)
            self.seen.add(path.name)
        return sum(len(chunk) for chunk in self.tokens)

    def draw(
        self,
        batch: int,
        num_targets: int,
        config: S2Config,
        generator: torch.Generator,
        wrong: tuple[float, ...],
        easy: bool = False,
    ) -> dict[str, Tensor]:
        """One batch, drawn on the device from one chunk; each row gets one of the shares `wrong` of replaced frames.

        With `easy` from a chunk of conversations of one turn, if there is one already.
        """
        chunks = [number for number, is_easy in enumerate(self.easy) if is_easy or not easy] or [*range(len(self.easy))]
        chunk = chunks[int(torch.randint(len(chunks), (1,)))]
        index = torch.randint(len(self.tokens[chunk]), (batch,), device=self.device, generator=generator)
        tokens, document = self.tokens[chunk][index].long(), self.document[chunk][index].long()
        target = self.target[chunk][index]
        length = tokens.shape[2]
        place = torch.arange(length, device=self.device)
        first = torch.cat(
            [torch.ones_like(document[:, :1], dtype=torch.bool), document[:, 1:] != document[:, :-1]], dim=1
        )
        position = place - torch.where(first, place, 0).cummax(dim=1).values
        key = torch.rand(target.shape, device=self.device, generator=generator) * target
        best, chosen = key.flatten().topk(min(num_targets, key.numel() - 1))
        heard = tokens
        if any(wrong):
            shares = torch.tensor(wrong, device=self.device)
            share = shares[torch.randint(len(wrong), (batch, 1, 1), device=self.device, generator=generator)]
            frames = (tokens[:, :1] >= config.semantic_begin_id) & (tokens[:, :1] <= config.semantic_end_id)
            other = tokens.roll(7, dims=2).roll(1, dims=0)
            swap = frames & (other[:, :1] >= config.semantic_begin_id) & (other[:, :1] <= config.semantic_end_id)
            swap &= torch.rand(swap.shape, device=self.device, generator=generator) < share
            heard = torch.where(swap, other, tokens)
        return {
            "tokens": tokens, "heard": heard, "document": document, "position": position,
            "chosen": chosen.clamp(min=1), "counts": (best > 0).float(),
            "phones": self.phones[chunk][index].flatten(0, 1)[chosen.clamp(min=1)].long(),
        }  # fmt: skip


class Trainer:
    """Training of the Dual-AR."""

    def __init__(
        self,
        raw: dict[str, Any],
        device: str,
        seed: int,
        log: Log,
        compiled: bool,
        batch: int,
        num_targets: int,
        fast_every: int = 1,
    ) -> None:
        self.raw, self.config, self.log = raw, S2Config.from_json(raw), log
        self.device = torch.zeros((), device=device).device  # with its number: what is kept per device is found again
        self.batch, self.num_targets = batch, num_targets
        self.model = DualAR(self.config)
        initialise(self.model, seed)
        self.model.to(device)
        table = self.model.slow.rotary.table(LENGTH, self.device).clone()
        self.model.fast.rotary.table(self.config.num_codebooks, self.device)
        losses = Losses(self.model, table, fast_every)
        self.plain_losses = losses  # for checks: compiling them without gradients would cost half a minute
        self.losses = torch.compile(losses, dynamic=False) if compiled else losses
        quick = self.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=quick, cache_enabled=False)
        named = [(name, p) for name, p in self.model.named_parameters()]
        matrices = [p for name, p in named if ".layers." in name and p.ndim == 2]
        others = [p for name, p in named if not (".layers." in name and p.ndim == 2)]
        others += losses.phone_head.parameters()
        self.rate, self.muon_rate = torch.tensor(0.0, device=device), torch.tensor(0.0, device=device)
        self.muon = Muon(matrices, self.muon_rate)
        cuda = device != "cpu"
        self.adam = torch.optim.AdamW(
            others, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.01, capturable=cuda, foreach=cuda
        )
        self.parameters = [*(p for _, p in named), *losses.phone_head.parameters()]
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def give_up_compiling(self) -> None:
        """Use the model as it is."""
        self.losses = self.plain_losses

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint of `write_model`."""
        self.model.load_state_dict(load_model(folder, self.device, torch.float32).state_dict())

    def _step(self, **batch: Tensor) -> dict[str, Tensor]:
        for p in self.parameters:
            p.grad = None
        with self.autocast:
            found = self.losses(**batch)
        (found["semantic"] + found["residual"] + PHONE_WEIGHT * found["phone"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.muon.step()
        self.adam.step()
        return {name: value.detach() for name, value in found.items()} | {"norm": norm}

    def warm_up(self) -> None:
        """Compile on made-up rows, before there are real ones; nothing is learned from them."""
        tokens = torch.full((self.batch, 1 + self.config.num_codebooks, LENGTH), 1, device=self.device)
        tokens[:, 0] = self.config.semantic_begin_id
        document = torch.zeros(self.batch, LENGTH, dtype=torch.int64, device=self.device)
        chosen = torch.arange(1, 1 + self.num_targets, device=self.device)
        batch = {
            "tokens": tokens, "heard": tokens, "document": document, "chosen": chosen,
            "position": torch.arange(LENGTH, device=self.device).expand(self.batch, -1).contiguous(),
            "counts": torch.ones(self.num_targets, device=self.device),
            "phones": torch.zeros(self.num_targets, len(AHEAD) * SUBFRAMES, dtype=torch.int64, device=self.device),
        }  # fmt: skip
        for _ in range(2):  # both rates are 0; a second call shows that nothing is compiled again
            self._step(**batch)
        self.adam.state.clear()
        for buffer in self.muon.buffers:
            buffer.zero_()

    def draw(self, rows: Rows, wrong: tuple[float, ...] = WRONG_FRAMES, easy: bool = False) -> dict[str, Tensor]:
        """One batch of the sizes trained with."""
        return rows.draw(self.batch, self.num_targets, self.config, self.generator, wrong, easy)

    def train(
        self,
        rows: Rows,
        check: Rows,
        budget: Budget,
        muon_rate: float,
        adam_rate: float,
        save: Any,
        easy_until: float = EASY_UNTIL,
    ) -> None:
        """Train for a stretch of time; `save()` is called now and then, and at the end."""
        step, saved, best = Step(self._step, self.log), 0.0, math.inf
        while not budget.over:
            factor = cosine(budget.fraction)
            self.rate.fill_(adam_rate * factor)
            self.muon_rate.fill_(muon_rate * factor)
            out = step(**self.draw(rows, easy=budget.fraction < easy_until))
            budget.steps += 1
            if budget.steps % 200 == 0:
                self.log("train", step=budget.steps, part_done=budget.fraction, **{k: float(v) for k, v in out.items()})
                rows.refresh()
            if budget.fraction > saved + 0.2 and budget.fraction < 0.95:
                saved = budget.fraction
                best = self._keep_better(check, best, save, budget.steps)
        self._keep_better(check, best, save, budget.steps)

    def _keep_better(self, check: Rows, best: float, save: Any, step: int) -> float:
        """Save if the held-out losses have fallen; gives the lowest sum so far."""
        found = self.check(check)
        loss = found["held_out_semantic"] + found["held_out_residual"]
        self.log("checked", step=step, saved=loss < best, **found)
        if loss < best:
            save()
        return min(loss, best)

    @torch.no_grad()
    def check(self, rows: Rows, count: int = 8) -> dict[str, float]:
        """Losses on rows of the validation split."""
        rows.refresh()
        sums: dict[str, float] = {}
        for _ in range(count):
            with self.autocast:
                found = self.plain_losses(**self.draw(rows, wrong=(0.0,)))
            for name, value in found.items():
                sums[f"held_out_{name}"] = sums.get(f"held_out_{name}", 0.0) + float(value) / count
        return sums


def write_model(folder: Path, raw: dict[str, Any], model: DualAR) -> None:
    """Write the checkpoint's shards, index, config and tokenizer (codec.pth is the codec's)."""
    write_json(folder / "config.json", raw)
    write_tokenizer(folder, raw["audio_decoder_config"]["vocab_size"])
    writer = ShardWriter(folder, SHARD_BYTES)
    for name, tensor in model.state_dict().items():
        writer.add(disk_name(name), tensor.to(torch.bfloat16))
    writer.finish()


def num_parameters(model: nn.Module) -> int:
    """Count them."""
    return sum(math.prod(p.shape) for p in model.parameters())
