"""A choice of bits -> a recipe that a person can read: few rules, the first match wins, the evidence on top.

For every kind of linear the most common verdict becomes the rule for all of its layers, and what differs from it is
named before, layers of one verdict in one rule. Kinds with the same verdict on the same layers share a rule.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from s2quant.checkpoint.layout import FAST
from s2quant.errors import UserError
from s2quant.recipe import LinearSettings, Recipe

Verdict = LinearSettings | None
SOURCE_NOTE = (
    "calibration.source is relative to this file: moved elsewhere, it needs the source moved along or another path"
)


def make_rules(verdicts: Mapping[str, Verdict], base: LinearSettings) -> list[dict[str, Any]]:
    """Compress verdicts to rules.

    Args:
        verdicts: How each linear is quantized, None to keep it, in natural order; every linear is there.
        base: The settings that rules start from.

    Returns:
        Rules as a recipe's YAML has them. Applied in order, they give every linear its verdict, and none is without
        effect.
    """
    kinds: dict[tuple[str, str], dict[int, Verdict]] = {}
    rules = []
    fast = [name for name in verdicts if name.startswith(f"{FAST}.")]
    if fast and all(verdicts[name] is None for name in fast):
        rules.append({"keep": f"{FAST}.**"})
        verdicts = {name: verdict for name, verdict in verdicts.items() if name not in fast}
    for name, verdict in verdicts.items():
        match = re.fullmatch(r"(.*\.layers)\.(\d+)\.(.*)", name)
        if match is None:
            rules.append(_rule(name, verdict, base))
        else:
            kinds.setdefault((match[1], match[3]), {})[int(match[2])] = verdict
    defaults: dict[tuple[str, Verdict], list[str]] = {}
    others: dict[tuple[str, Verdict, tuple[int, ...]], list[str]] = {}
    for (root, kind), layers in kinds.items():
        common = _most_common(list(layers.values()))
        defaults.setdefault((root, common), []).append(kind)
        for verdict in dict.fromkeys(layers.values()):
            if verdict != common:
                chosen = tuple(layer for layer, one in layers.items() if one == verdict)
                others.setdefault((root, verdict, chosen), []).append(kind)
    for (root, verdict, chosen), names in others.items():
        rules.append(_rule(f"{root}.{_either(list(map(str, chosen)))}.{_either(names)}", verdict, base))
    for root in dict.fromkeys(root for root, _ in defaults):
        groups = {verdict: names for (of, verdict), names in defaults.items() if of == root}
        if set(groups) == {None}:
            rules.append({"keep": f"{root}.**"})  # the rules before have taken what is quantized of it
            continue
        rules += [_rule(f"{root}.*.{_either(names)}", verdict, base) for verdict, names in groups.items()]
    return rules


def _most_common(verdicts: Sequence[Verdict]) -> Verdict:
    counts = Counter(verdicts)
    return max(dict.fromkeys(verdicts), key=lambda verdict: counts[verdict])  # of equals the first


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"


def _rule(pattern: str, verdict: Verdict, base: LinearSettings) -> dict[str, Any]:
    if verdict is None:
        return {"keep": pattern}
    ours, default = asdict(verdict), asdict(base)
    return {"quantize": pattern} | {key: value for key, value in ours.items() if value != default[key]}


def common_settings(verdicts: Mapping[str, Verdict]) -> LinearSettings:
    """Choose the settings that the rules start from: the most common ones.

    Args:
        verdicts: How each linear is quantized.

    Returns:
        The settings.

    Raises:
        UserError: Nothing is quantized.
    """
    quantized = [verdict for verdict in verdicts.values() if verdict is not None]
    common = _most_common(quantized) if quantized else None
    if common is None:
        raise UserError(
            "a goal that every linear meets in bf16",
            "one that calls for quantizing",
            "lower --budget, or raise --target-kl",
        )
    return common


def recipe_text(
    name: str,
    description: str,
    verdicts: Mapping[str, Verdict],
    origin: Recipe,
    source: str,
    evidence: Sequence[str],
) -> str:
    """Write a recipe.

    Args:
        name: Its name.
        description: What it is for.
        verdicts: How each linear is quantized.
        origin: The recipe whose calibration and strictness it takes over.
        source: The calibration source, as named from where the recipe will be.
        evidence: Lines for the comment on top, without `#`; where the source is a file, a line on it is added.

    Returns:
        The YAML.
    """
    base = common_settings(verdicts)
    calibration = {key: value for key, value in asdict(origin.calibration).items() if key != "source"}
    body = {
        "name": name,
        "description": description,
        "quantize": asdict(base),
        "rules": make_rules(verdicts, base),
        "calibration": {"source": source} | calibration,
        "strict": origin.strict,
    }
    place = [] if source.startswith("hf:") else [SOURCE_NOTE]
    comment = "".join(f"# {line}".rstrip() + "\n" for line in (*evidence, *place))
    return comment + yaml.safe_dump(body, sort_keys=False, width=110, allow_unicode=True)


def source_from(source: str, folder: Path, out: Path, given: Path | None) -> str:
    """Name the calibration source from where a recipe will be.

    Args:
        source: As sensitivity.json has it: `hf:NAME`, or relative to its folder.
        folder: That folder.
        out: The recipe's path.
        given: The file, if the user named it.

    Returns:
        `hf:NAME`, or a path relative to the recipe.

    Raises:
        UserError: There is no such file.
    """
    if given is None and source.startswith("hf:"):
        return source
    path = given if given is not None else Path(os.path.normpath(folder.resolve() / source))
    if not path.is_file():
        raise UserError(
            f"the calibration source {path} is not there",
            "the text that the recipe calibrates on",
            "name it with --source FILE",
        )
    return os.path.relpath(path.resolve(), out.resolve().parent)
