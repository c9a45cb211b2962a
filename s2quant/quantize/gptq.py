"""GPTQ: gptqmodel's `GPTQ` object, or on a GPU our own solver, behind a plain function of a weight and a Hessian.

On a GPU `s2quant.quantize.solver` does gptqmodel's algorithm with kernels of our own, several times as fast; a Hessian
that needs more than the damping asked for is left to gptqmodel there, too. Elsewhere gptqmodel 7.6 does it. Around it:

- `Hessian` (`s2quant.quantize.hessian`) sums X^T X once for all modules that read the same input (w1 and w3). Each
  batch's is what `add_batch` computes, bit for bit (but for 16-bit inputs on a GPU, see there).
- The codes are recovered from its dequantized float32 weight and float32 scales, exactly; the scales are then
  rounded to float16, and everything downstream uses the rounded ones.
- Whatever gptqmodel does silently is looked for afterwards: round-to-nearest or zeros in place of GPTQ, grown
  damping, a floor under the Hessian's diagonal. Strict (the default) refuses; otherwise `QuantStats.fallback` says.
- Its symmetric grid gives a group without negative weights half the scale that it needs, clipping everything above
  7/15 of the largest weight (at 4 bits). One group in 2^group_size, more where dead inputs gather; mended here.

One thing is kept as gptqmodel and the authors' code have it: scales are computed from the weights as they stood when
the block of 128 columns began, not when the group did.

Importing gptqmodel takes seconds and changes the process; `_import_gptqmodel` says what is undone.

Sources: Frantar et al., https://arxiv.org/abs/2210.17323; gptqmodel 7.6.0, gptqmodel/quantization/gptq.py.

Legend: M outputs, K inputs, G groups.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from s2quant.errors import UserError
from s2quant.gpu import kernel_obstacle
from s2quant.packing import QuantizedWeight, symmetric_zero
from s2quant.quantize.hessian import Hessian
from s2quant.quantize.rtn import check_weight, rtn_quantize, store_scales
from s2quant.quantize.solver import Solution, prepare, solve
from s2quant.quantize.stats import QuantStats
from s2quant.recipe import LinearSettings

GPTQMODEL_VERSION = "7.6."
_NO_LOSS = 999999999  # gptqmodel's number for "not done"


@dataclass(kw_only=True)
class _Watch:
    """What gptqmodel does inside and does not report."""

    floored: bool = False
    one_sided: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Result:
    """What gptqmodel gave back: dequantized float32 [M, K], scale and zero float32 [M, G], g_idx int32 [K]."""

    dequantized: Tensor
    scale: Tensor
    zero: Tensor
    g_idx: Tensor
    loss: Any
    damp_percent: float


@torch.no_grad()
def gptq_quantize(
    weight: Tensor, hessian: Hessian, settings: LinearSettings, name: str = "weight", strict: bool = True
) -> tuple[QuantizedWeight, QuantStats]:
    """Quantize a linear with GPTQ.

    Args:
        weight: Floating point [M, K], CPU or GPU; the work is done on its device. Not changed.
        hessian: Inputs of the module; not changed, so that modules can share it.
        settings: bits, group_size, desc_act, act_group_aware, damp_percent.
        name: How messages name the module.
        strict: Whether any departure from the settings is an error. Otherwise a grown damping is kept and recorded,
            and where GPTQ failed the module is rounded to nearest and recorded so.

    Returns:
        The quantized weight on the device of `weight`, and what happened.

    Raises:
        UserError: The weight is unusable, gptqmodel is not installed, or (strict) GPTQ did not do what was asked.
    """
    check_weight(weight, settings, name)
    assert hessian.in_features == weight.shape[1], (name, hessian.in_features, weight.shape)
    if hessian.num_tokens == 0:
        return _without_gptq(weight, settings, name, strict, "no calibration positions reached it", 0, 0)
    if kernel_obstacle(weight.device) is None:
        start = time.perf_counter()
        prepared = prepare(hessian, settings, weight.device)
        if prepared.factor is not None:
            return _solved(weight, solve(weight, prepared, settings), hessian, settings, name, strict, start)
    _import_gptqmodel()  # seconds, once: not the module's
    start = time.perf_counter()
    matrix = hessian.matrix().to(weight.device)
    num_dead = int((matrix.diagonal() == 0).sum())
    watch = _Watch()
    result = _run_gptqmodel(weight, matrix, hessian.num_tokens, settings, name, watch)
    failure = result if isinstance(result, str) else _failure(result, weight)
    if failure is not None:
        return _without_gptq(weight, settings, name, strict, failure, hessian.num_tokens, num_dead)
    assert isinstance(result, _Result)
    fallback = _departure(result, settings, watch)
    if fallback is not None and strict:
        _refuse(name, fallback)
    stored = store_scales(result.scale, name)
    quantized = QuantizedWeight(
        codes=_recover_codes(result, settings.bits, name),
        scales=stored.scales.T.contiguous(),
        zeros=result.zero.T.to(torch.uint8).contiguous(),
        g_idx=result.g_idx.to(torch.int32, copy=True),
        bits=settings.bits,
        group_size=settings.group_size,
    )
    num_groups = result.scale.shape[1]
    stats = QuantStats(
        method="gptq",
        solver="gptqmodel",
        loss=float(result.loss),
        damp_percent=result.damp_percent,
        num_tokens=hessian.num_tokens,
        seconds=time.perf_counter() - start,
        fallback=fallback,
        num_dead=num_dead,
        num_one_sided=int(torch.stack(watch.one_sided[-num_groups:]).sum()),
        num_subnormal_scales=stored.num_subnormal,
        max_scale_error=stored.max_error,
    )
    return quantized, stats


def _solved(
    weight: Tensor, found: Solution, hessian: Hessian, settings: LinearSettings, name: str, strict: bool, start: float
) -> tuple[QuantizedWeight, QuantStats]:
    """Put a solution of our own into the form of storage."""
    if not math.isfinite(found.loss) or found.is_lost:
        reason = "every quantized weight is zero" if found.is_lost else "the result is not finite"
        return _without_gptq(weight, settings, name, strict, reason, hessian.num_tokens, found.num_dead)
    stored = store_scales(found.scales, name)
    quantized = QuantizedWeight(
        codes=found.codes,
        scales=stored.scales.T.contiguous(),
        zeros=torch.full_like(stored.scales.T, symmetric_zero(settings.bits), dtype=torch.uint8).contiguous(),
        g_idx=found.g_idx.clone(),
        bits=settings.bits,
        group_size=settings.group_size,
    )
    stats = QuantStats(
        method="gptq",
        solver="s2quant",
        loss=found.loss / hessian.num_tokens,
        damp_percent=settings.damp_percent,
        num_tokens=hessian.num_tokens,
        seconds=time.perf_counter() - start,
        fallback=None,
        num_dead=found.num_dead,
        num_one_sided=found.num_one_sided,
        num_subnormal_scales=stored.num_subnormal,
        max_scale_error=stored.max_error,
    )
    return quantized, stats


def _run_gptqmodel(
    weight: Tensor, matrix: Tensor, num_tokens: int, settings: LinearSettings, name: str, watch: _Watch
) -> _Result | str:
    """Hand weight and Hessian (which is consumed) to gptqmodel; a string tells why it gave up."""
    gptq_class, config_class = _import_gptqmodel()
    config = config_class(
        bits=settings.bits,
        group_size=settings.group_size,
        desc_act=settings.desc_act,
        act_group_aware=settings.act_group_aware,
        sym=True,
        damp_percent=settings.damp_percent,
        offload_to_disk=False,
        fallback=None,  # else NaN losses and missing inputs turn into round-to-nearest without an exception
    )
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    # In float32 the result comes back unrounded, so that codes can be recovered exactly. gptqmodel copies it.
    linear.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    gptq = gptq_class(linear, config)
    gptq.name = name
    gptq.quantizer.configure(perchannel=True)  # not optional: without it one scale serves all outputs
    gptq.H, gptq.nsamples = matrix, num_tokens  # as its adopt_hessian_from leaves them
    _watch_floor(gptq, watch)
    _mend_one_sided(gptq.quantizer, watch)
    try:
        with redirect_stdout(sys.stderr):  # where its log of errors belongs
            dequantized, scale, zero, g_idx, _, loss, damp_percent, _ = gptq.quantize()
    except ValueError as error:  # its report of a NaN loss, now that its own fallback is off
        return f"gptqmodel gave up: {error}"
    result = _Result(
        dequantized=dequantized, scale=scale, zero=zero, g_idx=g_idx, loss=loss, damp_percent=float(damp_percent)
    )
    gptq.free()
    return result


def _watch_floor(gptq: Any, watch: _Watch) -> None:
    """Notice a floor under the Hessian's diagonal: gptqmodel adds one and reports the damping that was asked."""
    inverse = gptq.hessian_inverse

    def watched(matrix: Tensor) -> Any:
        before = matrix.diagonal().clone()
        result = inverse(matrix)
        watch.floored = watch.floored or not torch.equal(before, matrix.diagonal())
        return result

    gptq.hessian_inverse = watched


def _mend_one_sided(quantizer: Any, watch: _Watch) -> None:
    """Double the scale of groups without a negative weight: gptqmodel takes absmax / maxq there, half of the rule."""
    find_params = quantizer.find_params

    def mended(x: Tensor, weight: bool = False) -> None:
        find_params(x, weight=weight)
        one_sided = (x.amin(dim=1) >= 0) & (x.amax(dim=1) > 0)  # [M]
        quantizer.scale = torch.where(one_sided.unsqueeze(1), quantizer.scale * 2, quantizer.scale)
        watch.one_sided.append(one_sided.sum())  # the first call is about the whole matrix, the last G about groups

    quantizer.find_params = mended


def _failure(result: _Result, weight: Tensor) -> str | None:
    """Tell whether gptqmodel did something else than GPTQ."""
    if isinstance(result.loss, str):
        return f"gptqmodel did '{result.loss}'"
    if not 0 <= float(result.loss) < _NO_LOSS or result.damp_percent >= 1:
        return f"the Hessian could not be inverted (loss {result.loss}, damping {result.damp_percent:g})"
    if not bool(torch.isfinite(result.dequantized).all() & torch.isfinite(result.scale).all()):
        return "the result is not finite"
    if not bool(result.dequantized.any()) and bool(weight.any()):
        return "every quantized weight is zero"
    return None


def _departure(result: _Result, settings: LinearSettings, watch: _Watch) -> str | None:
    """Tell how far GPTQ went from the settings."""
    if result.damp_percent > settings.damp_percent:
        return f"damping grew from {settings.damp_percent:g} to {result.damp_percent:g}"
    if watch.floored:
        return f"a floor was put under the Hessian's diagonal before damping {settings.damp_percent:g} sufficed"
    return None


def _recover_codes(result: _Result, bits: int, name: str) -> Tensor:
    """Get the integer codes, uint8 [M, K], out of weights that lie on the grid of their float32 scales."""
    group = result.g_idx.long()
    exact = result.dequantized / result.scale.index_select(1, group)
    steps = exact.round()
    worst = float((exact - steps).abs().max())
    assert worst < 1e-3, f"{name}: gptqmodel's weights are {worst} steps off its own grid"
    codes = steps + result.zero.index_select(1, group)
    assert bool((codes >= 0).all()) and bool((codes < 1 << bits).all()), f"{name}: codes beyond {bits} bits"
    return codes.to(torch.uint8)


def _without_gptq(
    weight: Tensor, settings: LinearSettings, name: str, strict: bool, reason: str, num_tokens: int, num_dead: int
) -> tuple[QuantizedWeight, QuantStats]:
    """Refuse, or round to nearest and say so."""
    if strict:
        _refuse(name, reason)
    quantized, stats = rtn_quantize(weight, settings, name)
    return quantized, replace(stats, fallback=f"round-to-nearest: {reason}", num_tokens=num_tokens, num_dead=num_dead)


def _refuse(name: str, reason: str) -> None:
    raise UserError(
        f"{name}: {reason}",
        "GPTQ with the recipe's settings",
        "calibrate with more or other lines, raise damp_percent, keep this module in bf16,"
        " or say strict: false in the recipe",
    )


def check_gptqmodel(device: torch.device) -> None:
    """Find gptqmodel, so that what is wrong with it is said before hours of work.

    Where every linear is its, it is imported, which takes seconds. On a GPU that happens only with the first Hessian
    that needs more than the damping asked for; until then only its version is known.

    Args:
        device: Where linears will be quantized.

    Raises:
        UserError: It is not installed, or of another version.
    """
    _check_version()
    if kernel_obstacle(device) is not None:
        _import_gptqmodel()


def warm_up(settings: Iterable[LinearSettings], device: torch.device) -> None:
    """Quantize something small on a GPU, so that kernels are compiled and libraries there before hours of work.

    Args:
        settings: Of the linears that will be quantized.
        device: Where; nothing is done where gptqmodel quantizes.
    """
    if kernel_obstacle(device) is not None:
        return
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 256, generator=generator).to(device)
    for chosen in {one.group_size: one for one in settings}.values():
        hessian = Hessian(256, "what warms up")
        hessian.add(rows)
        gptq_quantize(rows[:64], hessian, chosen, hessian.name, strict=False)


def _check_version() -> None:
    """Refuse another gptqmodel than the one whose inner parts are known."""
    try:
        version = importlib.metadata.version("gptqmodel")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if not version.startswith(GPTQMODEL_VERSION):
        raise UserError(
            f"gptqmodel {version}" if version else "gptqmodel is not installed",
            f"gptqmodel {GPTQMODEL_VERSION}x, whose inner parts s2quant uses",
            "pip install 's2quant[quantize]'",
        )


def _import_gptqmodel() -> tuple[Any, Any]:
    """Import gptqmodel's GPTQ and QuantizeConfig without its banner.

    Undone afterwards: its environment variables (PYTORCH_ALLOC_CONF, CUDA_DEVICE_ORDER, HF_HOME in /tmp and more),
    its replacement of safetensors.torch.save_file, warning filters, level and handlers of the root logger.
    Left: patches of triton's autotuner and transformers, and LogBar at level ERROR.
    """
    _check_version()
    is_there = "gptqmodel" in sys.modules
    with nullcontext() if is_there else _interrupted_later(), nullcontext() if is_there else _restored_process():
        from logbar import LogBar

        LogBar.shared().setLevel("ERROR")
        from gptqmodel.quantization.config import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ
    return GPTQ, QuantizeConfig


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Hold Ctrl-C back: modules that are imported on demand make other errors of it, or swallow it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    seen: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if seen:
            before(*seen[0])


@contextmanager
def _restored_process() -> Iterator[None]:
    """Undo what importing gptqmodel does to this process."""
    # Constants of huggingface_hub are set at import: from the user's environment, not from gptqmodel's.
    import huggingface_hub.constants  # noqa: F401
    import safetensors.torch

    environment, save_file, root = dict(os.environ), safetensors.torch.save_file, logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), root.manager.disable
    os.environ["GPTQMODEL_DISABLE_GIL_WARNING"] = "1"
    logging.disable(logging.WARNING)  # torchao warns of extensions that it does not find
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
        safetensors.torch.save_file = save_file
        for key in set(os.environ) - set(environment):
            del os.environ[key]
        os.environ.update(environment)
