"""recipes.json as a page, and as rows of a table: figures with intervals, and what these decide.

Rates are printed in percent, differences of rates in points, bytes in MB (10^6). Words say what intervals decide and
nothing more: "more", "less", or "not decided" where an interval holds 0.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2quant.evaluate.metrics import MAX_JUDGED_WER
from s2quant.files import atomic_file, write_json
from s2quant.report.format import MISSING, adaptive, fixed

MIN_TEXTS = 50  # of fewer nothing is called decided, see s2quant.evaluate.stats


@dataclass(frozen=True, kw_only=True)
class Figure:
    """How a figure is printed.

    Args:
        name: Its key.
        title: Its name on the page.
        scale: Factor for printing.
        unit: Unit of a difference.
    """

    name: str
    title: str
    scale: float
    unit: str

    def number(self, value: float | None, signed: bool = False) -> str:
        """Write a number."""
        return MISSING if value is None else adaptive(value * self.scale, signed) or MISSING

    def range(self, interval: Sequence[float] | None, signed: bool = False) -> str:
        """Write an interval after a number; nothing without one."""
        if interval is None:
            return ""
        low, high = (adaptive(end * self.scale, signed) for end in interval)
        return f" [{low}, {high}]"


FIGURES = (
    Figure(name="kl_semantic", title="KL semantic", scale=1, unit="nats"),
    Figure(name="kl_residual", title="KL residual", scale=1, unit="nats"),
    Figure(name="top1", title="Top-1, %", scale=100, unit="points"),
    Figure(name="end_delta", title="P(im_end) drift, points", scale=100, unit="points"),
    Figure(name="wer", title="WER, %", scale=100, unit="points"),
    Figure(name="sim", title="SIM to prompt", scale=1, unit=""),
    Figure(name="failures", title="Failed clips, %", scale=100, unit="points"),
)
BY_NAME = {figure.name: figure for figure in FIGURES}


def write(folder: Path, table: Mapping[str, Any]) -> None:
    """Write recipes.md, recipes.csv and recipes.json.

    Args:
        folder: Where to, made when absent.
        table: From `recipes_figures.compose`.

    Raises:
        UserError: The disk refuses.
    """
    with atomic_file(folder / "recipes.json", overwrite=True) as partial:
        write_json(partial, dict(table))
    with atomic_file(folder / "recipes.md", overwrite=True) as partial:
        partial.write_text(page(table), encoding="utf-8")
    rows = flat_rows(table)
    with (
        atomic_file(folder / "recipes.csv", overwrite=True) as partial,
        partial.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def flat_rows(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give a row per recipe for a spreadsheet; fractions, nats and bytes, an empty cell for what is missing."""
    rows = []
    for row in table["recipes"]:
        size = ("name", "tensor_bytes", "bits_per_weight", "bits_per_linear_weight", "num_quantized", "num_linears")
        flat: dict[str, Any] = {key: row[key] for key in size}
        for figure in FIGURES:
            own, against = row["own"][figure.name], row["against"] and row["against"][figure.name]
            flat |= {f"{figure.name}_{key}": own[key] for key in ("value", "se", "n")}
            flat |= _ends(figure.name, own["interval"])
            if figure.name in ("wer", "sim"):
                flat |= {f"{figure.name}_{key}": own.get(key) for key in ("baseline", "delta")}
                flat |= _ends(f"{figure.name}_delta", own.get("delta_interval"))
            flat[f"{figure.name}_less_reference"] = against and against["delta"]
            flat |= _ends(f"{figure.name}_less_reference", against and against["interval"])
        rows.append(flat | {key: value for key, value in row["speed"].items() if key != "ar_ratio_range"})
    return rows


def _ends(name: str, interval: Sequence[float] | None) -> dict[str, float | None]:
    low, high = (None, None) if interval is None else interval
    return {f"{name}_low": low, f"{name}_high": high}


def page(table: Mapping[str, Any]) -> str:
    """Compose recipes.md.

    Args:
        table: From `recipes_figures.compose`.

    Returns:
        The page.
    """
    lines = [*_head(table), *_own_table(table), "", *_against_table(table), "", *_decided(table), "", *_made(table), ""]
    return "\n".join(lines)


def _head(table: Mapping[str, Any]) -> list[str]:
    suite, clusters = table["suite"], table["statistics"]["clusters"]
    wer = table["recipes"][0]["own"]["wer"]
    floor = f"{BY_NAME['wer'].number(wer['floor_delta'], True)}{BY_NAME['wer'].range(wer['floor_interval'], True)}"
    return [
        "# What recipes cost and gain",
        "",
        f"Suite {suite['name']} version {suite['version']}: {suite['num_utterances']} of its "
        f"{suite['num_utterances_in_suite']} texts, seeds {', '.join(map(str, suite['seeds']))}, so "
        f"{table['baseline']['num_clips']} clips an arm, heard by {suite['asr']} (normalizer {suite['normalizer']}). "
        f"Figures in brackets are 95 % intervals, bootstrap over {clusters} texts; they are too narrow for fewer than "
        f"about 100 texts where errors are rare, and no correction is made for looking at several recipes.",
        "",
        f"bf16 has a WER of {BY_NAME['wer'].number(wer['baseline'])} %. Its noise floor, bf16 with other seeds less "
        f"bf16: {floor} points.",
        "",
    ]


def _own_table(table: Mapping[str, Any]) -> list[str]:
    heads = ["Recipe", "MB", "Bits a weight", "Bits a linear's weight"]
    heads += ["KL semantic, nats a frame (standard error)", "KL residual, nats a frame (standard error)"]
    heads += [figure.title for figure in FIGURES[2:4]]
    heads += ["WER, %", "WER less bf16's, points", "SIM to prompt", "SIM less bf16's", "Failed clips"]
    heads += ["RTF", "RTF of bf16", "Time a frame, of bf16's (lowest, highest)"]
    lines = ["## Against bf16, by size", "", _cells(heads), _cells([":--", *["--:"] * (len(heads) - 1)])]
    for row in table["recipes"]:
        own, speed = row["own"], row["speed"]
        cells = [row["name"], fixed(row["tensor_bytes"] / 1e6, 2) or MISSING]
        cells += [fixed(row[key], 2) or MISSING for key in ("bits_per_weight", "bits_per_linear_weight")]
        for name in ("kl_semantic", "kl_residual"):
            spread = own[name]["se"]
            cells.append(BY_NAME[name].number(own[name]["value"]) + (f" ({adaptive(spread)})" if spread else ""))
        for name in ("top1", "end_delta"):
            signed = name == "end_delta"
            cells.append(BY_NAME[name].number(own[name]["value"], signed))
            cells[-1] += BY_NAME[name].range(own[name]["interval"], signed)
        for name in ("wer", "sim"):
            cells.append(BY_NAME[name].number(own[name]["value"]))
            delta = BY_NAME[name].number(own[name].get("delta"), True)
            cells.append(delta + BY_NAME[name].range(own[name].get("delta_interval"), True))
        arms = own["failures"]["arms"]
        cells.append(_count(arms["model"]))
        cells += [adaptive(speed[key]) or MISSING for key in ("rtf", "rtf_baseline")]
        low, high = (adaptive(end) for end in speed["ar_ratio_range"])
        cells.append(f"{adaptive(speed['ar_ratio'])} ({low}, {high})")
        lines.append(_cells(cells))
    return [
        *lines,
        _cells(_bf16(table, len(heads))),
        "",
        "KL residual is the sum over the residual codes of a frame. P(im_end) drift: at the true end of bf16's speech, "
        "the recipe's probability less bf16's. RTF: one utterance at a time, beside bf16 in turns, a run "
        f"of its own for each recipe, so that only ratios compare: the median of {speed['repeats']} turns.",
    ]


def _count(row: Mapping[str, Any]) -> str:
    return f"{row['count']} of {row['n']}"


def _bf16(table: Mapping[str, Any], width: int) -> list[str]:
    """Give the row of the checkpoint itself."""
    base, own = table["baseline"], table["recipes"][0]["own"]
    cells = ["bf16", fixed(base["tensor_bytes"] / 1e6, 2) or MISSING]
    cells += [fixed(base["bits_per_weight"], 2) or MISSING] * 2
    cells += ["0", "0", "100", "0", BY_NAME["wer"].number(own["wer"]["baseline"]), "0"]
    cells += [BY_NAME["sim"].number(own["sim"].get("baseline")), "0", _count(own["failures"]["arms"]["baseline"])]
    return [*cells, *[""] * (width - len(cells))]


def _against_table(table: Mapping[str, Any]) -> list[str]:
    reference = next(row for row in table["recipes"] if row["name"] == table["reference"])
    heads = ["Recipe", "Bytes, %"]
    heads += [f"{figure.title.partition(',')[0]}{figure.unit and ', '}{figure.unit}" for figure in FIGURES]
    lines = [f"## Less {table['reference']}", "", _cells(heads), _cells([":--", *["--:"] * (len(heads) - 1)])]
    for row in table["recipes"]:
        if row["against"] is None:
            continue
        share = 100 * (row["tensor_bytes"] / reference["tensor_bytes"] - 1)
        cells = [row["name"], adaptive(share, signed=True) or MISSING]
        for figure in FIGURES:
            found = row["against"][figure.name]
            cells.append(figure.number(found["delta"], True) + figure.range(found["interval"], True))
        lines.append(_cells(cells))
    return lines


def _decided(table: Mapping[str, Any]) -> list[str]:
    """Say for each recipe which figures' intervals exclude 0."""
    lines = [f"## What the intervals decide against {table['reference']}", ""]
    if table["statistics"]["clusters"] < MIN_TEXTS:
        return [*lines, f"Nothing: intervals of fewer than {MIN_TEXTS} texts are far too narrow."]
    reference = next(row for row in table["recipes"] if row["name"] == table["reference"])
    spoken = (reference["own"]["wer"]["baseline"] or 0.0) <= MAX_JUDGED_WER
    if not spoken:
        lines += [f"bf16 is not understood (WER above {100 * MAX_JUDGED_WER:.0f} %): its words decide nothing.", ""]
    for row in table["recipes"]:
        if row["against"] is None:
            continue
        size = row["tensor_bytes"] - reference["tensor_bytes"]
        known: dict[str, list[str]] = {"more": [], "less": [], "the same": [], "not decided": []}
        for figure in FIGURES:
            word = direction(row["against"][figure.name]["interval"])
            word = word if spoken or figure.name != "wer" else "not decided"
            known[word].append(figure.title.partition(",")[0])
        parts = [f"{size:+,} bytes" if size else "equal bytes"]
        parts += [f"{word}: {', '.join(names)}" for word, names in known.items() if names]
        lines.append(f"- {row['name']}: {'; '.join(parts)}.")
    return lines


def direction(interval: Sequence[float] | None) -> str:
    """Say what an interval of a difference decides: "more", "less", "the same" or "not decided"."""
    if interval is None:
        return "not decided"
    low, high = interval
    if low == high == 0:
        return "the same"
    return "more" if low > 0 else "less" if high < 0 else "not decided"


def _made(table: Mapping[str, Any]) -> list[str]:
    made = table["provenance"]
    commit = made["s2quant_commit"] or "not known"
    return [
        f"Made on {made['device']}, {made.get('dtype')}, s2quant commit {commit}; hashes and all figures: recipes.json."
    ]


def _cells(words: Sequence[str]) -> str:
    return "| " + " | ".join(words) + " |"
