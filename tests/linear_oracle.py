"""What y, dx and dW of every published recipe must be, written out by hand in float64.

The only shared code is ``quantize`` (and the Hadamard transform and DGE slope, which have oracles
of their own in tests/numerics): which operand is cast how, along which axis, with which key and
factor, is spelled out here a second time, from the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import megafp4
from megafp4 import numerics
from megafp4.numerics import Key


@dataclass(frozen=True)
class Case:
    """Inputs of one linear and where in the run it stands."""

    x: Tensor
    w: Tensor
    dy: Tensor
    seed: int = 1234
    step: int = 3
    layer: int = 5
    first_token: int = 128


Result = tuple[Tensor, Tensor, Tensor]


def bf16(t: Tensor) -> Tensor:
    return t.bfloat16().double()


def cast(case: Case, t: Tensor, fmt: str, axis: int, **options: Any) -> Tensor:
    """Quantized value in float64; ``gemm`` and ``side`` name the random stream."""
    gemm, side = options.pop("gemm", "fprop"), options.pop("side", "a")
    key = Key(case.seed, case.step, case.layer, gemm, side)
    q = megafp4.quantize(
        t.float(), fmt, axis, options.pop("rounding", "nearest-even"), key, **options
    )
    return q.dequantize().double()


def mxfp4_gemm(case: Case, gemm: str, rounding: str, g: int | None, w_or_x: Tensor) -> Tensor:
    """Dgrad or wgrad of the MXFP4 paper."""
    prescale = 0.75 if rounding == "stochastic" else 1.0
    axis_a, axis_b = (1, 0) if gemm == "dgrad" else (0, 0)
    a, b = case.dy, w_or_x
    scale = 1.0
    if g:
        signs = numerics.hadamard_signs(Key(case.seed, case.step, case.layer, gemm, "signs"), g)
        a, b = numerics.hadamard(a, g, axis_a, signs), numerics.hadamard(b, g, axis_b, signs)
        scale /= g
    t = case.first_token
    common = {"gemm": gemm, "rounding": rounding, "prescale": prescale}
    origin_a = (t, 0) if gemm == "dgrad" else (0, t)
    origin_b = (0, 0) if gemm == "dgrad" else (0, t)
    a = cast(case, a, "mxfp4", axis_a, side="a", origin=origin_a, **common)
    b = cast(case, b, "mxfp4", axis_b, side="b", origin=origin_b, **common)
    if rounding == "stochastic":
        scale *= 16 / 9
    return (a @ b if gemm == "dgrad" else a.T @ b) * scale


def mxfp4(rounding: str, g: int | None, fp8_forward: bool = False) -> Callable[[Case], Result]:
    def oracle(case: Case) -> Result:
        if fp8_forward:
            x, w = cast(case, case.x, "fp8-e4m3", 1), cast(case, case.w, "fp8-e4m3", 1)
            saved = x.float()
        else:
            x, w, saved = bf16(case.x), bf16(case.w), case.x
        dgrad = mxfp4_gemm(case, "dgrad", rounding, g, case.w)
        return x @ w.T, dgrad, mxfp4_gemm(case, "wgrad", rounding, g, saved)

    return oracle


def plain_bf16(case: Case) -> Result:
    x, w, dy = bf16(case.x), bf16(case.w), bf16(case.dy)
    return x @ w.T, dy @ w, dy.T @ x


def fp8(case: Case) -> Result:
    x, w = cast(case, case.x, "fp8-e4m3", 1), cast(case, case.w, "fp8-e4m3", 1)
    dy = cast(case, case.dy, "fp8-e5m2", 1)
    return x @ w.T, dy @ w, dy.T @ x


def fp8_row(case: Case) -> Result:
    def line(t: Tensor, axis: int) -> Tensor:
        return cast(case, t, "fp8-e4m3", axis, scaling="vector")

    x, w, dy = case.x, case.w, case.dy
    return line(x, 1) @ line(w, 1).T, line(dy, 1) @ line(w, 0), line(dy, 0).T @ line(x, 0)


def fp4(dge: bool, folded: bool = False) -> Callable[[Case], Result]:
    def oracle(case: Case) -> Result:
        inner, outliers = case.x, torch.zeros_like(case.x)
        if dge:
            inner, outliers = numerics.clamp_outliers(case.x, 0.99, "signed")
        xq = cast(case, inner, "fp4-vector", 1, rounding="nearest-up")
        wq = cast(case, case.w, "fp4-vector", 1, rounding="nearest-up")
        if folded:
            scale = inner.abs().amax(1, keepdim=True) / 6
            rounded = (case.x * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
            xq = torch.where(outliers == 0, xq, rounded.double() * scale)
            outliers = torch.zeros_like(outliers)
        y = xq @ wq.T + bf16(outliers) @ bf16(case.w).T
        dy = cast(case, case.dy, "fp8-e5m2", 1)
        dx = dy @ cast(case, wq, "fp8-e4m3", 1)
        saved = xq.float() + outliers
        dw = dy.T @ cast(case, saved, "fp8-e4m3", 1)
        if dge:
            # The slope is steep: the FP32 product with the reciprocal is part of the definition.
            scaled = case.w * (1 / (case.w.abs().amax(1, keepdim=True) / 6))
            dw = dw * numerics.dge_multiplier(scaled, 5.0, 3.0).double()
        return y, dx, dw

    return oracle


def dqt(bits: float) -> Callable[[Case], Result]:
    def oracle(case: Case) -> Result:
        high = 1 if bits == 1.58 else 2 ** (int(bits) - 1) - 1
        low = -1 if bits == 1.58 else -(2 ** (int(bits) - 1))
        step = case.w.abs().double().mean().float() / high
        stored = (case.w * (1 / step)).round().clamp(low, high) * step
        x = cast(case, case.x, "int8", 1, scaling="vector")
        dy = bf16(case.dy)
        return x @ stored.double().T, dy @ bf16(stored), dy.T @ bf16(x)

    return oracle


def bitnet(case: Case) -> Result:
    """Also dqt8-ternary, whose latent weight is the 8-bit grid's."""
    gamma = case.w.abs().double().mean().float()
    w = ((case.w * (1 / gamma)).round().clamp(-1, 1) * gamma).double()
    x = cast(case, case.x, "int8", 1, scaling="vector")
    dy = bf16(case.dy)
    return x @ w.T, dy @ bf16(w), dy.T @ bf16(x)


def dqt8_ternary(case: Case) -> Result:
    step = case.w.abs().double().mean().float() / 127
    latent = (case.w * (1 / step)).round().clamp(-128, 127) * step
    return bitnet(Case(case.x, latent, case.dy, case.seed, case.step, case.layer))


def nvfp4(case: Case) -> Result:
    t = case.first_token
    x, w = cast(case, case.x, "nvfp4", 1), cast(case, case.w, "nvfp4", 1, scaling="tile")
    dy = cast(case, case.dy, "nvfp4", 1, rounding="stochastic", gemm="dgrad", origin=(t, 0))
    signs = numerics.hadamard_signs(Key(case.seed, 0, 0, "wgrad", "signs"), 16)
    dy_t, x_t = (numerics.hadamard(m, 16, 0, signs) for m in (case.dy, case.x))
    dy_t = cast(case, dy_t, "nvfp4", 0, rounding="stochastic", gemm="wgrad", origin=(0, t))
    return x @ w.T, dy @ w, dy_t.T @ cast(case, x_t, "nvfp4", 0) / 16


def int8(case: Case) -> Result:
    x, dy = (cast(case, t, "int8", 1, scaling="vector") for t in (case.x, case.dy))
    w = cast(case, case.w, "int8", 1, scaling="tensor")
    return x @ w.T, dy @ w, bf16(case.dy).T @ bf16(case.x)


ORACLES: dict[str, Callable[[Case], Result]] = {
    "bf16": plain_bf16,
    "fp8": fp8,
    "fp8-row": fp8_row,
    "mxfp4": mxfp4("stochastic", 64),
    "mxfp4-fp8": mxfp4("stochastic", 64, fp8_forward=True),
    "mxfp4-rht": mxfp4("nearest-away", 64),
    "mxfp4-sr": mxfp4("stochastic", None),
    "mxfp4-rtn": mxfp4("nearest-away", None),
    "fp4": fp4(dge=True),
    "fp4-folded": fp4(dge=True, folded=True),
    "fp4-direct": fp4(dge=False),
    "dqt8": dqt(8),
    "dqt4": dqt(4),
    "dqt3": dqt(3),
    "dqt-ternary": dqt(1.58),
    "dqt8-ternary": dqt8_ternary,
    "bitnet": bitnet,
    "nvfp4": nvfp4,
    "int8": int8,
}
