"""From clips and token metrics of many checkpoints to damage.json and damage.md.

Intervals are 95 %, by the paired bootstrap of `s2quant.evaluate.stats` over sentences, whose seeds stay together. The
statements at the end are worked out from the intervals: one holds, does not hold, or is not decided.

    arms        by name: tensor_bytes, num_clips, ended, ended_interval, wer {recognizer: rate, delta, interval, mde},
                tokens {kl_semantic, kl_residual, top1_agreement: value, interval; im_end}, layer_groups
    pairs       of round-to-nearest and GPTQ with the same bits: RTN less GPTQ, with intervals
    statements  sentence, figures, holds (true, false, null)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from s2quant.checkpoint.reader import open_checkpoint
from s2quant.evaluate.metrics import MAX_JUDGED_WER, num_errors, num_units
from s2quant.evaluate.plan import EvalPlan, suite_facts
from s2quant.evaluate.stats import Difference, binomial_interval, paired_bootstrap
from s2quant.evaluate.store import Store
from s2quant.evaluate.token_summary import summarise_tokens
from s2quant.evaluate.tokens import TokenDamage
from s2quant.files import atomic_file, write_json
from s2quant.records import UtteranceRecord

REPORT_VERSION = 1
MARGIN_WER = 0.02  # what the suites of s2-mini call no loss
KINDS = ("kl_semantic", "kl_residual", "top1_agreement")


@dataclass(frozen=True, kw_only=True)
class Clips:
    """What a checkpoint spoke.

    Args:
        store: Where it lies.
        records: One per clip, by recognizer; those of the bf16 model hold its noise floor too.
    """

    store: Store
    records: Mapping[str, Sequence[UtteranceRecord]]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A checkpoint.

    Args:
        name: "bf16", or method and bits such as "gptq-4".
        folder: Where it lies.
        clips: What it spoke.
        damages: Its token metrics, a damage per clip of the bf16 model; None of the bf16 model itself.
        groups: The same by groups of layers, from `summarise_groups`, or None.
    """

    name: str
    folder: Path
    clips: Clips
    damages: Sequence[TokenDamage] | None
    groups: Sequence[Mapping[str, Any]] | None


def _some(records: Sequence[UtteranceRecord], arm: str) -> list[UtteranceRecord]:
    return [record for record in records if record.arm == arm]


def _words(one: Sequence[UtteranceRecord], other: Sequence[UtteranceRecord]) -> Difference:
    """Compare the word errors of clips of the same sentences, in the same order."""
    assert [record.utt for record in one] == [record.utt for record in other]
    return paired_bootstrap(
        [record.utt for record in one],
        [num_errors(record) for record in one],
        [num_errors(record) for record in other],
        baseline_weights=[num_units(record) for record in one],
    )


def _sums(damages: Sequence[TokenDamage], kind: str) -> tuple[list[float], list[float]]:
    """Give for each clip the sum of a token metric and how many values that is."""
    field = {"kl_semantic": "kl", "kl_residual": "residual_kl", "top1_agreement": "agree"}[kind]
    arrays = [getattr(one, field) for one in damages]
    return [float(array.sum(dtype="float64")) for array in arrays], [float(array.size) for array in arrays]


def _tokens(clusters: Sequence[str], damages: Sequence[TokenDamage]) -> dict[str, Any]:
    """Give the token metrics of a checkpoint, with intervals; against the bf16 model, whose KL is 0."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        sums, counts = _sums(damages, kind)
        same = counts if kind == "top1_agreement" else [0.0] * len(counts)
        result = paired_bootstrap(clusters, same, sums, baseline_weights=counts)
        offset = result.baseline or 0.0
        interval = None if result.interval is None else [offset + end for end in result.interval]
        found[kind] = {"value": result.model, "interval": interval}
    summary = summarise_tokens(damages)
    assert summary is not None
    return found | {"im_end": summary["im_end"], "num_positions": summary["num_positions"]}


def _plain(result: Difference) -> dict[str, Any]:
    interval = None if result.interval is None else list(result.interval)
    return {"baseline": result.baseline, "model": result.model, "delta": result.delta, "interval": interval,
            "mde": result.mde, "n": result.n}  # fmt: skip


def _pair(rtn: Arm, gptq: Arm, clusters: Sequence[str], listeners: Sequence[str]) -> dict[str, Any]:
    """Compare round-to-nearest with GPTQ."""
    assert rtn.damages is not None and gptq.damages is not None
    found: dict[str, Any] = {"rtn": rtn.name, "gptq": gptq.name}
    for kind in KINDS:
        (sums, counts), (others, _) = _sums(gptq.damages, kind), _sums(rtn.damages, kind)
        found[kind] = _plain(paired_bootstrap(clusters, sums, others, baseline_weights=counts))
    found["wer"] = {name: _plain(_words(gptq.clips.records[name], rtn.clips.records[name])) for name in listeners}
    return found


def compose(
    plan: EvalPlan,
    arms: Sequence[Arm],
    floor: Sequence[TokenDamage],
    listeners: Sequence[str],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Put together damage.json.

    Args:
        plan: What was spoken.
        arms: The checkpoints, the bf16 model first.
        floor: Token metrics of the bf16 model in another precision.
        listeners: The recognizers' names.
        provenance: The manifest.

    Returns:
        The object described above.
    """
    base, *others = arms
    clusters = {job.stem: job.utterance.id for job in plan.jobs("baseline")}
    rows: dict[str, Any] = {}
    for arm, kind in [(base, "baseline"), (base, "floor"), *((arm, "model") for arm in others)]:
        heard = {name: _some(arm.clips.records[name], kind) for name in listeners}
        first = heard[listeners[0]]
        ended = sum(record.stop_reason == "end" for record in first)
        damages = floor if kind == "floor" else arm.damages
        rows["floor" if kind == "floor" else arm.name] = {
            "tensor_bytes": sum(module.num_bytes for module in open_checkpoint(arm.folder).modules.values()),
            "num_clips": len(first),
            "num_errors": sum(record.error is not None for record in first),
            "ended": ended / len(first),
            "ended_interval": binomial_interval(ended, len(first)),
            "wer": {
                name: _plain(_words(_some(base.clips.records[name], "baseline"), heard[name])) for name in listeners
            },
            "tokens": None if damages is None else _tokens([clusters[one.id] for one in damages], damages),
            "layer_groups": arm.groups,
        }
    by_name = {arm.name: arm for arm in others}
    spoken = [clusters[one.id] for one in floor]
    bits = sorted({int(name.partition("-")[2]) for name in by_name})
    both = [n for n in bits if {f"rtn-{n}", f"gptq-{n}"} <= set(by_name)]
    result = {
        "report_version": REPORT_VERSION,
        "suite": suite_facts(plan),
        "recognizers": list(listeners),
        "arms": rows,
        "pairs": [_pair(by_name[f"rtn-{n}"], by_name[f"gptq-{n}"], spoken, listeners) for n in both],
        "provenance": dict(provenance),
    }
    return result | {"statements": statements(result)}


# ---- statements ----------------------------------------------------------------------------------------------------


def statements(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say what the intervals decide.

    Args:
        result: damage.json without them.

    Returns:
        Sentences with their figures; `holds` is None where the intervals do not decide.
    """
    arms, found = result["arms"], []
    for name in result["recognizers"]:
        speaks = arms["bf16"]["wer"][name]["baseline"] <= MAX_JUDGED_WER
        for arm, sentence, judge in (
            ("rtn-2", f"is not understood (WER above {100 * MAX_JUDGED_WER:.0f} %)", _destroyed),
            ("rtn-3", "hurts: more words are wrong than of bf16", _worse),
            ("gptq-4", f"is at or near bf16: at most {100 * MARGIN_WER:.0f} points more words are wrong", _near),
        ):
            if arm in arms:
                row = arms[arm]["wer"][name]
                holds = judge(row) if speaks else None
                text = f"{arm} {sentence}, by {name}"
                found.append({"sentence": text, "figures": _difference(row, 100, "points"), "holds": holds})
    for pair in result["pairs"]:
        for kind in ("kl_semantic", "kl_residual"):
            row = pair[kind]
            text = f"{pair['rtn']} is not better than {pair['gptq']} in {kind}"
            found.append({"sentence": text, "figures": _difference(row, 1, "nats"), "holds": _not_better(row)})
        for name, row in pair["wer"].items():
            speaks = arms["bf16"]["wer"][name]["baseline"] <= MAX_JUDGED_WER
            text = f"{pair['rtn']} is not better than {pair['gptq']} in words, by {name}"
            holds = _not_better(row) if speaks else None
            found.append({"sentence": text, "figures": _difference(row, 100, "points"), "holds": holds})
    for method in ("rtn", "gptq"):
        bits = sorted(int(arm.partition("-")[2]) for arm in arms if arm.startswith(f"{method}-"))
        values = [arms[f"{method}-{n}"]["tokens"]["kl_semantic"]["value"] for n in bits]
        if len(bits) > 1 and None not in values:
            figures = ", ".join(f"{n} bits {value:.3g}" for n, value in zip(bits, values, strict=True))
            falls = all(high > low for high, low in pairwise(values))
            found.append({"sentence": f"{method}: KL falls with bits", "figures": figures + " nats", "holds": falls})
    return found


def _difference(row: Mapping[str, Any], scale: float, unit: str) -> str:
    if row["delta"] is None:
        return "not measured"
    ends = "" if row["interval"] is None else " [{:+.3g}, {:+.3g}]".format(*(scale * end for end in row["interval"]))
    return f"{scale * row['delta']:+.3g}{ends} {unit}"


def _destroyed(row: Mapping[str, Any]) -> bool | None:
    if row["interval"] is None:
        return None
    low, high = (row["baseline"] + end for end in row["interval"])
    return True if low > MAX_JUDGED_WER else False if high < MAX_JUDGED_WER else None


def _worse(row: Mapping[str, Any]) -> bool | None:
    if row["interval"] is None:
        return None
    low, high = row["interval"]
    return True if low > 0 else False if high <= 0 else None


def _near(row: Mapping[str, Any]) -> bool | None:
    if row["interval"] is None:
        return None
    low, high = row["interval"]
    return True if high < MARGIN_WER else False if low > MARGIN_WER else None


def _not_better(row: Mapping[str, Any]) -> bool | None:
    """RTN less GPTQ, where more is worse: holds unless the interval lies below 0 altogether."""
    if row["interval"] is None:
        return None
    low, high = row["interval"]
    return False if high < 0 else True if low >= 0 else None


# ---- the page ------------------------------------------------------------------------------------------------------


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """Write damage.json and damage.md.

    Args:
        folder: The report's folder, made when absent.
        result: From `compose`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "damage.json", overwrite=True) as partial:
        write_json(partial, dict(result))
    with atomic_file(folder / "damage.md", overwrite=True) as partial:
        partial.write_text(page(result), encoding="utf-8")


def page(result: Mapping[str, Any]) -> str:
    """Compose damage.md.

    Args:
        result: From `compose`.

    Returns:
        The page.
    """
    suite, listeners, arms = result["suite"], result["recognizers"], result["arms"]
    seeds = ", ".join(map(str, suite["seeds"]))
    count = arms["bf16"]["num_clips"]
    positions = next((row["tokens"]["num_positions"] for row in arms.values() if row["tokens"]), 0)
    lines = [
        "# Damage to s2-mini by method and bits",
        "",
        f"{suite['num_utterances']} held-out sentences in four voices, seeds {seeds}: {count} clips an arm; token "
        f"metrics over {positions} positions of the bf16 model's speech. 95 % intervals, bootstrap over sentences. "
        f"The floor is bf16 with other seeds (words) and in another precision (tokens).",
        "",
        "| Arm | Size, MB | KL semantic, nats | KL residual, nats | Top-1, % | End at the true end, % | "
        + " | ".join(f"WER, %, {name}" for name in listeners)
        + " | Ended by itself, % |",
        "|:--|--:|--:|--:|--:|--:|" + "--:|" * len(listeners) + "--:|",
    ]
    ends = {name: row["tokens"]["im_end"]["model_at_end"] for name, row in arms.items() if row["tokens"]}
    ends["bf16"] = arms["floor"]["tokens"]["im_end"]["baseline_at_end"]
    for name, row in arms.items():
        tokens = row["tokens"]
        cells = [f"{row['tensor_bytes'] / 1e6:.2f}"]
        cells += [_value(tokens and tokens[kind], 1) for kind in KINDS[:2]]
        cells += [_value(tokens and tokens["top1_agreement"], 100)]
        end = ends.get(name)
        cells += ["" if end is None else f"{100 * end:.2f}"]
        for listener in listeners:
            heard = row["wer"][listener]
            rate = "not measured" if heard["model"] is None else f"{100 * heard['model']:.2f}"
            cells.append(rate if name == "bf16" else f"{rate} ({_difference(heard, 100, '').strip()})")
        low, high = row["ended_interval"]
        cells.append(f"{100 * row['ended']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    detectable = [arms[name]["wer"][listener]["mde"] for name in arms for listener in listeners if name == "floor"]
    if known := [f"{100 * value:.2f}" for value in detectable if value is not None]:
        lines += [
            "",
            f"Smallest WER difference to be seen with these clips: {', '.join(known)} points (from the floor).",
        ]
    lines += ["", "## What the intervals decide", "", "| Statement | Figures | Holds |", "|:--|--:|:--|"]
    words = {True: "yes", False: "no", None: "not decided"}
    lines += [f"| {row['sentence']} | {row['figures']} | {words[row['holds']]} |" for row in result["statements"]]
    for name, row in arms.items():
        if row["layer_groups"]:
            lines += [
                "",
                f"## {name} by group of layers",
                "",
                "| Layers | Quantized | KL semantic, nats | KL residual, nats |",
            ]
            lines += ["|:--|--:|--:|--:|"]
            lines += [
                f"| {group['name']} | {group['num_quantized']} | {group['kl_semantic']:.3g} | "
                f"{group['kl_residual_mean']:.3g} |"
                for group in row["layer_groups"]
            ]
    made = result["provenance"]
    lines += ["", f"Made on {made['device']}, {made.get('dtype')}; figures and hashes: damage.json.", ""]
    return "\n".join(lines)


def _value(row: Mapping[str, Any] | None, scale: float) -> str:
    if row is None or row["value"] is None:
        return ""
    ends = "" if row["interval"] is None else " [{:.3g}, {:.3g}]".format(*(scale * end for end in row["interval"]))
    return f"{scale * row['value']:.3g}{ends}"
