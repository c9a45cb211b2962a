"""Heat maps and the curve: where things are drawn, by their geometry."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from s2quant.errors import UserError
from s2quant.files import write_json
from s2quant.report.charts import Chart
from s2quant.report.heat import STEPS, heat_maps, heat_scale
from s2quant.report.pareto import LETTER, pareto_chart
from s2quant.report.sensitivity import ranked_table, write_sensitivity_report


def unit(part: str, layer: int | None, kind: str, *damages: float | None) -> dict[str, Any]:
    candidates = [{"bits": bits, "kl": kl, "num_bytes": bits} for bits, kl in zip((4, 8), damages, strict=True)]
    return {"name": f"{part}.{layer}.{kind}", "part": part, "layer": layer, "kind": kind, "candidates": candidates,
            "dense_bytes": 16}  # fmt: skip


UNITS = [unit("slow", layer, kind, 1.0 / (1 + layer), 0.001) for layer in range(36) for kind in ("wqkv", "w2")] + [
    unit("fast", 0, "wqkv", None, 0.0),
    unit("fast", None, "output", 100.0, 0.5),
]


def test_heat_maps_draw_every_unit_once_inside_the_plot() -> None:
    maps = heat_maps(UNITS)
    assert [chart.title for chart in maps] == ["4 bit", "8 bit"]
    for chart in maps:
        cells = [mark for mark in chart.marks if mark.kind == "rect"]
        assert len(cells) == len(UNITS)
        places = {(mark.attrs["x"], mark.attrs["y"]) for mark in cells}
        assert len(places) == len(UNITS)
        assert all(mark.attrs["x"] + mark.attrs["width"] <= 360 for mark in cells)
        assert all(mark.attrs["y"] + mark.attrs["height"] <= chart.height - 14 for mark in cells)
        assert chart.legend == maps[0].legend
    styles = {mark.text.partition(",")[0]: mark.style for mark in maps[0].marks if mark.kind == "rect"}
    assert styles["fast.0.wqkv"] == "heat-none"
    assert styles["fast.None.output"] == "heat7"
    assert "fast.0.wqkv, 4 bit: not measured" in {mark.text for mark in maps[0].marks}


def test_the_scale_is_logarithmic_and_covers_everything() -> None:
    scale = heat_scale([1e-4, 1.0, None, 0.0, float("nan")])
    assert scale is not None
    assert [scale.step(value) for value in (0.0, 1e-4, 0.0099, 0.0101, 1.0)] == [0, 0, 3, 4, STEPS - 1]
    assert scale.legend()[0] == ("heat0", "1.0e-04 to 3.2e-04")
    assert heat_scale([None, 0.0]) is None
    assert heat_maps([unit("slow", 0, "wo", 0.0, None)]) == []
    one = heat_scale([0.5])
    assert one is not None
    assert one.step(0.5) == 0


def curve(*named: tuple[str, int, float]) -> dict[str, Any]:
    points = [
        {"num_bytes": 9_000_000 - 10**6 * n, "kl": 0.001 * 5**n if n else 0.0, "kl_together": None} for n in range(6)
    ]
    rows = [{"name": name, "num_bytes": size, "kl": kl, "kl_together": kl * 1.1} for name, size, kl in named]
    return {"points": points, "named": rows}


def spans(chart: Chart) -> list[tuple[float, float, float]]:
    found = []
    for mark in chart.marks:
        if mark.kind == "text" and not mark.text.replace(".", "").replace("e-", "").isdigit():
            width, x = LETTER * len(mark.text), mark.attrs["x"]
            start = mark.attrs["text-anchor"] == "start"
            found.append((x, x + width, mark.attrs["y"]) if start else (x - width, x, mark.attrs["y"]))
    return found


def test_names_on_the_curve_cover_no_other() -> None:
    crowd = [(f"recipe number {n}", 6_000_000 + 9_000 * n, 0.9 + 0.02 * n) for n in range(4)]
    chart = pareto_chart(curve(*crowd))
    assert chart is not None
    assert len(spans(chart)) == 4
    for one, other in itertools.combinations(spans(chart), 2):
        assert one[1] <= other[0] or other[1] <= one[0] or abs(one[2] - other[2]) > 10.9
    lines = [mark for mark in chart.marks if mark.style == "model-range"]
    assert len(lines) == 4  # five points above 0
    assert all(mark.attrs["x1"] >= mark.attrs["x2"] and mark.attrs["y1"] >= mark.attrs["y2"] for mark in lines)


def test_a_curve_without_damage_is_not_drawn() -> None:
    assert pareto_chart({"points": curve()["points"][:2], "named": []}) is None


def test_ranked_by_damage_what_is_not_finite_first() -> None:
    table = ranked_table(UNITS, 4, 3)
    assert [row[0] for row in table.rows] == ["fast.0.wqkv", "fast.None.output", "slow.0.w2"]
    assert table.rows[0][1] is None


def test_a_folder_of_another_kind_is_one_clear_error(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="sensitivity"):
        write_sensitivity_report(tmp_path)
    write_json(tmp_path / "sensitivity.json", {"units": []})
    write_json(tmp_path / "manifest.json", {})
    with pytest.raises(UserError, match="what `s2quant sensitivity` and `s2quant search` write"):
        write_sensitivity_report(tmp_path)
