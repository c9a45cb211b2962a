"""The texts and voices of the golden prompts; shared by their generator and the test. Non-ASCII text is escaped."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2quant.checkpoint.config import S2Config, TransformerConfig

NUM_CODEBOOKS = 10


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    text: str
    voices: tuple[tuple[str, int, int], ...] = ()  # transcript, seed of the codes, frames
    max_bytes: int = 300


def codes(seed: int, frames: int) -> Tensor:
    """Random codes int64 [N, F]: the semantic row below 4096, the others below 1024."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 1024 if i else 4096, (1, frames), generator=generator) for i in range(NUM_CODEBOOKS)]
    return torch.cat(rows)


def reply_codes(batch: int) -> Tensor:
    """What "the model" says to batch number 0, 1, ... of a text."""
    return codes(1000 + batch, 3 + batch % 4)


def row_checksums(prompt: Tensor) -> list[int]:
    """One number per codebook row of [1+N, T], which depends on each value and its place."""
    places = torch.arange(1, prompt.shape[1] + 1)
    return [int((row * places).sum()) for row in prompt[1:]]


_DIALOGUE = "\n".join(
    f"<|speaker:{i % 3}|>{line}"
    for i, line in enumerate(
        (
            "Who left the gate open?",
            "[laughing] Not me, I was asleep.",
            "It was the wind.",
            "The wind does not lift a latch!",
            "[sigh] Then it was the goat.",
            "We have no goat.",
            "We do now.",
            "Oh no.",
        )
    )
)
_LONG_TURN = "<|speaker:0|>Short.\n<|speaker:1|>" + "A turn that is far longer than a batch may be. " * 9 + "\n"
_LONG_TURN += "<|speaker:0|>Short again.\n<|speaker:1|>And again."

CASES = (
    Case(name="plain", text="The harbour was quiet when the last boat came in."),
    Case(name="one_letter", text="a"),
    Case(
        name="inline_tags", text="[whisper] I know. [pause] But [pitch up] how? [professional broadcast tone]Now this."
    ),
    Case(name="tag_after_speaker", text="<|speaker:0|>[laughing] hi"),
    Case(name="tag_after_space", text="<|speaker:0|> [laughing] hi"),
    Case(name="spaces_untagged", text="  two before, and after \n"),
    Case(name="newlines", text="One line.\n\nAnother,\r\nand\ta tab.\n"),
    Case(name="spaces_tagged", text=" \n <|speaker:0|> \n spaced  out \n\n <|speaker:1|>\tend \n"),
    Case(name="one_voice", text="Hello.", voices=(("Good morning, this is my voice.", 1, 12),)),
    Case(name="one_voice_tagged", text="<|speaker:7|>Hello.", voices=(("<|speaker:7|>Good morning.", 2, 5),)),
    Case(
        name="three_voices",
        text="<|speaker:0|>One.<|speaker:1|>Two.<|speaker:2|>Three.",
        voices=(("First voice.", 3, 4), ("[calm] Second voice.", 4, 6), (" Third voice. ", 5, 1)),
    ),
    Case(
        name="three_voices_some_tagged",
        text="No tag in this text.",
        voices=(("<|speaker:2|>First.", 6, 2), ("Second <|speaker:0|>mixed.", 7, 3), ("Third.", 8, 2)),
    ),
    Case(name="many_turns", text=_DIALOGUE, max_bytes=1000),
    Case(name="few_bytes", text=_DIALOGUE, max_bytes=100, voices=(("A voice.", 9, 7), ("Another.", 10, 7))),
    Case(name="one_byte", text=_DIALOGUE[:120], max_bytes=1),
    Case(name="long_turn", text=_LONG_TURN, max_bytes=200),
    Case(name="long_untagged", text="There is no tag in this text, so it stays whole. " * 20, max_bytes=100),
    Case(name="wide_digits", text="<|speaker:\uff11|>full-width <|speaker:\u0663|>arabic <|speaker:12345|>long"),
    Case(name="bytes_not_characters", text="".join(f"<|speaker:{i}|>" + "\u4f60\u597d" * 8 for i in range(4))),
    Case(name="chinese", text="\u4f60\u597d\uff0c\u4e16\u754c\u3002[\u7b11]\u4eca\u5929\u662f2024\u5e74\u3002"),
    Case(name="japanese", text="\u3053\u3093\u306b\u3061\u306f\u3001\u4e16\u754c\u3002\u30ab\u3099\u30e9\u30b9"),
    Case(name="arabic", text="\u0645\u0631\u062d\u0628\u0627 \u0628\u0643\u0645\u060c \u0643\u064a\u0641\u061f"),
    Case(name="emoji", text="Fine \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \u2764\ufe0f!"),
    Case(name="combining", text="e\u0301 \u00e9 n\u0303 \u1100\u1161\u11a8 \u212b \u0344 q\u0307\u0323"),
    Case(name="odd_blanks", text="a\u00a0b\u200bc\u2028d\u3000e\x0bf\ufeffg"),
    Case(name="almost_control", text="<|im_end |> <|speaker:x|> <|semantic:|> <| |> < |im_end|> <|IM_END|> |>["),
    Case(name="numbers", text="In 1984 it cost $12,345.67 (-8.5%), i.e. 3x too much; don't, we'll, I'M."),
)

# What random texts are made of: words of several scripts, signs, blanks, tags, and things that look like tags.
PIECES = (
    *("the", "Goat", "I'm", "don't", "42", "3.14", "a", "zz", "na\u00efve", "stra\u00dfe", "e\u0301"),
    *(
        "\u4f60\u597d",
        "\u3002",
        "\uff0c",
        "\u3053\u3093",
        "\u0645\u0631\u062d\u0628\u0627",
        "\u061f",
        "\u0e44\u0e17\u0e22",
        "\u0928\u092e",
    ),
    *("\U0001f600", "\u200d", "\ufe0f", "\u00a0", "\u3000", "\u2028", "\u0301", "\x07", "\ufffd", "\ue000"),
    *(" ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", ".", ",", "!", "?", "...", "-", "'", '"', "(", ")"),
    *("[laughing]", "[pitch up]", "[", "]", "<|", "|>", "<", ">", "|", "<|speaker:|>", "<|im_en", "m_end|>"),
)
NUM_RANDOM = 60


def random_text(generator: random.Random, length: int) -> str:
    """Pieces at random, joined without blanks."""
    return "".join(generator.choices(PIECES, k=length))


def random_case(seed: int) -> Case:
    """A random text, tagged two times out of three, with up to three voices."""
    generator = random.Random(seed)
    text = random_text(generator, generator.randint(1, 40)) + "end"
    if seed % 3:
        turns = [f"<|speaker:{generator.randint(0, 4)}|>{random_text(generator, 12)}end" for _ in range(seed % 13 + 1)]
        text = " \n"[: seed % 3] + generator.choice(("", " ", "\n")).join(turns)
    voices = [
        (generator.choice(("", "<|speaker:1|>", " ")) + random_text(generator, 6) + "end", seed * 10 + i, i + 1)
        for i in range(generator.choice((0, 0, 1, 3)))
    ]
    return Case(name=f"random {seed}", text=text, voices=tuple(voices), max_bytes=generator.choice((1, 60, 300)))


def prompts_digest(batches: list[str], ids: list[list[int]], checksums: list[list[int]]) -> str:
    """A short hash of everything a golden case holds."""
    return hashlib.sha256(json.dumps([batches, ids, checksums]).encode("ascii")).hexdigest()[:16]


def make_config(ids: dict[str, int], max_seq_len: int = 32768, codebook_size: int = 4096) -> S2Config:
    """A configuration with token ids as `tiny_token_ids` names them; the other sizes do not matter here."""
    sizes: dict[str, Any] = {"n_head": 1, "n_local_heads": 1, "head_dim": 2, "dim": 2, "intermediate_size": 2}
    sizes |= {"n_layer": 1, "rope_base": 1e6, "norm_eps": 1e-6, "attention_qk_norm": True}
    return S2Config(
        slow=TransformerConfig(vocab_size=ids["vocab_size"], max_seq_len=max_seq_len, **sizes),
        fast=TransformerConfig(vocab_size=codebook_size, max_seq_len=NUM_CODEBOOKS, **sizes),
        num_codebooks=NUM_CODEBOOKS,
        semantic_begin_id=ids["semantic_start_token_id"],
        semantic_end_id=ids["semantic_end_token_id"],
        im_end_id=ids["eos_token_id"],
        pad_id=ids["pad_token_id"],
        raw=ids,
    )


S2_PRO_IDS = {
    "vocab_size": 155776,
    "pad_token_id": 151669,
    "eos_token_id": 151645,
    "audio_pad_token_id": 151677,
    "semantic_start_token_id": 151678,
    "semantic_end_token_id": 155773,
}
