"""The loop over blocks: what each linear is calibrated on, resuming, records; the oracle is the whole model."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from s2quant.checkpoint.reader import Checkpoint, open_checkpoint
from s2quant.errors import UserError
from s2quant.model import DualAR, disk_name, module_name
from s2quant.packing import QuantizedWeight
from s2quant.quantize import loop as loop_module
from s2quant.quantize import outputs as outputs_module
from s2quant.quantize import stream as stream_module
from s2quant.quantize.gptq import Hessian
from s2quant.quantize.loop import num_stages, quantize_stages
from s2quant.quantize.plan import Plan, make_plan
from s2quant.quantize.rtn import rtn_quantize
from s2quant.quantize.stages import slow_stages, stage_of
from s2quant.quantize.store import StageStore
from s2quant.quantize.stream import Stream
from s2quant.recipe import LinearSettings, PositionWeights, load_recipe
from s2quant.runtime.load import load_model

CPU = torch.device("cpu")
BLOCKS = "text_model.model.layers"


def plan_of(tmp_path: Path, checkpoint: Checkpoint, rules: list[dict[str, Any]], **quantize: Any) -> Plan:
    path = tmp_path / "recipe.yaml"
    text = {"name": "test", "rules": rules, "calibration": {"source": "x.jsonl"}, "quantize": quantize}
    path.write_text(yaml.safe_dump(text), "utf-8")
    return make_plan(load_recipe(path), checkpoint.config)


RULES = [
    {"keep": f"{BLOCKS}.1.feed_forward.w2"},
    {"quantize": f"{BLOCKS}.{{0,1}}.attention.*q*v"},
    {"quantize": f"{BLOCKS}.{{0,1}}.attention.wo"},
    {"quantize": f"{BLOCKS}.{{0,1}}.feed_forward.*"},
    {"keep": f"{BLOCKS}.**"},
    {"keep": "audio_decoder.**"},
]


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return open_checkpoint(tiny_folder)


@pytest.fixture(scope="module")
def batches(checkpoint: Checkpoint) -> list[tuple[Tensor, Tensor]]:
    """Two batches of random prompts with frames, padded, and one held out."""
    config, generator = checkpoint.config, torch.Generator().manual_seed(0)
    made = []
    for lengths in ((40, 64), (30, 50), (45,)):
        tokens = torch.zeros(len(lengths), 11, max(lengths), dtype=torch.int64)
        tokens[:, 0] = config.pad_id
        mask = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
        for row, length in enumerate(lengths):
            mask[row, :length] = True
            tokens[row, 0, :12] = torch.randint(0, 400, (12,), generator=generator)
            codes = torch.randint(0, 1024, (10, length - 12), generator=generator)
            tokens[row, 1:, 12:length] = codes
            tokens[row, 0, 12:length] = codes[0] + config.semantic_begin_id
        made.append((tokens, mask))
    return made


def run(plan: Plan, checkpoint: Checkpoint, batches: list[Any], folder: Path, **more: Any) -> list[dict[str, Any]]:
    store = StageStore.open(folder, {"test": 1}, resume=folder.exists())
    return quantize_stages(checkpoint, plan, batches, 1, store, CPU, **more)


def test_inputs_are_those_of_the_model_quantized_so_far(
    tmp_path: Path, checkpoint: Checkpoint, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every Hessian equals that of the inputs seen by the whole model with all earlier modules dequantized."""
    seen: dict[str, Tensor] = {}

    class Spy(Hessian):
        def matrix(self) -> Tensor:
            seen[self.name] = super().matrix()
            return seen[self.name].clone()

    monkeypatch.setattr(loop_module, "Hessian", Spy)
    plan = plan_of(tmp_path, checkpoint, RULES)
    run(plan, checkpoint, batches, tmp_path / "run")
    assert set(seen) == {
        f"{BLOCKS}.{i}.{n}" for i in (0, 1) for n in ("attention.wqkv", "attention.wo", "feed_forward.w1")
    } | {f"{BLOCKS}.0.feed_forward.w2"}
    model = load_model(checkpoint, dtype=torch.bfloat16)
    store = StageStore.open(tmp_path / "run", {"test": 1}, resume=True)
    for stage in ("0", "1"):
        names = [name for name in plan.quantized if name.startswith(f"{BLOCKS}.{stage}.")]
        weights, _ = store.load(f"{BLOCKS}.{stage}", {name: (4, 32) for name in names})
        for subset in (
            ["attention.wqkv"],
            ["attention.wo"],
            ["feed_forward.w1", "feed_forward.w3"],
            ["feed_forward.w2"],
        ):
            chosen = [f"{BLOCKS}.{stage}.{name}" for name in subset if f"{BLOCKS}.{stage}.{name}" in plan.quantized]
            if not chosen:
                continue
            rows = torch.cat([inputs_of(model, chosen[0], *batch) for batch in batches[:-1]]).float()
            expected = 2 * rows.T @ rows / len(rows)
            got = seen[chosen[0]]
            assert (got - expected).norm() / expected.norm() < 2e-3, chosen[0]  # batched and padded alike: bf16 noise
            for name in chosen:
                linear = model.get_submodule(module_name(name))
                linear.weight = torch.nn.Parameter(weights[name].dequantize(torch.bfloat16), requires_grad=False)


def inputs_of(model: DualAR, name: str, tokens: Tensor, mask: Tensor) -> Tensor:
    """Inputs of one linear in a whole forward pass of single, unpadded sequences."""
    rows: list[Tensor] = []
    hook = model.get_submodule(module_name(name)).register_forward_pre_hook(lambda _m, args: rows.append(args[0][0]))
    with torch.no_grad():
        for row in range(len(tokens)):
            model.slow.forward_hidden(tokens[row : row + 1, :, : int(mask[row].sum())])
    hook.remove()
    return torch.cat(rows)


def test_weights_of_text_and_speech_reach_the_hessian(
    tmp_path: Path, checkpoint: Checkpoint, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first module's Hessian is the formula's over the inputs that the dense model gives it."""
    seen: dict[str, Tensor] = {}

    class Spy(Hessian):
        def matrix(self) -> Tensor:
            seen[self.name] = super().matrix()
            return seen[self.name].clone()

    monkeypatch.setattr(loop_module, "Hessian", Spy)
    name = f"{BLOCKS}.0.attention.wqkv"
    plan = plan_of(tmp_path, checkpoint, [{"quantize": name}, {"keep": "**"}])
    calibration = replace(plan.recipe.calibration, weights=PositionWeights(text=0.5, speech=3.0))
    plan = replace(plan, recipe=replace(plan.recipe, calibration=calibration))
    records = run(plan, checkpoint, batches, tmp_path / "run")
    model = load_model(checkpoint, dtype=torch.bfloat16)
    rows = torch.cat([inputs_of(model, name, *batch) for batch in batches[:-1]]).float()
    speech = torch.cat([model.slow.is_semantic(tokens)[mask] for tokens, mask in batches[:-1]])
    assert 0 < int(speech.sum()) < len(speech)
    weights = torch.where(speech, 3.0, 0.5)
    expected = sum(2 * w * torch.outer(x, x) for w, x in zip(weights, rows, strict=True)) / weights.sum()
    assert (seen[name] - expected).norm() / expected.norm() < 2e-3
    assert (seen[name] - 2 * rows.T @ rows / len(rows)).norm() / expected.norm() > 0.05  # the weights matter
    assert records[0]["num_tokens"] == len(rows)


def test_killed_anywhere_and_resumed_is_bit_identical(
    tmp_path: Path, checkpoint: Checkpoint, batches: list[Any]
) -> None:
    plan = plan_of(tmp_path, checkpoint, RULES)
    whole = run(plan, checkpoint, batches, tmp_path / "whole")

    def stop(_name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, checkpoint, batches, tmp_path / "stopped", progress=stop)
    assert len(list((tmp_path / "stopped" / "stages").iterdir())) == 1
    resumed = run(plan, checkpoint, batches, tmp_path / "stopped")
    timeless = [{k: v for k, v in r.items() if "seconds" not in k} for r in whole]
    assert timeless == [{k: v for k, v in r.items() if "seconds" not in k} for r in resumed]
    for path in sorted((tmp_path / "whole" / "stages").iterdir()):
        store, other = (StageStore(tmp_path / name) for name in ("whole", "stopped"))
        names = [name for name in plan.quantized if name.startswith(f"{path.stem}.")]
        assert names
        for name in names:
            for part, tensor in store.tensors(name, stage_of(name)).items():
                assert torch.equal(tensor, other.tensors(name, stage_of(name))[part]), (name, part)


def test_batches_that_do_not_rest_within_a_stage_end_alike(
    tmp_path: Path, checkpoint: Checkpoint, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is then reached from the stage's beginning, as with low memory, or where there is no room."""
    plan = plan_of(tmp_path, checkpoint, RULES)
    entered: list[int] = []
    at = Stream._at

    def counted(self: Stream, stage: Any, number: int, index: int) -> Any:
        entered.append(number - self._within.get(index, (-1,))[0])
        return at(self, stage, number, index)

    monkeypatch.setattr(Stream, "_at", counted)
    resting = run(plan, checkpoint, batches, tmp_path / "resting")
    num_entered = sum(entered)
    for name, more in (("rest", {"rest": CPU}), ("room", {})):
        if name == "room":
            monkeypatch.setattr(stream_module, "MAX_KEPT_BYTES", 0)
        entered.clear()
        found = run(plan, checkpoint, batches, tmp_path / name, **more)
        assert [record["weight_sha256"] for record in found] == [record["weight_sha256"] for record in resting]
        assert [record["output_error"] for record in found] == [record["output_error"] for record in resting]
        assert sum(entered) > 1.5 * num_entered


def test_output_errors_by_the_definition(
    tmp_path: Path, checkpoint: Checkpoint, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first linear, whose inputs nothing quantized reaches."""
    name = f"{BLOCKS}.0.attention.wqkv"
    plan = plan_of(tmp_path, checkpoint, [{"quantize": name}, {"keep": "**"}])
    record = run(plan, checkpoint, batches, tmp_path / "run")[0]
    model = load_model(checkpoint, dtype=torch.bfloat16)
    rows = inputs_of(model, name, *batches[-1]).double()
    dense = model.get_submodule(module_name(name)).weight.double()
    quantized = StageStore(tmp_path / "run").load(f"{BLOCKS}.0", {name: (4, 32)})[0][name].dequantize().double()
    error = (rows @ (quantized - dense).T).norm() / (rows @ dense.T).norm()
    assert record["output_error"] == pytest.approx(float(error), rel=2e-3)
    nearest = rtn_quantize(dense.float(), LinearSettings())[0].dequantize().double()
    error = (rows @ (nearest - dense).T).norm() / (rows @ dense.T).norm()
    assert record["output_error_rtn"] == pytest.approx(float(error), rel=2e-3)

    monkeypatch.setattr(loop_module, "MAX_HELD_ROWS", 20)
    thinned = run(plan, checkpoint, batches, tmp_path / "thinned")[0]
    assert thinned["held_rows"] == 20 and thinned["weight_sha256"] == record["weight_sha256"]
    assert thinned["output_error"] == pytest.approx(record["output_error"], rel=0.2)
    assert thinned["output_error"] != record["output_error"]


def test_what_cannot_be_rounded_has_no_error_to_compare_with(
    tmp_path: Path, checkpoint: Checkpoint, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQ did its part; a figure that is only told of must not undo it."""

    monkeypatch.setattr(outputs_module, "nearest", lambda weight, settings: torch.full_like(weight, float("nan")))
    plan = plan_of(tmp_path, checkpoint, [{"quantize": f"{BLOCKS}.0.attention.wqkv"}, {"keep": "**"}])
    record = run(plan, checkpoint, batches, tmp_path / "run")[0]
    assert record["output_error_rtn"] is None and record["output_error"] > 0


def test_a_disk_that_is_full_loses_nothing(
    tmp_path: Path, checkpoint: Checkpoint, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage is written while nothing else is left to do; the first is there."""
    plan = plan_of(tmp_path, checkpoint, RULES)
    save = StageStore.save

    def full(self: StageStore, stage: str, *more: Any) -> None:
        if stage == f"{BLOCKS}.1":
            raise UserError("the disk is full", "room", "make some")
        save(self, stage, *more)

    with monkeypatch.context() as patch:
        patch.setattr(StageStore, "save", full)
        with pytest.raises(UserError, match="disk is full"):
            run(plan, checkpoint, batches, tmp_path / "run")
    assert StageStore(tmp_path / "run").names() == [f"{BLOCKS}.0"]
    resumed, whole = (run(plan, checkpoint, batches, tmp_path / name) for name in ("run", "whole"))
    assert [record["weight_sha256"] for record in resumed] == [record["weight_sha256"] for record in whole]


def test_records_and_shared_order(tmp_path: Path, checkpoint: Checkpoint, batches: list[Any]) -> None:
    plan = plan_of(tmp_path, checkpoint, RULES)
    done: list[str] = []
    records = run(plan, checkpoint, batches, tmp_path / "run", progress=done.append)
    assert [record["module"] for record in records] == [
        f"{BLOCKS}.{i}.{n}"
        for i in (0, 1)
        for n in ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
        if (i, n) != (1, "feed_forward.w2")
    ]
    assert done == [f"{BLOCKS}.0", f"{BLOCKS}.1"]  # what comes after the last quantized module is not run
    assert num_stages(plan) == 2
    for record in records:
        assert (record["method"], record["solver"]) == ("gptq", "gptqmodel")
        assert record["fallback"] is None
        assert record["num_tokens"] == 40 + 64 + 30 + 50  # padding and held-out sequences are not in it
        assert record["held_rows"] == 45
        assert record["damp_percent"] == 0.05
        assert 0 < record["output_error"] < 0.5
        assert record["output_error_rtn"] > 0
    store = StageStore(tmp_path / "run")
    w1, w3 = (store.tensors(f"{BLOCKS}.0.feed_forward.{name}", f"{BLOCKS}.0")["g_idx"] for name in ("w1", "w3"))
    assert torch.equal(w1, w3)
    assert not torch.equal(w1, w1.sort().values)


def test_one_block_at_a_time(checkpoint: Checkpoint) -> None:
    alive: list[weakref.ref[torch.nn.Module]] = []
    for stage in slow_stages(checkpoint, CPU, 16):
        gc.collect()
        assert sum(ref() is not None for ref in alive) == 0
        alive.append(weakref.ref(stage.module))
        del stage
    assert len(alive) == checkpoint.config.slow.n_layer


def test_fast_ar_by_rule(tmp_path: Path, checkpoint: Checkpoint, batches: list[Any]) -> None:
    rules = [
        {"quantize": "audio_decoder.layers.*.**", "bits": 8},
        {"quantize": "audio_decoder.output", "method": "rtn"},
        {"keep": f"{BLOCKS}.**"},
    ]
    rules[0]["quantize"] = "audio_decoder.layers.*.{attention,feed_forward}.w*"
    plan = plan_of(tmp_path, checkpoint, rules)
    records = run(plan, checkpoint, batches, tmp_path / "run")
    assert len(records) == 5 * checkpoint.config.fast.n_layer + 1
    frames = 28 + 52 + 18 + 38
    assert {record["num_tokens"] for record in records[:-1]} == {frames * 10}
    assert records[-1]["method"] == "rtn"
    assert max(record["output_error"] for record in records[:-1]) < 0.02
    assert num_stages(plan) == checkpoint.config.slow.n_layer + checkpoint.config.fast.n_layer + 1


def test_loaded_model_has_the_quantized_weights(tiny_quantized: Path, tiny_folder: Path) -> None:
    checkpoint = open_checkpoint(tiny_quantized)
    dense = load_model(tiny_folder, dtype=torch.float32)
    quantized = load_model(checkpoint, dtype=torch.float32, linears="reference")
    for name in (module.name for module in checkpoint.modules.values() if module.bits):
        weight = checkpoint.weight(name)
        assert isinstance(weight, QuantizedWeight)
        x = torch.randn(3, weight.in_features)
        ours = quantized.get_submodule(module_name(name))(x)
        assert torch.allclose(ours, x @ weight.dequantize(torch.float32).T, atol=1e-5)
        assert disk_name(module_name(name)) == name
        theirs = dense.get_submodule(module_name(name))(x)
        assert 0 < (ours - theirs).norm() / theirs.norm() < 0.3
