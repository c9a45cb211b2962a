"""A small real tokenizer for random and test checkpoints: byte-level BPE over our own sentences.

It has the structure of Qwen's (NFC, the same splitting of words, 256 byte tokens first, special tokens after the
base), so any text round-trips and the reference's own code loads it. Its merges are not Qwen's: where a
configuration asks for more base tokens than were trained, the rest are fillers that no text produces. With the ids
of the real checkpoint the words of the template ("system", "user", "assistant") have Qwen's ids too.

Source of the splitting pattern: https://huggingface.co/Qwen/Qwen3-4B/blob/main/tokenizer.json
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

from tokenizers import Regex, pre_tokenizers

from s2quant.checkpoint.config import S2Config
from s2quant.prompt.tokens import IM_END, PAD, REQUIRED_TOKENS, TokenLayout, semantic_token

# Contractions; a word with one sign before it; one digit; signs with the line ends after them; line ends; blanks.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TINY_NUM_BASE = 500
MAX_MERGES = 400
# Where Qwen3's base has the words of the template; used when a configuration has a base of its size.
_QWEN_NUM_BASE = 151643
_QWEN_WORD_IDS = {"user": 872, "system": 8948, "assistant": 77091}

_TEMPLATE = """\
system
user
assistant
convert the provided text to speech reference to the following:

Text:
<|speaker:0|>Good morning.
<|speaker:1|>[laughing] Good morning to you.

Speech:
"""
_SENTENCES = """\
The train to the coast leaves at nine, and there is no other before noon.
She said that the bread was still warm when they opened the door.
[whisper] Do not wake the others, they walked all night.
Who put the blue cup on top of the piano?
It's raining again, so we'll stay here and read to each other.
<|speaker:0|>[excited] We won, can you believe that?
<|speaker:1|>[sigh] You have told me that three times already.
There are 12 apples, 30 pears and 4567 plums in the cellar.
I don't think they're coming; the road over the hill is closed.
"Thank you," he said, "that is more than I had hoped for."
Nothing in this house works the way that it should, but we love it.
[professional broadcast tone] And now the weather for the weekend.
The old man was counting the ships that were going out with the tide.
We heard a bell, then another, then the sound of running water.
Could you please speak a little more slowly? [pause] Thank you.
"""


def tiny_token_ids(num_semantic: int = 4096) -> dict[str, int]:
    """Give the ids that the config.json of a tiny checkpoint must have for `tiny_tokenizer`.

    Args:
        num_semantic: Semantic tokens.

    Returns:
        `vocab_size` (of text_config, rounded up to 64, at least one unused row) and the ids at the top of config.json.
    """
    layout = TokenLayout(num_base=TINY_NUM_BASE, num_reserved=0, num_semantic=num_semantic)
    return {
        "vocab_size": (layout.num_tokens // 64 + 1) * 64,
        "pad_token_id": layout.pad_id,
        "eos_token_id": layout.im_end_id,
        "audio_pad_token_id": layout.semantic_begin_id - 1,
        "semantic_start_token_id": layout.semantic_begin_id,
        "semantic_end_token_id": layout.num_tokens - 1,
    }


def tiny_tokenizer(num_semantic: int = 4096) -> dict[str, bytes]:
    """Make the tokenizer files of a tiny checkpoint.

    Args:
        num_semantic: Semantic tokens.

    Returns:
        File name -> content; the same bytes on every call.
    """
    return _files(TokenLayout(num_base=TINY_NUM_BASE, num_reserved=0, num_semantic=num_semantic), 8192)


def synthetic_tokenizer(config: S2Config) -> dict[str, bytes]:
    """Make tokenizer files with the ids of a configuration, whatever its size.

    Args:
        config: The configuration of a checkpoint.

    Returns:
        File name -> content; the same bytes on every call.

    Raises:
        UserError: The ids are not in the layout of S2 Pro.
    """
    return _files(TokenLayout.of(config), config.slow.max_seq_len)


def _files(layout: TokenLayout, max_length: int) -> dict[str, bytes]:
    special = layout.special_ids()
    semantic = [semantic_token(code) for code in range(layout.num_semantic)]
    roles = {"eos_token": IM_END, "pad_token": PAD, "additional_special_tokens": [*REQUIRED_TOKENS, *semantic]}
    settings = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": max_length,
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
    }
    contents: dict[str, Any] = {
        "tokenizer.json": _tokenizer_json(layout, special),
        "tokenizer_config.json": settings,
        "special_tokens_map.json": roles,
    }
    files = {name: (json.dumps(data) + "\n").encode("ascii") for name, data in contents.items()}
    return files | {"chat_template.jinja": _CHAT_TEMPLATE.encode("ascii")}


# Text only; a prompt with codes cannot be written as text and is built by s2quant.prompt.build.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
<|voice|>
{%- endif -%}
"""


def _tokenizer_json(layout: TokenLayout, special: dict[str, int]) -> dict[str, Any]:
    tokens, merges = _base(layout.num_base)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": WORD_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **flags} for name, number in special.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _base(num_base: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Lay out the base tokens by id: bytes, trained tokens, fillers; and the merges that lead to the trained ones."""
    alphabet = _byte_alphabet()
    merges = _train()[: num_base - len(alphabet)]
    trained = list(dict.fromkeys(left + right for left, right in merges))
    fixed = _QWEN_WORD_IDS if num_base == _QWEN_NUM_BASE else {}
    assert set(fixed) <= set(trained)
    rest = iter([token for token in trained if token not in fixed])
    by_id = {number: token for token, number in fixed.items()}
    tokens = alphabet + [
        by_id.get(number) or next(rest, None) or f"<filler-{number}>" for number in range(len(alphabet), num_base)
    ]
    return tokens, merges


def _byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes, in the order of their ids: printable bytes first, as in GPT-2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


@cache
def _train() -> list[tuple[str, str]]:
    """Learn merges from the sentences above: the most frequent pair first, ties by the characters."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words: Counter[tuple[str, ...]] = Counter()
    for text, weight in ((_TEMPLATE, 50), (_SENTENCES, 1)):
        for word, _ in split.pre_tokenize_str(text):
            words[tuple(word)] += weight
    merges: list[tuple[str, str]] = []
    while len(merges) < MAX_MERGES:
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, count in words.items():
            for pair in pairwise(parts):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({_merge(parts, best): count for parts, count in words.items()})
    return merges


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    i = 0
    while i < len(parts):
        if parts[i : i + 2] == pair:
            merged.append(parts[i] + parts[i + 1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return tuple(merged)
