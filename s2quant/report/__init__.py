"""The report of an evaluation: markdown, a self-contained HTML page, and a blind listening test.

Reads what `s2quant eval` wrote (records.jsonl, results.json, audio) and never measures anything itself. This is the
only place where a rate becomes a percentage. Missing figures are drawn as "not measured", never as 0.
"""

from s2quant.report.write import write_report

__all__ = ["write_report"]
