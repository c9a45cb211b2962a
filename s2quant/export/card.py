"""The model card of a checkpoint folder: what it is, how it was made, what it cost, and the licence of the weights.

Figures come from the records of the run; a figure that was not measured is not printed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment

from s2quant.files import read_text
from s2quant.quantize.plan import Plan

BASE_MODEL = "fishaudio/s2-pro"
LICENSE_NAME = "fish-audio-research-license"
LICENSE_LINK = "https://huggingface.co/fishaudio/s2-pro/blob/main/LICENSE.md"
LICENSE_NOTICE = (
    "Weights derived from Fish Audio S2 Pro are under the Fish Audio Research License: free for research and "
    "non-commercial use, any commercial use needs a licence from Fish Audio. Built with Fish Audio. "
    "s2quant itself is Apache-2.0, which does not extend to the weights."
)


@dataclass(frozen=True, kw_only=True)
class Licence:
    """What a card says of the licence of the weights.

    Args:
        fields: For its metadata block, the base model among them.
        notice: In words.
    """

    fields: Mapping[str, str]
    notice: str


FISH = Licence(
    fields={
        "base_model": BASE_MODEL,
        "license": "other",
        "license_name": LICENSE_NAME,
        "license_link": LICENSE_LINK,
    },
    notice=LICENSE_NOTICE,
)


def licence_of(folder: Path) -> Licence:
    """Say which licence weights made from a checkpoint carry: the one its own card names, else that of S2 Pro.

    Args:
        folder: The checkpoint folder.

    Returns:
        The licence.
    """
    card = folder / "README.md"
    if not card.is_file():
        return FISH
    known = ModelCard(read_text(card), ignore_metadata_errors=True).data.to_dict()
    name = known.get("license")
    if not isinstance(name, str) or name == "other":
        return FISH
    base = known.get("base_model", folder.absolute().name)
    notice = (
        f"The weights carry the licence of {base}, from which they were made: {name}. s2quant itself is Apache-2.0."
    )
    return Licence(fields={"base_model": str(base), "license": name}, notice=notice)


_TEMPLATE = """---
{{ data }}
---

# {{ title }}

{{ description }}

{{ notice }}

## What is quantized

{{ quantized }} of {{ linears }} linears; {{ num_tensors }} tensors, {{ "{:,}".format(num_bytes) }} bytes \
({{ "%.1f" | format(100 * num_bytes / dense_bytes) }} % of the bf16 checkpoint's {{ "{:,}".format(dense_bytes) }}).

| kind | bits | group | linears | bytes |
|---|--:|--:|--:|--:|
{% for row in rows -%}
| {{ row.kind }} | {{ row.bits }} | {{ row.group }} | {{ row.count }} | {{ "{:,}".format(row.bytes) }} |
{% endfor %}
Kept in bf16: {{ kept }}.
{% if errors %}
## What it cost, linear by linear

Relative output error on calibration positions held out of the Hessians, {{ errors | length }} linears:
median {{ "%.4f" | format(median) }}, worst {{ "%.4f" | format(worst) }} ({{ worst_name }}); \
round-to-nearest on the same rows: median {{ "%.4f" | format(median_rtn) }}.
This is no measure of speech: `s2quant eval` compares speech.
{% endif %}
{{ made }}"""


def how_made(name: str, sha256: str, text: str, more: str) -> str:
    """Write the section on the recipe.

    Args:
        name: Of the recipe.
        sha256: Of its text.
        text: The recipe.
        more: What else is known: a sentence or several.

    Returns:
        Markdown.
    """
    return (
        f"## How it was made\n\nRecipe `{name}` (sha256 {sha256}) of s2quant, kept beside the weights in "
        f"`s2quant/recipe.yaml`;\n{more}\n\n```yaml\n{text.removesuffix(chr(10))}\n```\n"
    )


def model_card(
    plan: Plan,
    records: Sequence[Mapping[str, Any]],
    calibration: str,
    quantization: Mapping[str, Any],
    licence: Licence = FISH,
) -> str:
    """Write the card of a quantized checkpoint.

    Args:
        plan: What was done.
        records: One per quantized module.
        calibration: One sentence about the calibration set.
        quantization: The quantization_config.
        licence: Of the weights.

    Returns:
        README.md with its metadata block.
    """
    data = ModelCardData(
        **licence.fields,
        base_model_relation="quantized",
        pipeline_tag="text-to-speech",
        tags=["text-to-speech", "gptq", "s2quant", f"{quantization['bits']}-bit"],
    )
    errors = {r["module"]: r["output_error"] for r in records if r.get("output_error") is not None}
    rtn = sorted(r["output_error_rtn"] for r in records if r.get("output_error_rtn") is not None)
    worst = max(errors, key=lambda name: errors[name], default="")
    environment = Environment(autoescape=False, keep_trailing_newline=True)
    text = environment.from_string(_TEMPLATE).render(
        data=data.to_yaml(),
        title=f"{plan.recipe.name}, made with s2quant",
        description=plan.recipe.description.strip(),
        notice=licence.notice,
        quantized=len(plan.quantized),
        linears=len(plan.quantized) + len(plan.dense_linears),
        num_tensors=plan.num_tensors,
        num_bytes=plan.num_bytes,
        dense_bytes=plan.dense_bytes,
        rows=_rows(plan),
        kept="embeddings, norms, the codec, and " + (", ".join(f"`{n}`" for n in plan.dense_linears) or "no linear"),
        errors=errors,
        median=_median(sorted(errors.values())),
        median_rtn=_median(rtn),
        worst=errors.get(worst),
        worst_name=worst,
        made=how_made(
            plan.recipe.name,
            plan.recipe.sha256,
            plan.recipe.text,
            f"calibration: {calibration}. `manifest.json` names versions, device, seed and the hashes of all inputs.",
        ),
    )
    return str(ModelCard(text))


def _rows(plan: Plan) -> list[dict[str, Any]]:
    counts: Counter[tuple[str, int, int]] = Counter()
    sizes: Counter[tuple[str, int, int]] = Counter()
    for module in plan.quantized.values():
        assert module.settings is not None
        kind = ".".join(part for part in module.name.split(".")[-2:])
        key = (kind, module.settings.bits, module.settings.group_size)
        counts[key] += 1
        sizes[key] += module.num_bytes
    return [
        {
            "kind": kind,
            "bits": bits,
            "group": group,
            "count": counts[kind, bits, group],
            "bytes": sizes[kind, bits, group],
        }
        for kind, bits, group in counts
    ]


def _median(values: Sequence[float]) -> float | None:
    return values[len(values) // 2] if values else None
