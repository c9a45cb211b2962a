"""Does the Dual-AR learn to read its text? A toy on a CPU, to choose how it is trained before a GPU is asked for.

    python tools/mini/toy.py --steps 800                                      # as s2-mini is trained
    python tools/mini/toy.py --steps 800 --wrong 0.03 --phone-weight 0 --easy 0    # as it was trained at first

Every word has made-up phonemes, every phoneme of a voice two codes, and a share of the codes is drawn at random, as
flite's vocoder does it. Sentences, prompts, rows and training are those of s2-mini; four slow layers of width 128.
Printed is the accuracy of the semantic code on held-out sentences; nobody can get above 1 - noise by much.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tools")]

from mini import dual, grammar, prompts
from mini.common import Log, cosine
from mini.speech import VOICES
from mini.tokenizer import write_tokenizer
from s2quant.prompt import Tokenizer

NUM_SEMANTIC, NUM_PHONES = 512, 40


def number(*parts: object) -> int:
    """A number that belongs to these parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def say(text: str, voice: str, noise: float, rng: random.Random) -> list[tuple[int, int]]:
    """Codes and phonemes, frame by frame."""
    said = []
    for word in grammar.words_of(text):
        for i in range(2 + len(word) // 2 + number(word, voice) % 2):
            phone = 1 + number(word, i // 2) % NUM_PHONES
            other = rng.randrange(6) if rng.random() < noise else None
            said.append((number(phone, voice, i % 2, other) % NUM_SEMANTIC, phone))
    return said


def spoken(split: grammar.Split, count: int, noise: float) -> prompts.Spoken:
    """Sentences of a split in all voices; the residual codes are those of the semantic one."""
    rng = random.Random(split)
    texts = [sentence for _, sentence in zip(range(count), grammar.sentences(0, split), strict=False)]
    voices = [rng.choice(VOICES) for _ in texts]
    said = [say(text, voice, noise, rng) for text, voice in zip(texts, voices, strict=True)]
    frames = np.array([len(row) for row in said])
    semantic, phones = (torch.tensor([pair[which] for row in said for pair in row]) for which in (0, 1))
    codes = torch.stack([semantic, *[semantic // 2] * 9]).short()
    by_voice = {name: [i for i, voice in enumerate(voices) if voice == name] for name in VOICES}
    return prompts.Spoken(
        texts=texts,
        codes=codes,
        phones=phones.numpy().astype(np.uint8)[:, None].repeat(4, axis=1),
        starts=np.concatenate([[0], np.cumsum(frames)[:-1]]),
        frames=frames,
        by_voice=by_voice,
        references=by_voice,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--sentences", type=int, default=3000)
    parser.add_argument("--noise", type=float, default=0.26)
    parser.add_argument("--wrong", type=float, nargs="+", default=dual.WRONG_FRAMES)
    parser.add_argument("--phone-weight", type=float, default=dual.PHONE_WEIGHT)
    parser.add_argument("--easy", type=float, default=0.4, help="share of the steps with conversations of one turn")
    parser.add_argument("--every", type=int, default=50)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    dual.PHONE_WEIGHT = args.phone_weight
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder, NUM_SEMANTIC)
        tokenizer = Tokenizer.load(folder)
        train, held = (spoken(s, n, args.noise) for s, n in (("train", args.sentences), ("validation", 300)))
        count = args.sentences // 3
        np.savez(folder / "rows-000.npz", **prompts.pack(held, tokenizer, 60, dual.LENGTH, "held out"))
        np.savez(folder / "rows-001.npz", **prompts.pack(train, tokenizer, count, dual.LENGTH, "mixed"))
        easy = prompts.pack(train, tokenizer, count, dual.LENGTH, "easy", easy=True)
        np.savez(folder / "rows-002.npz", easy=np.array(True), **easy)
        log = Log(folder / "log.jsonl", "toy", time.time())
        raw = dual.config_json(NUM_SEMANTIC, dim=128, slow_layers=4, fast_layers=1, slow_ffn=384, fast_ffn=128)
        trainer = dual.Trainer(raw, "cpu", 0, log, compiled=False, batch=6, num_targets=1400, fast_every=40)
        rows, check = dual.Rows(folder, "cpu"), dual.Rows(folder, "cpu", validation=True)
        rows.refresh()
        for step in range(args.steps):
            factor = cosine(step / args.steps)
            trainer.rate.fill_(1.5e-3 * factor)
            trainer.muon_rate.fill_(0.02 * factor)
            batch = trainer.draw(rows, tuple(args.wrong), easy=step < args.easy * args.steps)
            found = trainer._step(**batch)
            if (step + 1) % args.every == 0:
                seen = {name: round(float(found[name]), 3) for name in ("semantic", "phone", "accuracy")}
                print(step + 1, seen, {k: round(v, 3) for k, v in trainer.check(check, 3).items()}, flush=True)


if __name__ == "__main__":
    main()
