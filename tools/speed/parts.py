"""The parts of `tools/speed_check.py`, each a function of the run that it writes into."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from s2quant.checkpoint.config import S2Config
from s2quant.export.random import s2_pro_config, tiny_config
from s2quant.runtime.kernels import shapes
from s2quant.runtime.kernels.choice import is_many, plan_for
from s2quant.runtime.kernels.launch import How
from s2quant.runtime.kernels.linear import columns_for
from s2quant.runtime.kernels.many import rows_of
from s2quant.runtime.kernels.weights import Block
from tools.speed import frames, linears, others, settle
from tools.speed.check import Check, as_first, for_slots
from tools.speed.timing import bandwidth, card_state

ROOT = Path(__file__).resolve().parents[2]
BATCHES = {"s2-pro": (1, 8, 32, 64), "tiny": (1,)}
MODELS = {
    "s2-pro": {
        "w4a16": "s2-pro-w4a16", "bf16": None, "fast8": "s2-pro-w4a16-fast8", "w8a16": "s2-pro-w8a16",
        "g128": "s2-pro-w4a16-g128",
    },
    "tiny": {"w4a16": "tiny-w4a16", "bf16": None, "fast8": "tiny-w4a16-fast8", "g128": "tiny-w4a16-g64"},
}  # fmt: skip
ON_REQUEST = ("g128",)  # of --models: kernels of their own that all else can do without
ROWS = {"s2-pro": (1, 2, 8, 16, 17, 24, 32, 47, 64), "tiny": (1, 9, 17)}
TUNED_ROWS = {"s2-pro": (64, 32, 1, 16), "tiny": (1,)}
LEAST_COMPILE_S = 60
LIMITS = {"out": 6e-3, "hidden": 1e-5, "squares": 1e-5}  # bf16 rounding of the result; float32 sums


def config_of(size: str) -> Any:
    """Give the configuration of a size; the tiny one is one that the kernels take."""
    if size == "s2-pro":
        return S2Config.from_json(s2_pro_config())
    raw = tiny_config()
    raw["text_config"] |= {"intermediate_size": 256}
    raw["audio_decoder_config"] |= {"intermediate_size": 256, "n_layer": 1}
    return S2Config.from_json(raw)


def sizes_of(config: Any) -> dict[str, int]:
    """Give the sizes that the linears have."""
    slow = config.slow
    return {
        "dim": slow.dim,
        "qkv": slow.qkv_dim,
        "heads": slow.n_head * slow.head_dim,
        "middle": slow.intermediate_size,
        "semantic": config.semantic_end_id - config.semantic_begin_id + 1,
        "residual": min(1024, config.codebook_size),
    }


def bandwidth_part(check: Check) -> None:
    check.facts["bandwidth"] = bandwidth(check.device, 8 << 30 if check.cuda else 1 << 22)
    check.facts["card"] = card_state() if check.cuda else None
    check.say(f"{check.facts['bandwidth']} {check.facts['card']}")


def compile_part(check: Check) -> None:
    """Compile what the parts after it launch, in parallel; on a GPU only."""
    if not check.cuda:
        return
    columns = {what_differs(rows, check.how): rows for rows in ROWS[check.size]}.values()
    cases = linears.cases(sizes_of(config_of(check.size)))
    wanted = [job for case in cases for rows in columns for job in linears.jobs(case, rows, False, check.how)]
    for how in trials(check).values():
        for case in cases:
            each = {rows_of(rows): rows for rows in trial_rows(check, case)}.values()
            wanted += [job for rows in each for job in linears.jobs(case, rows, False, how)]
    sizes = (480, min(1024, config_of(check.size).codebook_size))
    for name in models_of(check):
        batches = {"w4a16": (1, 3, 8, 32, 64), "bf16": (1, 3, 8, 32, 64)}.get(name, (1, 64))
        for batch in batches:
            wanted += frames.listed(model_of(check, name), batch, *sizes, for_slots(check.how, batch))
    for name, batch, _, how in variants_of(check):
        wanted += frames.listed(model_of(check, name), batch, *sizes, how)
    if "settle" in check.options.only:  # ways that an earlier run has timed; those of this one are compiled by then
        for name, batch in settled(check):
            how = for_slots(check.how, batch)
            wanted += settle.jobs_of(listed_jobs(check, name, batch), check.facts.get("tune", []), how)
    for case in cases:  # what the part "linears" compares many rows with
        for rows in (32, 64):
            wanted += linears.jobs(case, rows, False, replace(check.how, many_rows=False))
    wanted = list(dict.fromkeys(wanted))
    check.say(f"{len(wanted)} kernels to compile")
    until = max(check.deadline, time.perf_counter() + LEAST_COMPILE_S)  # listing compiles what is no linear
    failed = linears.compile_all(wanted, min(14, os.cpu_count() or 1), until)
    check.facts["compiled"] = {"wanted": len(wanted), "not": len(failed)}


def listed_jobs(check: Check, name: str, batch: int) -> list[linears.Job]:
    """List the linears of a frame, as it is launched."""
    position, residual = 480 if check.big else 40, min(1024, config_of(check.size).codebook_size)
    return frames.listed(model_of(check, name), batch, position, residual, for_slots(check.how, batch))


def what_differs(rows: int, how: Any) -> tuple[Any, ...]:
    """Say what kernels of other numbers of rows are compiled apart for."""
    return ("many", rows_of(rows)) if is_many(rows, how) else (columns_for(rows), rows < 8)


def switched(how: How, key: str) -> tuple[str, How]:
    """Switch one part of how kernels are launched: its title, and the way with that part the other way round."""
    on = getattr(how, key)
    return f"without {key}" if on else f"with {key}", replace(how, **{key: not on})


def trials(check: Check) -> dict[str, How]:
    """List ways to multiply many rows that are tried beside the one in use, as the part "variants" names them."""
    return dict([switched(check.how, "shared_shifts")]) if check.how.many_rows else {}


def trial_rows(check: Check, case: linears.Case) -> list[int]:
    """List the numbers of rows for which trials change a linear: only in packed ones, whose codes are unpacked."""
    return [rows for rows in ROWS[check.size] if case.kind != "bf16" and is_many(rows, check.how)]


def kernels_part(check: Check) -> None:
    cases = linears.cases(sizes_of(config_of(check.size)))
    named = {f"{case.kind} {case.name}": (case, "", check.how, [*ROWS[check.size]]) for case in cases}
    for title, way in trials(check).items():
        its = {case: trial_rows(check, case) for case in cases}
        named |= {f"{case.kind} {case.name} {title}": (case, title, way, rows) for case, rows in its.items() if rows}
    right = wrong = 0
    for name, found in check.items("kernels", list(named)):
        case, title, how, numbers = named[name]
        for rows in numbers:
            torch.manual_seed(rows)
            row: dict[str, Any] = {"case": name, "rows": rows, "right": False}
            check.tried(row, lambda: {"errors": linears.errors(case, rows, check.device, how)})  # noqa: B023
            row["right"] = all(value <= LIMITS[key] for key, value in row.get("errors", {"out": 9.0}).items())
            right, wrong = right + row["right"], wrong + (not row["right"] and not title)
            if not row["right"]:
                check.say(f"WRONG {row}")
                check.wrong_ways |= {title} - {""}
            found.append(row)
    check.say(f"{right} of {sum(len(job[3]) for job in named.values())} products right")
    if wrong and (check.how.flat or check.how.many_rows):  # so that what follows is measured on kernels that are right
        faults = [row for row in check.facts["kernels"] if not row.get("right", True) and named[row["case"]][1] == ""]
        only_many = all(is_many(row["rows"], check.how) for row in faults)
        check.how = replace(check.how, many_rows=False) if only_many else as_first(check.how)
        check.facts.setdefault("kernels_wrong", []).extend(faults)
        way = "without the kernel of many rows" if only_many else "launched as at first"
        check.facts["fell_back"] = f"{wrong} products wrong: {way} from here on"
        check.say(check.facts["fell_back"])
        kernels_part(check)


def tune_part(check: Check) -> None:
    cases = linears.cases(sizes_of(config_of(check.size)))
    pairs = {f"{case.kind} {case.name} M={rows}": (case, rows) for rows in TUNED_ROWS[check.size] for case in cases}
    pairs = {name: pair for name, pair in pairs.items() if re.search(check.options.cases, name)}
    left_out: set[linears.Job] = set()
    if check.cuda:
        wanted = [job for case, rows in pairs.values() for job in linears.jobs(case, rows, True, check.how)]
        half = time.perf_counter() + 0.5 * (check.deadline - time.perf_counter())
        left_out = linears.compile_all(wanted, min(14, os.cpu_count() or 1), half)
        check.say(f"{len(wanted)} shapes compiled, {len(left_out)} not")
    speed = check.facts.get("bandwidth", {}).get("read_bytes_per_s", 4.3e12)
    for name, found in check.items("tune", list(pairs)):
        case, rows = pairs[name]
        row: dict[str, Any] = {"case": f"{case.kind} {case.name}"}
        check.tried(row, lambda: linears.tune(case, rows, check.device, check.deadline, check.how, left_out))  # noqa: B023
        if "failed" not in row:
            best = row.pop("best")
            (shapes.TUNED_MANY if isinstance(best, Block) else shapes.TUNED)[tuple(row["key"])] = best
            check.say(
                f"{name:20} {row['us']:6.1f} us (rule {row['us_rule'] or 0:6.1f}, floor "
                f"{1e6 * row['bytes'] / speed:5.1f}) {row['shape']} tried {row['tried'][:4]}"
            )
        found.append(row)
        text = linears.table(shapes.TUNED, shapes.TUNED_MANY, check.facts["device"])
        (check.options.out / "tuned.py").write_text(text)


def settle_part(check: Check) -> None:
    """Keep what makes whole frames fastest, among the ways that the part "tune" found fastest by themselves."""
    residual, position = min(1024, config_of(check.size).codebook_size), 480 if check.big else 40
    tuned = check.facts.get("tune", [])
    named = {f"{name} batch {batch}": (name, batch) for name, batch in settled(check)}
    for title, found in check.items("settle", list(named)):
        name, batch = named[title]
        model, how = model_of(check, name), for_slots(check.how, batch)
        row: dict[str, Any] = {"model": name, "batch": batch}

        def milliseconds() -> float:
            times = frames.frame_times(model, batch, position, residual, True, how, alone=True)  # noqa: B023
            return float(times["ms"])

        def work() -> dict[str, Any]:
            before = milliseconds()
            chosen = settle.choices(listed_jobs(check, name, batch), tuned)  # noqa: B023
            rows = settle.settle(chosen, milliseconds, lambda: time.perf_counter() < check.deadline)
            return {"before_ms": before, "ms": milliseconds(), "linears": rows}

        check.tried(row, work)
        found.append(row)
        check.say(f"{title}: {row.get('before_ms', 0):.3f} -> {row.get('ms', 0):.3f} ms; {row.get('linears')}")
        text = linears.table(shapes.TUNED, shapes.TUNED_MANY, check.facts["device"])
        (check.options.out / "tuned.py").write_text(text)


def linears_part(check: Check) -> None:
    if not check.cuda:
        return
    cases = {f"{case.kind} {case.name}": case for case in linears.cases(sizes_of(config_of(check.size)))}
    for name, found in check.items("linears", list(cases)):
        case = cases[name]
        made = linears.make(case, check.device)
        weights = linears.copies(made.weight)
        theirs = others.libraries(case, check.device)
        for rows in (1, 8, 32, 64):
            row: dict[str, Any] = {"case": name, "rows": rows, "bytes": made.weight.num_bytes}
            plan = plan_for(made.weight, rows, check.how)
            few = plan_for(made.weight, rows, replace(check.how, many_rows=False))
            timed: dict[str, Callable[[], float]] = {
                "ours": lambda: linears.seconds_of(case, weights, rows, plan, check.device, check.how),  # noqa: B023
                "cublas": lambda: linears.cublas_seconds(case, made, rows, check.device),  # noqa: B023
            }
            if few != plan:
                timed["few"] = lambda: linears.seconds_of(case, weights, rows, few, check.device, check.how)  # noqa: B023
            if case.kind == "w4" and rows <= 8:
                timed["tinygemm"] = lambda: linears.tinygemm_seconds(case, rows, check.device)  # noqa: B023
            timed |= {key: lambda work=work: work(rows) for key, work in theirs.items()}  # type: ignore[misc]  # noqa: B023
            for key, work in timed.items():
                if time.perf_counter() < check.deadline:
                    check.tried(row, lambda: {f"{key}_us": 1e6 * work()})  # noqa: B023
            found.append(row)
            check.say(str({key: round(v, 1) if isinstance(v, float) else v for key, v in row.items()}))


def models_of(check: Check) -> list[str]:
    """List the models that are asked for."""
    asked = check.options.models
    return [name for name in MODELS[check.size] if (name in asked.split(",") if asked else name not in ON_REQUEST)]


def settled(check: Check) -> list[tuple[str, int]]:
    """List the frames of the part "settle"."""
    return [(name, batch) for name, batch in settle.FRAMES[check.size] if name in models_of(check)]


def model_of(check: Check, name: str) -> Any:
    """Make a model once."""
    if name in check.models:
        return check.models[name]
    recipe = MODELS[check.size][name]
    if recipe is None:
        check.models[name] = frames.random_model(config_of(check.size), check.device)
        check.say("bf16 model made")
    else:
        path = ROOT / "recipes" / f"{recipe}.yaml"
        made, count = frames.quantized_model(model_of(check, "bf16"), path, "triton", check.device)
        check.models[name] = made
        check.facts.setdefault("models", {})[name] = count
        check.say(f"{name} model made: {count}")
    return check.models[name]


VARIED = (
    *(("w4a16", 1), ("w4a16", 64), ("bf16", 1), ("bf16", 64), ("w4a16", 8), ("w4a16", 32)),
    *(("w4a16", 16), ("bf16", 8), ("bf16", 16), ("bf16", 32)),
)
MANY_ONLY = ("many_rows", "shared_shifts", "long_stretches", "attention_adds")
MANY_WAYS = (*MANY_ONLY, "early")  # what counts at many rows


def variants_of(check: Check) -> list[tuple[str, int, str, Any]]:
    """List frames and ways to launch them: as they are, each part the other way round, and as at first."""
    found = []
    for name, batch in VARIED:
        how, many = for_slots(check.how, batch), batch > 16
        switches = [key for key, value in vars(how).items() if isinstance(value, bool)]
        chosen = [key for key in switches if (key in MANY_WAYS if many else key not in MANY_ONLY)]
        more: dict[str, Any] = {"as used": how} if many else {"as used": how, "as first": as_first(how)}
        more |= dict(switched(how, key) for key in chosen)
        more = {title: way for title, way in more.items() if title not in check.wrong_ways}
        limits = {batch, 2 * batch} - {how.early_dense}  # the Fast AR begins with two tokens a row
        limits |= {0} if batch <= how.early_dense else set()
        more |= {f"bf16 products early up to {rows} rows": replace(how, early_dense=rows) for rows in sorted(limits)}
        numbers = [warps for warps in (1, 2, 4, 8)[many:] if warps != how.attention_warps]
        more |= {f"attention of {warps} warps": replace(how, attention_warps=warps) for warps in numbers}
        if many:  # few rows of 480 positions have a program for each block
            more |= {f"attention of {stages} stages": replace(how, attention_stages=stages) for stages in (1, 3)}
        found += [(name, batch, title, way) for title, way in more.items()]
    found = [row for row in found if row[0] in models_of(check)]
    return [row for row in found if re.search(check.options.variants, f"{row[0]} batch {row[1]}, {row[2]}")]


def frames_part(check: Check) -> None:
    residual = min(1024, config_of(check.size).codebook_size)
    position = 480 if check.big else 40
    wanted = [(name, batch, True) for batch in BATCHES[check.size] for name in ("w4a16", "bf16")]
    wanted += [(name, batch, True) for batch in (1, 64)[: 2 if check.big else 1] for name in ("fast8", "w8a16", "g128")]
    wanted = [job for job in wanted if job[0] in models_of(check)]
    if check.cuda:
        wanted += [("bf16", 1, False), ("bf16", 32, False)]
    named = {f"{name} batch {batch}{'' if fused else ' plain'}": (name, batch, fused) for name, batch, fused in wanted}
    for title, found in check.items("frames", list(named)):
        name, batch, fused = named[title]
        model = model_of(check, name)
        row: dict[str, Any] = {"model": name, "batch": batch}
        how = for_slots(check.how, batch)
        check.tried(row, lambda: frames.frame_times(model, batch, position, residual, fused, how))  # noqa: B023
        found.append(row)
        check.say(str({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}))


def variants_part(check: Check) -> None:
    """Time frames launched in other ways, in turns, so that a card that slows down slows them all."""
    residual = min(1024, config_of(check.size).codebook_size)
    position = 480 if check.big else 40
    jobs = variants_of(check)
    if not check.cuda:
        jobs = [job for job in jobs if job[:3] == ("w4a16", 1, "as first")]
    named = {f"{name} batch {batch}, {way}": (name, batch, way, how) for name, batch, way, how in jobs}
    for title, found in check.items("variants", list(named)):
        name, batch, way, how = named[title]
        model = model_of(check, name)
        row: dict[str, Any] = {"model": name, "batch": batch, "how": way}
        check.tried(row, lambda: frames.frame_times(model, batch, position, residual, True, how))  # noqa: B023
        found.append(row)
        check.say(f"{title}: {row.get('ms', 0):.3f} ms")


def exact_part(check: Check) -> None:
    residual = min(1024, config_of(check.size).codebook_size)
    names = [name for name in ("bf16", "w4a16", "fast8") if name in models_of(check)]
    prompt, forced, position, drawn = (40, 200, 300, 20) if check.big else (12, 2, 20, 1)

    def replayed(name: str, batch: int) -> dict[str, Any]:
        return frames.graph_is_eager(model_of(check, name), batch, position, residual, drawn)

    many = 64 if check.big else 24
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "many_slots": lambda: frames.many_slots(
            {name: model_of(check, name) for name in names}, prompt, forced // 8 + 1, residual, many
        ),
        "teacher_forced": lambda: frames.exactness(
            {name: model_of(check, name) for name in names}, prompt, forced, residual
        ),
        "graph_w4a16": lambda: replayed("w4a16", 8 if check.big else 2),
        "graph_bf16": lambda: replayed("bf16", 3),
        "graph_w4a16_many": lambda: replayed("w4a16", many),
        "graph_bf16_many": lambda: replayed("bf16", many),
    }
    for name, found in check.items("exact", list(parts)):
        found.append(check.tried({"check": name}, parts[name]))
        check.say(f"{name}: {json.dumps(found[-1])}")


def profile_part(check: Check) -> None:
    if not check.cuda:
        return
    jobs = {
        f"{name} batch {batch}": (name, batch)
        for name, batch in (("w4a16", 1), ("bf16", 1), ("w4a16", 32), ("w4a16", 64), ("bf16", 64))
        if name in models_of(check)
    }
    for title, found in check.items("profile", list(jobs)):
        name, batch = jobs[title]
        how = replace(for_slots(check.how, batch), early=False)  # what starts early is on the clock while it waits
        table = frames.profiled(model_of(check, name), batch, how)
        found.append({"frame": title, "kernels": table})
        check.say(f"{title}: kernel, launches per frame, us per frame")
        for key, count, total in table:
            print(f"    {key:60} {count:6.0f} {total:9.1f}  ({total / max(count, 1):6.2f} each)", flush=True)


WORK: dict[str, Callable[[Check], None]] = {
    "bandwidth": bandwidth_part,
    "compile": compile_part,
    "kernels": kernels_part,
    "exact": exact_part,
    "frames": frames_part,
    "variants": variants_part,
    "tune": tune_part,
    "settle": settle_part,
    "profile": profile_part,
    "linears": linears_part,
}
