"""What the token metrics say: tables and plots per codebook, by the baseline's confidence and by group of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from s2quant.report.charts import Chart, Number, Series, columns
from s2quant.report.format import adaptive, bounds, figure, finite, fixed, get
from s2quant.report.load import Run
from s2quant.report.tables import Cell, Table

KEYS = (
    "kl_mean",
    "kl_median",
    "kl_p90",
    "floor_kl_mean",
    "top1_agreement",
    "delta_nll",
    "kl_own_hidden",
    "kl_baseline_hidden",
)
BOOK_HEAD = (
    "Codebook",
    "KL mean, nats",
    "median",
    "p90",
    "Floor KL, nats",
    "Top-1 agreement, %",
    "Delta NLL, nats",
    "KL, own hidden state",
    "KL, baseline's hidden state",
)
GROUP_HEAD = (
    "Layers",
    "Quantized modules",
    "Semantic KL mean, nats",
    "p90",
    "Top-1 agreement, %",
    "Residual KL mean, nats",
    "End token at the true end, %",
    "before it, %",
)


def token_tables(run: Run) -> list[Table]:
    """Token metrics in figures.

    Args:
        run: The evaluation.

    Returns:
        Per codebook, at the end of speech, by confidence and by group of layers; those that were measured.
    """
    tokens = run.results.get("tokens")
    frames = fixed(get(tokens, "num_frames"), 0)
    over = f", over {frames} frames" if frames else ""
    tables = []
    if rows := [_codebook(row) for row in get(tokens, "codebooks") or []]:
        tables.append(Table(caption=f"Token metrics per codebook{over}", head=BOOK_HEAD, rows=rows))
    if end := get(tokens, "im_end"):
        tables.append(_end_table(end))
    if rows := [_bucket(row) for row in get(tokens, "confidence") or []]:
        head = ("Baseline's confidence, %", "Frames", "KL mean, nats", "Top-1 agreement, %")
        tables.append(Table(caption="Semantic codebook by the baseline's confidence", head=head, rows=rows))
    return [*tables, *_group_tables(tokens)]


def _codebook(row: dict[str, Any]) -> tuple[Cell, ...]:
    figures = [
        figure(row.get(key), "fraction" if key == "top1_agreement" else "nats", key == "delta_nll") for key in KEYS
    ]
    return (codebook_name(row), *figures)


def codebook_name(row: dict[str, Any]) -> str:
    """Name a codebook.

    Args:
        row: Its entry in results.json.

    Returns:
        "0 semantic", or its number.
    """
    number = row.get("codebook")
    return "0 semantic" if number == 0 else str(number)


def _end_table(end: dict[str, Any]) -> Table:
    rows = []
    for name, suffix in (("At the true end", "at_end"), ("Before it", "before")):
        values = [get(end, f"{arm}_{suffix}") for arm in ("baseline", "model")]
        rows.append((name, *(None if finite(value) is None else adaptive(100 * value) for value in values)))
    caption = "Probability of the end token"
    return Table(caption=caption, head=("Where", "Baseline, %", "Model, %"), rows=rows)


def _bucket(row: dict[str, Any]) -> tuple[Cell, ...]:
    return (
        _range(row),
        fixed(row.get("n"), 0),
        adaptive(row.get("kl_mean")),
        figure(row.get("top1_agreement"), "fraction"),
    )


def _group_tables(tokens: Any) -> list[Table]:
    """Damage of each group of layers alone, and of all of them: two tables, or none where it was not split."""
    groups: Sequence[dict[str, Any]] = get(tokens, "layer_groups") or []
    if not groups:
        return []
    semantic, *residual = get(tokens, "codebooks") or [{}]
    every = [row.get("kl_mean") for row in residual]
    known = [value for value in map(finite, every) if value is not None]
    whole = {
        "name": "all",
        "num_quantized": sum(int(row.get("num_quantized") or 0) for row in groups),
        "kl_semantic": semantic.get("kl_mean"),
        "kl_semantic_p90": semantic.get("kl_p90"),
        "top1_agreement": semantic.get("top1_agreement"),
        "kl_residual": every,
        "kl_residual_mean": sum(known) / len(known) if known and len(known) == len(every) else None,
        "im_end": get(tokens, "im_end"),
    }
    rows = [*groups, whole]
    ends = [figure(get(tokens, "im_end", f"baseline_{where}"), "fraction") for where in ("at_end", "before")]
    note = f"; its own end token has {ends[0]} % at the true end and {ends[1]} % before it" if None not in ends else ""
    names = [f"Residual {row.get('codebook')}" for row in residual]
    return [
        Table(
            caption="Token damage by group of layers: the baseline with that group quantized alone" + note,
            head=GROUP_HEAD,
            rows=[_group(row) for row in rows],
        ),
        Table(
            caption="KL of the residual codebooks by group of layers, nats",
            head=("Layers", *names),
            rows=[(group_name(row), *map(adaptive, row.get("kl_residual") or [None] * len(names))) for row in rows],
        ),
    ]


def _group(row: dict[str, Any]) -> tuple[Cell, ...]:
    ends = [figure(get(row, "im_end", f"model_{where}"), "fraction") for where in ("at_end", "before")]
    kls = [adaptive(row.get(key)) for key in ("kl_semantic", "kl_semantic_p90")]
    return (
        group_name(row),
        fixed(row.get("num_quantized"), 0),
        *kls,
        figure(row.get("top1_agreement"), "fraction"),
        adaptive(row.get("kl_residual_mean")),
        *ends,
    )


def group_name(row: dict[str, Any]) -> str:
    """Name a group of layers.

    Args:
        row: Its entry in results.json.

    Returns:
        Such as "Slow 0\u20138", "Fast" or "All".
    """
    return str(row.get("name") or "?").replace("-", "\u2013").capitalize()


def _range(row: dict[str, Any]) -> str:
    low, high = finite(row.get("low")), finite(row.get("high"))
    return f"{100 * (low or 0):.0f}\u2013{100 * (1 if high is None else high):.0f}"


def token_charts(run: Run) -> list[Chart]:
    """Token metrics as plots.

    Args:
        run: The evaluation.

    Returns:
        Those for which there are figures.
    """
    books: Sequence[dict[str, Any]] = get(run.results, "tokens", "codebooks") or []
    buckets: Sequence[dict[str, Any]] = get(run.results, "tokens", "confidence") or []
    groups: Sequence[dict[str, Any]] = get(run.results, "tokens", "layer_groups") or []
    names, ranges = [str(row.get("codebook")) for row in books], [_range(row) for row in buckets]

    def of(rows: Sequence[dict[str, Any]], key: str) -> list[Number]:
        return [finite(row.get(key)) for row in rows]

    spread = [bounds([row.get("kl_median"), row.get("kl_p90")]) for row in books]
    charts = [
        columns(
            "KL by codebook",
            "Nats; the dot is the mean, the line runs from the median to the 90th percentile",
            names,
            [
                Series(name="noise floor", style="floor", shape="tick", values=of(books, "floor_kl_mean")),
                Series(name="model", style="model", shape="dot", values=of(books, "kl_mean"), ranges=spread),
            ],
        ),
        columns(
            "Top-1 agreement by codebook",
            "Percent of frames in which both would choose the same code",
            names,
            [Series(name="model", style="model", shape="dot", values=of(books, "top1_agreement"))],
            "fraction",
            False,
        ),
        columns(
            "Slow or fast part?",
            "KL in nats, with true previous codes; the second bar swaps in the baseline's "
            "hidden state, so what is left is the fast part's",
            names,
            [
                Series(name="own hidden state", style="model", shape="bar", values=of(books, "kl_own_hidden")),
                Series(
                    name="baseline's hidden state",
                    style="baseline",
                    shape="bar",
                    values=of(books, "kl_baseline_hidden"),
                ),
            ],
        ),
        columns(
            "Delta NLL by codebook",
            "Nats by which the baseline's own codes became less likely",
            names,
            [Series(name="model", style="model", shape="bar", values=of(books, "delta_nll"))],
        ),
        columns(
            "KL by confidence",
            "Nats, semantic codebook, by the baseline's top probability in percent",
            ranges,
            [Series(name="model", style="model", shape="bar", values=of(buckets, "kl_mean"))],
        ),
        columns(
            "Agreement by confidence",
            "Percent top-1 agreement, semantic codebook, by the baseline's top probability in percent",
            ranges,
            [Series(name="model", style="model", shape="dot", values=of(buckets, "top1_agreement"))],
            "fraction",
            False,
        ),
        columns(
            "Damage by group of layers",
            "KL in nats of the baseline with one group of layers quantized, block numbers of the Slow AR below",
            [group_name(row).removeprefix("Slow ") for row in groups],
            [
                Series(name="semantic", style="model", shape="bar", values=of(groups, "kl_semantic")),
                Series(name="residual, mean", style="baseline", shape="bar", values=of(groups, "kl_residual_mean")),
            ],
        ),
    ]
    return [chart for chart in charts if chart is not None]
