"""The tokenizer of s2-mini: the family's special tokens and ids, byte-level BPE with merges learned on the grammar."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from mini import grammar
from s2quant.prompt import tiny_tokenizer
from s2quant.prompt.tokens import TokenLayout

NUM_BASE = 1216
_TEMPLATE = """\
system
user
assistant
convert the provided text to speech reference to the following:

Text:
<|speaker:0|>We <|speaker:1|>We <|speaker:2|>We <|speaker:3|>We
<|speaker:0|>[slow] We [pause] went.
[fast] We [high] went. [slow] [low] We went. [high] We [low] went.

Speech:
"""


def layout(num_semantic: int) -> TokenLayout:
    """Where the ids lie."""
    return TokenLayout(num_base=NUM_BASE, num_reserved=0, num_semantic=num_semantic)


def write_tokenizer(folder: Path, num_semantic: int) -> None:
    """Write the tokenizer's files: those of a tiny checkpoint, with a base of our own."""
    files = tiny_tokenizer(num_semantic)
    data = json.loads(files["tokenizer.json"])
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                tokenizers.Regex(data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_BASE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = list(itertools.islice(grammar.sentences(0, "train"), 20000))
    trained.train_from_iterator([*texts, *([_TEMPLATE] * 2000)], trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    vocab |= {f"<filler-{number}>": number for number in range(len(vocab), NUM_BASE)}
    assert len(vocab) == NUM_BASE == max(vocab.values()) + 1, len(vocab)
    data["model"]["vocab"], data["model"]["merges"] = vocab, model["merges"]
    ids = layout(num_semantic).special_ids()
    for token in data["added_tokens"]:
        token["id"] = ids[token["content"]]
    files["tokenizer.json"] = (json.dumps(data) + "\n").encode("ascii")
    for name, content in files.items():
        (folder / name).write_bytes(content)
