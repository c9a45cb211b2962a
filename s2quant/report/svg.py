"""A chart as a file of its own, which needs nothing but a browser."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from s2quant.report.charts import WIDTH, Chart

_STYLE = (
    "text{font:11px sans-serif}.title{font-weight:bold}.grid{stroke:#ddd}.axis{stroke:#444}"
    ".model{fill:#0b5cad}.baseline{fill:#7d7f86}.floor{fill:#d4d5d8;stroke:#7d7f86}.model-range{stroke:#0b5cad;stroke-width:2.5}"
    ".arm0{fill:#7a8ca3}.arm1{fill:#d2691e}.arm2{fill:#2e8b57}.arm3{fill:#6a5acd}"
)


def svg_file(chart: Chart) -> str:
    """Write a chart as a file of its own, with title, legend and colours in it.

    Args:
        chart: The chart.

    Returns:
        A whole SVG file; every text is escaped.
    """
    top = 34 + 14 * len(chart.legend)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-top} {WIDTH:g} {chart.height + top:g}" role="img">',
        f"<title>{escape(chart.title)}</title><style>{_STYLE}</style>",
        f'<text class="title" x="4" y="{16 - top}">{escape(chart.title)}</text>',
        f'<text x="4" y="{30 - top}">{escape(chart.caption)}</text>',
    ]
    for place, (style, name) in enumerate(chart.legend):
        y = 44 - top + 14 * place
        lines.append(f'<rect class="{style}" x="4" y="{y - 9}" width="10" height="10"/>')
        lines.append(f'<text x="18" y="{y}">{escape(name)}</text>')
    for mark in chart.marks:
        attrs = " ".join(f"{key}={quoteattr(str(value))}" for key, value in mark.attrs.items())
        inner = escape(mark.text) if mark.kind == "text" else f"<title>{escape(mark.text)}</title>"
        lines.append(f'<{mark.kind} class="{mark.style}" {attrs}>{inner}</{mark.kind}>')
    return "\n".join([*lines, "</svg>", ""])
