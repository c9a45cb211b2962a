"""Write seed_tts.json: what the public scripts of seed-tts-eval say of transcripts of our own.

    python make_seed_tts.py --upstream DIR     # a checkout of BytedanceSpeech/seed-tts-eval

Needs jiwer<4 (compute_measures is gone from 4) and zhon. Of run_wer.py only the function process_one is run: the rest
loads models. average_wer.py runs whole. Nothing of them is stored but their results.
"""

from __future__ import annotations

import argparse
import ast
import json
import string
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import jiwer
import zhon.hanzi

CASES = {
    "en": [
        ("The cat sat on the mat.", "the cat sat on the mat"),
        ("Doesn't it rain - often - in May?", "doesn't it rain often in may"),
        ("It doesn\u2019t matter, he said.", "It doesn't matter, he said."),
        ("An out-of-town guest arrived at 5 o'clock.", "An out of town guest arrived at five o'clock."),
        ("We paid $20 (twice) for \u201ctea\u201d\u2026", "We paid twenty dollars twice for tea."),
        ("Nobody answered the door.", ""),
        ("Hello.", "Hello hello hello there my friend."),
        ("One  two   three    four", "one two three four"),
        (" Leading and trailing spaces ", "leading and trailing spaces"),
        ("A \u2013 dash \u2014 and another", "a dash and another"),
        ("The sailors painted a door on the horizon.", "The sailor painted the door on a horizon, then left."),
        ("Caf\u00e9 na\u00efve \u00b7 \u00c9TUDE", "cafe naive etude"),
        ("She sells sea shells by the sea shore", "she sells seashells by the seashore"),
    ],
    "zh": [
        ("\u88c1\u7f1d\u628a\u9876\u9488\u4e22\u4e86\u3002", "\u88c1\u7f1d\u628a\u9876\u9488\u4e22\u4e86"),
        ("\u4e0b\u96e8\u4e86\uff0c\u6211\u4eec\u56de\u5bb6\u5427\uff01", "\u4e0b\u96ea\u4e86\u6211\u4eec\u56de\u5bb6"),
        ("\u4ed6\u8bf4\uff1a\u201c\u597d\u7684\u3002\u201d", "\u4ed6\u8bf4\u597d\u7684\u554a"),
        ("A\u5ea7 100 \u4eba", "a\u5ea7\u4e00\u767e\u4eba"),
        ("\u3000\u6e56\u6c34\u3000\u7ed3\u51b0\u4e86", "\u6e56\u6c34\u7ed3\u51b0"),
        ("\u6ca1\u6709\u4eba\u56de\u7b54", ""),
        ("\u516c\u5706\u7684\u9e3d\u5b50", "\u516c\u56ed\u7684\u9e3d\u5b50\u98de\u8d70\u4e86"),
    ],
}


def process_one(upstream: Path, lang: str):
    tree = ast.parse((upstream / "run_wer.py").read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "process_one"]
    scope = {
        "punctuation_all": zhon.hanzi.punctuation + string.punctuation,
        "lang": lang,
        "compute_measures": lambda truth, hypo: (
            scope["seen"].append((truth, hypo)) or jiwer.compute_measures(truth, hypo)
        ),
        "seen": [],
    }
    exec(compile(ast.Module(body=wanted, type_ignores=[]), "run_wer.py", "exec"), scope)
    return scope


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--upstream", type=Path, required=True)
    upstream = parser.parse_args().upstream
    commit = subprocess.run(
        ["git", "-C", upstream, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    out = {
        "provenance": {"repository": "BytedanceSpeech/seed-tts-eval", "commit": commit}
        | {name: metadata.version(name) for name in ("jiwer", "zhon")},
        "punctuation": zhon.hanzi.punctuation,
        "languages": {},
    }
    for lang, cases in CASES.items():
        scope = process_one(upstream, lang)
        rows, lines = [], []
        for number, (truth, hypothesis) in enumerate(cases):
            found = scope["process_one"](hypothesis, truth)
            _, _, wer, substitutions, deletions, insertions = found
            truth_norm, hypothesis_norm = scope["seen"][-1]
            rows.append(
                {"reference": truth, "hypothesis": hypothesis, "reference_norm": truth_norm}
                | {"hypothesis_norm": hypothesis_norm, "wer": wer}
            )
            lines.append(f"{number}.wav\t{wer}\t{truth}\t{hypothesis}\t{insertions}\t{deletions}\t{substitutions}\n")
        with tempfile.TemporaryDirectory() as folder:
            scored = Path(folder) / "scored"
            scored.write_text("".join(lines), encoding="utf-8")
            command = [sys.executable, str(upstream / "average_wer.py"), str(scored), str(Path(folder) / "out")]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        out["languages"][lang] = {"rows": rows, "printed": printed}
    target = Path(__file__).with_name("seed_tts.json")
    target.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    print({lang: part["printed"] for lang, part in out["languages"].items()})


if __name__ == "__main__":
    main()
