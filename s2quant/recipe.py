"""A recipe: which linears are quantized, how, and on what calibration text.

A recipe is a YAML file that can be read, diffed and shared. `rules` are matched against the module names on
disk; the first match wins. Unknown keys, values out of range and contradictions are refused here, with every
offender in one message; whether the rules fit a model is checked by `s2quant.quantize.plan`.

Patterns: `*` stands for one name part (no dot), `**` for any number of parts, `{a,b}` for alternatives.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from s2quant.errors import UserError, shorten_list
from s2quant.files import read_text, sha256_text
from s2quant.sampling import Sampling, sampling_faults

METHODS = ("gptq", "rtn")
BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128)
CODES = ("speak", "none")


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """How one linear is quantized.

    Args:
        method: "gptq", or "rtn" for round-to-nearest.
        bits: Bits per weight: 2, 3, 4 or 8.
        group_size: Input channels that share a scale: 16, 32, 64 or 128.
        sym: Symmetric grid around zero; the only kind written.
        desc_act: GPTQ visits input channels by falling activation energy, groups are formed in that order.
        act_group_aware: gptqmodel's variant that orders within groups only; excludes desc_act.
        damp_percent: Fraction of the Hessian's mean diagonal added to it.
    """

    method: Literal["gptq", "rtn"] = "gptq"
    bits: int = 4
    group_size: int = 32
    sym: bool = True
    desc_act: bool = True
    act_group_aware: bool = False
    damp_percent: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of the recipe's `rules`.

    Args:
        pattern: Pattern of module names.
        settings: How to quantize the matches, or None to keep them as they are.
    """

    pattern: str
    settings: LinearSettings | None

    def matches(self, name: str) -> bool:
        """Tell whether the rule speaks of a module.

        Args:
            name: Module name as on disk, without `.weight`.

        Returns:
            True when the pattern covers the whole name.
        """
        return any(re.fullmatch(pattern_to_regex(one), name) for one in expand_braces(self.pattern))


@dataclass(frozen=True, kw_only=True)
class PositionWeights:
    """How much each calibration position counts in the Hessians of the Slow AR.

    With w the weight of a position and x its input, H = 2 sum(w x x^T) / sum(w). So only the ratio of the two matters,
    and a weight of 0 leaves a kind of position out. The Fast AR has speech positions only and knows no weights.

    Args:
        text: Of a position that is no audio frame: prompt, tags, im_end, and of a voice's transcript.
        speech: Of an audio frame, drawn or of a voice's recording.
    """

    text: float = 1.0
    speech: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Where calibration positions come from.

    Args:
        source: JSONL, parquet or text file relative to the recipe, or a `datasets` hub name written `hf:NAME`.
        codes: "speak": the model to be quantized speaks each line; "none": text only.
        num_sequences: Sequences wanted.
        max_positions: Positions a sequence is cut to (text and frames).
        max_frames: Most frames spoken per line; a line that does not end by itself is dropped and counted.
        batch_size: Sequences per teacher-forced pass.
        holdout: Fraction of sequences kept out of the Hessians to measure the output error.
        seed: Seed of the choice and of the speech.
        sampling: How the lines are spoken.
        require_end: Whether a clip without an end token counts as failed.
        weights: How much text and speech positions count.
    """

    source: str
    codes: Literal["speak", "none"] = "speak"
    num_sequences: int = 256
    max_positions: int = 1024
    max_frames: int = 768
    batch_size: int = 8
    holdout: float = 0.0625
    seed: int = 0
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    require_end: bool = True
    weights: PositionWeights = dataclasses.field(default_factory=PositionWeights)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe.

    Args:
        name: Short name.
        description: What it is for.
        base: Settings that every `quantize` rule starts from.
        rules: First match wins.
        calibration: Calibration source.
        strict: Whether a fallback, a grown damping or a skipped module stops the run.
        text: The file as read.
        path: Where it was read.
    """

    name: str
    description: str
    base: LinearSettings
    rules: tuple[Rule, ...]
    calibration: Calibration
    strict: bool
    text: str
    path: Path

    @property
    def sha256(self) -> str:
        """Hash of the recipe's text."""
        return sha256_text(self.text)

    @property
    def calibration_path(self) -> Path:
        """The calibration source as a path, relative sources taken from the recipe's folder."""
        return (self.path.parent / self.calibration.source).resolve()


def expand_braces(pattern: str) -> list[str]:
    """Write out the alternatives of a pattern.

    Args:
        pattern: Pattern with `{a,b}`, not nested.

    Returns:
        One pattern without braces per combination, in order.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [whole for option in match.group(1).split(",") for whole in expand_braces(head + option.strip() + tail)]


def pattern_to_regex(pattern: str) -> str:
    """Translate a pattern without braces to a regular expression for `re.fullmatch`.

    Args:
        pattern: Pattern with `*` and `**`.

    Returns:
        The regular expression.
    """
    parts = re.split(r"(\*\*|\*)", pattern)
    return "".join({"**": ".*", "*": "[^.]*"}.get(part, re.escape(part)) for part in parts)


def default_recipe(name: str) -> Path:
    """Find a recipe that comes with s2quant.

    Args:
        name: Its name, such as "s2-pro-w4a16".

    Returns:
        The file in the folder `recipes` beside the package.

    Raises:
        UserError: There is no such recipe.
    """
    folder = Path(__file__).resolve().parent.parent / "recipes"
    if not (folder / f"{name}.yaml").is_file():
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        raise UserError(
            f"recipe {name!r}; {folder} has {', '.join(known) or 'none'}",
            "a recipe that comes with s2quant",
            "run from a checkout, or name a file",
        )
    return folder / f"{name}.yaml"


class _Loader(yaml.SafeLoader):
    """YAML without the trap that of two equal keys the last one wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that comes twice, then do as usual."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: The YAML file.

    Returns:
        The recipe.

    Raises:
        UserError: The file is unreadable, not YAML, or not a recipe; every offender is listed.
    """
    text = read_text(path)
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2001-99-99
        raise UserError(f"{path}: {error}", "a YAML recipe", "mend the syntax") from error
    faults: list[str] = []
    recipe = _recipe(data, text, path, faults)
    if faults or recipe is None:
        raise UserError(
            f"recipe {path}:\n{shorten_list(faults)}", "a recipe as in recipes/README.md", "mend the recipe"
        )
    return recipe


def _recipe(data: Any, text: str, path: Path, faults: list[str]) -> Recipe | None:
    if not isinstance(data, Mapping):
        faults.append("the file holds no mapping")
        return None
    _unknown(data, {"name", "description", "quantize", "rules", "calibration", "strict"}, "", faults)
    base = _settings(data.get("quantize", {}), LinearSettings(), "quantize", faults)
    rules = _rules(data.get("rules"), base, faults)
    calibration = _calibration(data.get("calibration"), faults)
    name, description, strict = data.get("name"), data.get("description", ""), data.get("strict", True)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        faults.append(f"name is {name!r}, not a word of lower-case letters, digits, '-' and '.'")
    if not isinstance(description, str):
        faults.append(f"description is {description!r}, not text")
    if not isinstance(strict, bool):
        faults.append(f"strict is {strict!r}, not true or false")
    if faults or calibration is None:
        return None
    return Recipe(
        name=str(name),
        description=description,
        base=base,
        rules=rules,
        calibration=calibration,
        strict=strict,
        text=text,
        path=path.resolve(),
    )


def _unknown(table: Mapping[Any, Any], known: set[str], where: str, faults: list[str]) -> None:
    prefix = f"{where}: " if where else ""
    faults += [f"{prefix}unknown key {key!r} (known: {', '.join(sorted(known))})" for key in table if key not in known]


def _typed(table: Mapping[str, Any], default: Any, where: str, faults: list[str]) -> dict[str, Any]:
    """Take the scalar fields of `default` from a table, each of the default's type."""
    values = {}
    for field in dataclasses.fields(default):
        if field.name not in table:
            continue
        value, kind = table[field.name], type(getattr(default, field.name))
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            faults.append(f"{where}.{field.name} is {value!r}, not {kind.__name__}")
        else:
            values[field.name] = value
    return values


def _nested(table: Mapping[str, Any], key: str, default: Any, faults: list[str]) -> Any:
    """Take a mapping of scalars out of the calibration block."""
    inner, where = table.get(key, {}), f"calibration.{key}"
    if not isinstance(inner, Mapping):
        faults.append(f"{where} is {inner!r}, not a mapping")
        return default
    _unknown(inner, {field.name for field in dataclasses.fields(default)}, where, faults)
    return dataclasses.replace(default, **_typed(inner, default, where, faults))


def _weight_faults(calibration: Calibration) -> list[str]:
    weights = calibration.weights
    faults = [
        f"calibration.weights.{name} is {value}, not a finite number of 0 or more"
        for name, value in dataclasses.asdict(weights).items()
        if not 0 <= value < math.inf
    ]
    if weights.text == weights.speech == 0:
        faults.append("calibration.weights: both are 0, so that no position counts")
    elif weights.text == 0 and calibration.codes == "none":
        faults.append("calibration.weights.text is 0 and codes is none: there are only text positions")
    return faults


def _settings(table: Any, base: LinearSettings, where: str, faults: list[str]) -> LinearSettings:
    if not isinstance(table, Mapping):
        faults.append(f"{where} is {table!r}, not a mapping")
        return base
    _unknown(table, {field.name for field in dataclasses.fields(LinearSettings)}, where, faults)
    values = dataclasses.replace(base, **_typed(table, base, where, faults))
    for name, allowed in (("method", METHODS), ("bits", BITS), ("group_size", GROUP_SIZES), ("sym", (True,))):
        if name in table and getattr(values, name) not in allowed:  # what is inherited has been checked
            faults.append(f"{where}.{name} is {getattr(values, name)!r}, not one of {allowed}")
    if "damp_percent" in table and not 0 < values.damp_percent < 1:
        faults.append(f"{where}.damp_percent is {values.damp_percent}, not between 0 and 1")
    if values.desc_act and values.act_group_aware and table.keys() & {"desc_act", "act_group_aware"}:
        faults.append(f"{where}: desc_act and act_group_aware exclude each other")
    return values


def _rules(table: Any, base: LinearSettings, faults: list[str]) -> tuple[Rule, ...]:
    if not isinstance(table, list) or not table:
        faults.append("rules is missing or empty: every linear must be matched by one")
        return ()
    rules = []
    for index, row in enumerate(table):
        where = f"rules[{index}]"
        verbs = [verb for verb in ("keep", "quantize") if isinstance(row, Mapping) and verb in row]
        if len(verbs) != 1 or not isinstance(row[verbs[0]], str):
            faults.append(f"{where} is {row!r}, not one 'keep: PATTERN' or 'quantize: PATTERN'")
            continue
        rest = {key: value for key, value in row.items() if key not in verbs}
        if verbs[0] == "keep":
            _unknown(rest, set(), f"{where} (keep)", faults)
            rules.append(Rule(pattern=row["keep"], settings=None))
        else:
            rules.append(Rule(pattern=row["quantize"], settings=_settings(rest, base, where, faults)))
    return tuple(rules)


def _calibration(table: Any, faults: list[str]) -> Calibration | None:
    if not isinstance(table, Mapping) or not isinstance(table.get("source"), str):
        faults.append("calibration.source is missing: a JSONL, parquet or text file, or hf:NAME")
        return None
    _unknown(table, {field.name for field in dataclasses.fields(Calibration)}, "calibration", faults)
    default = Calibration(source="")
    scalars = {key: value for key, value in table.items() if key not in ("sampling", "weights")}
    values = _typed(scalars, default, "calibration", faults)
    sampling = _nested(table, "sampling", Sampling(), faults)
    faults += sampling_faults(sampling, "calibration.sampling")
    weights = _nested(table, "weights", PositionWeights(), faults)
    calibration = dataclasses.replace(default, sampling=sampling, weights=weights, **values)
    faults += _weight_faults(calibration)
    if calibration.codes not in CODES:
        faults.append(f"calibration.codes is {calibration.codes!r}, not one of {CODES}")
    for name in ("num_sequences", "max_positions", "max_frames", "batch_size"):
        if getattr(calibration, name) < 1:
            faults.append(f"calibration.{name} is {getattr(calibration, name)}, not positive")
    if not 0 <= calibration.holdout < 1:
        faults.append(f"calibration.holdout is {calibration.holdout}, not a fraction below 1")
    return calibration
