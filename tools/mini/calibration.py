"""Write recipes/calibration/s2-mini.jsonl: sentences of the train split, plain, with tags, and of several speakers.

python tools/mini/calibration.py > recipes/calibration/s2-mini.jsonl
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mini import grammar

COUNT, SEED = 128, 77


def texts() -> list[str]:
    """Half of them plain, a quarter with tags, a quarter of one to three speakers."""
    rng = random.Random(SEED)
    sentences = grammar.sentences(SEED, "train")
    found = []
    for i in range(COUNT):
        if i % 4 < 2:
            found.append(next(sentences))
        elif i % 4 == 2:
            found.append(grammar.with_tags(next(sentences), rng))
        else:
            turns = [
                f"<|speaker:{rng.randrange(4)}|>{text}" for text in itertools.islice(sentences, rng.choice((1, 2, 3)))
            ]
            found.append("\n".join(turns))
    return found


if __name__ == "__main__":
    for number, text in enumerate(texts(), 1):
        print(json.dumps({"id": f"s2-mini-{number:03d}", "lang": "en", "text": text}))
