"""What the token metrics say: tables and plots per codebook and by the baseline's confidence."""

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


def token_tables(run: Run) -> list[Table]:
    """Token metrics in figures.

    Args:
        run: The evaluation.

    Returns:
        Per codebook, at the end of speech, and by confidence; those that were measured.
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
    return tables


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
    ]
    return [chart for chart in charts if chart is not None]
