"""Training sequences for the Dual-AR: real prompts of the project's own prompt code, packed into rows.

Legend: N codebooks, F frames, T positions of a row, R rows, H phonemes per position.

    python -m mini.prompts --data DIR --codes FILE FILE ... --tokenizer DIR --out DIR     (from tools/; waits for files)

The second file and those behind it hold the codes of the same speech, one quarter of a frame later each.

Kinds of conversation: one voice cloned from another sentence of it; no reference (then the default voice speaks);
speakers 0 to 3 without references (each has a default voice); two cloned speakers in a dialogue; earlier turns.
A row holds several whole conversations; `document` tells them apart, `target` marks what the model has to predict:
the frames of the last assistant message, and the im_end behind them; `phones` says what is spoken there and a little
later.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mini.codec import load_codes
from mini.common import Speech
from mini.speech import DEFAULT_VOICE, VOICES
from s2quant.prompt import CodesPart, Conversation, Message, Tokenizer, Voice
from s2quant.prompt.build import conversation

DEFAULT_VOICES = VOICES  # of speakers 0 to 3, when a text has speaker marks and no references
KINDS = {"clone": 40, "plain": 22, "speakers": 12, "dialogue": 16, "history": 10}
# Told apart so that training can begin with them: among references and earlier turns it takes several times as long
# until the model finds the words that it has to say.
EASY_KINDS = {"plain": 30, "speaker": 70}
EASY_SHARE = 0.3  # of the chunks
CHUNK_ROWS = 1000  # small, so that training begins soon
AHEAD = (0, 3)  # frames; four phonemes of each are the labels of a position


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """Utterances with their codes, by voice."""

    texts: list[str]
    codes: Tensor  # int16 [N, all F]
    phones: np.ndarray  # uint8 [all F, 4]
    starts: np.ndarray
    frames: np.ndarray
    by_voice: dict[str, list[int]]
    references: dict[str, list[int]]  # those without tags

    @classmethod
    def of(cls, speech: Speech, codes: Tensor) -> Spoken:
        by_voice: dict[str, list[int]] = {voice: [] for voice in VOICES}
        references: dict[str, list[int]] = {voice: [] for voice in VOICES}
        for i, row in enumerate(speech.rows):
            by_voice[row["voice"]].append(i)
            if "[" not in row["text"]:
                references[row["voice"]].append(i)
        return cls(
            texts=[row["text"] for row in speech.rows],
            codes=codes,
            phones=speech.phones.numpy(),
            starts=speech.frame_starts,
            frames=speech.frames,
            by_voice=by_voice,
            references=references,
        )

    def codes_of(self, i: int) -> Tensor:
        """int16 [N, F] of one utterance."""
        return self.codes[:, self.starts[i] : self.starts[i] + self.frames[i]]

    def phones_of(self, utterances: list[int]) -> np.ndarray:
        """Labels of some utterances in a row and of the end behind them: uint8 [F + 1, H]."""
        found = [self.phones[self.starts[i] : self.starts[i] + self.frames[i]] for i in utterances]
        behind = np.zeros((1 + max(AHEAD), found[0].shape[1]), found[0].dtype)  # silence
        whole = np.concatenate([*found, behind])
        length = len(whole) - max(AHEAD)
        return np.concatenate([whole[ahead : ahead + length] for ahead in AHEAD], axis=1)

    def voice(self, name: str, rng: random.Random) -> Voice:
        """A reference recording of a voice."""
        i = rng.choice(self.references[name])
        return Voice(text=self.texts[i], codes=self.codes_of(i))


def draw_conversation(spoken: Spoken, rng: random.Random, kind: str | None = None) -> tuple[Conversation, list[int]]:
    """Draw one conversation that ends with a whole assistant message, and say which utterances that is made of."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]

    def pick(voice: str) -> int:
        return rng.choice(spoken.by_voice[voice])

    voices: list[Voice] = []
    history: list[tuple[str, Tensor]] = []
    if kind == "plain":
        turns: list[tuple[int | None, int]] = [(None, pick(DEFAULT_VOICE))]
    elif kind in ("speaker", "speakers"):
        speakers = [rng.randrange(len(VOICES)) for _ in range(rng.choice((1, 1, 2, 3)) if kind == "speakers" else 1)]
        turns = [(s, pick(DEFAULT_VOICES[s])) for s in speakers]
    elif kind == "dialogue":
        names = rng.sample(VOICES, 2)
        voices = [spoken.voice(name, rng) for name in names]
        speakers = [rng.randrange(2) for _ in range(rng.choice((1, 2, 2, 3)))]
        turns = [(s, pick(names[s])) for s in speakers]
    else:
        name = rng.choice(VOICES)
        mark = rng.choice((None, 0))
        if kind == "clone" or rng.random() < 0.6:
            voices = [spoken.voice(name, rng)]
        else:
            name, mark = DEFAULT_VOICE, None
        if kind == "history":
            earlier, codes = _said(spoken, [(mark, pick(name))])
            history = [(earlier, torch.cat(codes, dim=1))]
        turns = [(mark, pick(name))]
    text, parts = _said(spoken, turns)
    messages = list(conversation(text, voices, history).messages)
    messages[-1] = Message(role="assistant", parts=[CodesPart(codes=torch.cat(parts, dim=1))], modality="voice")
    return Conversation(messages=messages), [i for _, i in turns]


def _said(spoken: Spoken, turns: list[tuple[int | None, int]]) -> tuple[str, list[Tensor]]:
    """The text of some turns (speaker or None, utterance), and their codes."""
    marked = [spoken.texts[i] if speaker is None else f"<|speaker:{speaker}|>{spoken.texts[i]}" for speaker, i in turns]
    return "\n".join(marked), [spoken.codes_of(i) for _, i in turns]


def encode(conversation: Conversation, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """Tokens int16 [1+N, T] of a closed conversation, and how many of the last positions are to be predicted."""
    tokens = conversation.encode(tokenizer).to(torch.int16).numpy()
    part = conversation.messages[-1].parts[0]
    assert isinstance(part, CodesPart) and tokens[0, -2] == tokenizer.im_end_id
    return tokens, part.codes.shape[1] + 1


def pack(
    spoken: Spoken, tokenizer: Tokenizer, count: int, length: int, seed: str, easy: bool = False
) -> dict[str, np.ndarray]:
    """Fill rows with conversations: tokens int16 [R, 1+N, T], document, target [R, T], phones uint8 [R, T, H].

    The line end behind the last im_end is left out: nothing follows from it. Padding is a document of its own.
    """
    rng = random.Random(seed)
    num_rows = 1 + len(spoken.codes)
    tokens = np.zeros((count, num_rows, length), np.int16)
    tokens[:, 0] = tokenizer.pad_id
    document = np.full((count, length), -1, np.int16)
    target = np.zeros((count, length), bool)
    phones = np.zeros((count, length, len(AHEAD) * spoken.phones.shape[1]), np.uint8)
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for row in range(count):
        at = number = 0
        while True:
            fits = next((i for i, (block, _) in enumerate(waiting) if at + block.shape[1] <= length), None)
            if fits is None:
                if len(waiting) >= 6:
                    break
                kind = rng.choices(list(EASY_KINDS), list(EASY_KINDS.values()))[0] if easy else None
                drawn, utterances = draw_conversation(spoken, rng, kind)
                block, goal = encode(drawn, tokenizer)
                labels = spoken.phones_of(utterances)
                assert len(labels) == goal, (len(labels), goal)
                if block.shape[1] - 1 <= length:
                    waiting.append((block[:, :-1], labels))
                continue
            block, labels = waiting.pop(fits)
            end = at + block.shape[1]
            tokens[row, :, at:end] = block
            document[row, at:end] = number
            target[row, end - len(labels) : end] = True
            phones[row, end - len(labels) : end] = labels
            at, number = end, number + 1
    return {"tokens": tokens, "document": document, "target": target, "phones": phones}


_shared: dict[str, tuple[Spoken, Tokenizer]] = {}


def _write_chunk(job: tuple[str, Path, int, int, int, int, bool]) -> None:
    key, out, number, count, length, seed, easy = job
    torch.set_num_threads(1)
    rows = pack(*_shared[key], count, length, f"rows {seed} {number}", easy) | {"easy": np.array(easy)}
    partial = out / f"rows-{number:03d}.tmp.npz"
    np.savez(partial, **rows)
    partial.rename(out / f"rows-{number:03d}.npz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--codes", type=Path, nargs="+", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=112)
    parser.add_argument("--rows", type=int, default=CHUNK_ROWS, help="of a chunk")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.load(args.tokenizer)
    each = -(-args.chunks // len(args.codes))
    for shift, path in enumerate(args.codes):
        while not path.exists():  # started before they are there, so that imports cost nothing
            time.sleep(0.2)
        started = time.time()
        for split in ("validation", "train") if shift == 0 else ("train",):
            speech = Speech(args.data, "cpu", split, with_audio=False)
            speech.refresh()
            speech = speech.shifted(shift)
            _shared[split] = Spoken.of(speech, load_codes(path, **{split: speech})[split]), tokenizer
        first = 1 + shift * each
        jobs = [
            ("train", args.out, number, args.rows, args.length, args.seed, number - first < EASY_SHARE * each)
            for number in range(first, first + each)
        ]
        if shift == 0:
            jobs.insert(0, ("validation", args.out, 0, args.rows // 2, args.length, args.seed, False))
        with multiprocessing.get_context("fork").Pool(args.processes) as pool:
            for _ in pool.imap_unordered(_write_chunk, jobs):
                pass
        seconds = round(time.time() - started, 1)
        print(json.dumps({"part": "prompts", "shift": shift, "chunks": len(jobs), "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
