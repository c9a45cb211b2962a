"""Draw what a training run logged: one SVG of losses over seconds, and the figures at the end as a table.

    python tools/mini/curves.py OUT/logs [OUT2/logs ...] --report reports/NAME

Several runs are drawn over one another, each in a colour of its own. The report gets training.svg, training.md and the
logs themselves.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

# part, event, what is drawn; held-out figures are dots
PANELS = {
    "codec: mel": ("codec", "train", "mel"),
    "codec: harmonics": ("codec", "train", "low"),
    "codec: pitch read off the latent, nats": ("codec", "train", "pitch"),
    "codec: phonemes read off the semantic code, nats": ("codec", "train", "phone"),
    "Dual-AR: semantic code, nats": ("dual", "train", "semantic"),
    "Dual-AR: semantic code held out, nats": ("dual", "checked", "held_out_semantic"),
    "Dual-AR: residual codes held out, nats": ("dual", "checked", "held_out_residual"),
    "Dual-AR: phonemes held out, nats": ("dual", "checked", "held_out_phone"),
    "recognizer: WER held out, raw speech": ("recognizer", "checked", "wer"),
}
COLORS = ("#0b5cad", "#d2691e", "#2e8b57", "#6a5acd", "#b22222", "#708090")
WIDTH, HEIGHT, COLUMNS, GAP = 300, 150, 3, 46
Rows = list[dict[str, Any]]


def read_logs(folder: Path) -> Rows:
    """All lines of all parts."""
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def points_of(rows: Rows, part: str, event: str, name: str) -> list[tuple[float, float]]:
    """Seconds and values of one curve."""
    return [(r["t"], float(r[name])) for r in rows if (r["part"], r["event"]) == (part, event) and name in r]


def panel(title: str, curves: list[list[tuple[float, float]]], dots: bool) -> list[str]:
    """One chart, its axis from 0 to the largest value behind the first tenth of a curve."""
    points = [p for curve in curves for p in curve[len(curve) // 10 :]]
    lines = [f'<text class="title" x="0" y="-8">{escape(title)}</text>']
    if not points:
        return [*lines, '<text x="0" y="20">not logged</text>']
    end, top = max(t for t, _ in points), max(value for _, value in points) or 1.0
    for share in (0.0, 0.5, 1.0):
        y = HEIGHT * (1 - share)
        lines.append(f'<line x1="0" x2="{WIDTH}" y1="{y:g}" y2="{y:g}" class="grid"/>')
        lines.append(f'<text x="2" y="{y - 3:g}">{top * share:.3g}</text>')
    lines.append(f'<text x="{WIDTH}" y="{HEIGHT + 13}" text-anchor="end">{end:.0f} s</text>')
    for color, curve in zip(COLORS, curves, strict=False):
        places = [(WIDTH * t / end, HEIGHT * (1 - min(value, top) / top)) for t, value in curve]
        if dots:
            lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>')
    return lines


def draw(runs: dict[str, Rows]) -> str:
    """The whole picture."""
    parts = []
    for place, (title, (part, event, name)) in enumerate(PANELS.items()):
        x, y = (place % COLUMNS) * (WIDTH + GAP) + 10, (place // COLUMNS) * (HEIGHT + GAP) + 50
        inner = panel(title, [points_of(rows, part, event, name) for rows in runs.values()], event == "checked")
        parts += [f'<g transform="translate({x},{y})">', *inner, "</g>"]
    for place, (name, color) in enumerate(zip(runs, COLORS, strict=False)):
        parts.append(f'<text x="{10 + 200 * place}" y="18" fill="{color}">{escape(name)}</text>')
    size = COLUMNS * (WIDTH + GAP), -(-len(PANELS) // COLUMNS) * (HEIGHT + GAP) + 50
    style = "text{font:11px sans-serif}.title{font-weight:bold}.grid{stroke:#ddd}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}"><style>{style}</style>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


def table(runs: dict[str, Rows]) -> str:
    """What stood at the end of each run, in Markdown."""
    rows = [["", *runs], ["---", *["--:"] * len(runs)]]
    for title, (part, event, name) in PANELS.items():
        ends = [points_of(run, part, event, name) for run in runs.values()]
        rows.append([title, *(f"{found[-1][1]:.4g} at {found[-1][0]:.0f} s" if found else "-" for found in ends)])
    for title, event, name in (
        ("bits of the ten codebooks, held out", "encoded", "bits"),
        ("WER of raw speech at the end", "round trips seen", "raw_wer"),
        ("WER of round trips at the end", "round trips seen", "wer_after"),
    ):
        found = [next((r[name] for r in run if r["event"] == event and name in r), "-") for run in runs.values()]
        rows.append([title, *(" ".join(f"{b:.1f}" for b in v) if isinstance(v, list) else str(v) for v in found)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    runs = {f"run {place}": read_logs(folder) for place, folder in enumerate(args.logs, 1)}
    args.report.mkdir(parents=True, exist_ok=True)
    for name, folder in zip(runs, args.logs, strict=True):
        target = args.report / name.replace(" ", "-")
        target.mkdir(exist_ok=True)
        for path in sorted(folder.glob("*.jsonl")):
            shutil.copyfile(path, target / path.name)
    (args.report / "training.svg").write_text(draw(runs))
    (args.report / "training.md").write_text(f"# Training of s2-mini\n\n![losses](training.svg)\n\n{table(runs)}\n")


if __name__ == "__main__":
    main()
