"""What stands in for a GPU in the tests of tools/bench.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from benchmarks.session import Session
from benchmarks.timing import Time, Timer, Work
from torch import Tensor

from megafp4 import numerics
from megafp4.numerics import Key, QTensor
from megafp4.numerics.fold import fold
from megafp4_kernels import mxfp4

CEILINGS = {
    "copy TB/s": 4.0,
    "BF16 TFLOP/s": 800.0,
    "FP8 TFLOP/s": 1500.0,
    "INT8 TFLOP/s": 1600.0,
}


def fake_timer(rows: Mapping[str, Work], rounds: int) -> dict[str, Time]:
    """Run everything once; the n-th row takes n milliseconds."""
    for work in rows.values():
        work()
    return {name: Time(n, 0.9 * n, 1.1 * n) for n, name in enumerate(rows, start=1)}


def idle_timer(rows: Mapping[str, Work], rounds: int) -> dict[str, Time]:
    """The same without running anything, where the checks have done so already."""
    return {name: Time(n, 0.9 * n, 1.1 * n) for n, name in enumerate(rows, start=1)}


def session(
    folder: Path | None = None,
    rows: str = "*",
    budget: float = 1e9,
    timer: Timer = fake_timer,
) -> Session:
    """A session on the CPU."""
    command = ("python", "tools/bench.py")
    return Session(rows, budget, folder, command, "cpu", timer, lambda: dict(CEILINGS))


def quantize(
    x: Tensor,
    position: Tensor,
    row: mxfp4.Plan | mxfp4.E4M3Plan | None,
    col: mxfp4.Plan | None,
    *,
    col_from_e4m3: Tensor | None = None,
) -> tuple[mxfp4.Folded | mxfp4.Packed | None, mxfp4.Folded | mxfp4.Packed | None]:
    """The CUDA quantizer by the specification."""
    left = None
    if isinstance(row, mxfp4.E4M3Plan):
        codes = _as_e4m3(x, row.scale).codes.view(torch.float8_e4m3fn)
        left = mxfp4.Folded(codes, row.scale)
    elif row is not None:
        left = _made(x, position, row)
    if col is None:
        return left, None
    source = x if col_from_e4m3 is None else _as_e4m3(x, col_from_e4m3).dequantize()
    return left, _made(source.t().contiguous(), position, col)


def unpack(packed: mxfp4.Packed) -> mxfp4.Folded:
    """Fold packed operands by the specification."""
    codes = numerics.unpack(packed.codes, "mxfp4")
    spec = numerics.get_format("mxfp4")
    folded = fold(QTensor(codes, packed.scales, None, spec, 1, "block"))
    return mxfp4.Folded(folded.data, folded.scale)


def _as_e4m3(x: Tensor, scale: Tensor) -> QTensor:
    return numerics.encode(x, "fp8-e4m3", scale.view(1, 1), scaling="tensor")


def _made(lines: Tensor, position: Tensor, plan: mxfp4.Plan) -> mxfp4.Folded | mxfp4.Packed:
    seed, step = (int(one) for one in position[:2])
    key = _key(seed, step, plan.stream)
    if plan.hadamard:
        signs = numerics.hadamard_signs(key, plan.hadamard, lines.device)
        lines = numerics.hadamard(lines, plan.hadamard, -1, signs)
    draw = key if plan.rounding == "stochastic" else None
    q = numerics.quantize(lines, "mxfp4", -1, plan.rounding, draw, prescale=plan.prescale)
    if plan.output == "packed":
        return mxfp4.Packed(q.pack(), q.scales)
    folded = fold(q)
    return mxfp4.Folded(folded.data, folded.scale)


def _key(seed: int, step: int, stream: int) -> Key:
    """The key whose word of the Philox counter this is, for layer 0 and operand a."""
    found = [Key(seed, step, 0, gemm, "a") for gemm in ("fprop", "dgrad", "wgrad")]
    return next(key for key in found if key.stream == stream)
