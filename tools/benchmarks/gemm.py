"""8-bit GEMMs on the shapes of GPT-6.7B, beside cuBLASLt's and BF16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.ceilings import Point, scaled_mm
from benchmarks.report import Report
from benchmarks.session import Session
from benchmarks.timing import Work, relative
from megafp4.numerics import quantize
from megafp4.numerics.fold import fold
from megafp4_kernels.gemm import gemm
from megafp4_kernels.gemm_int8 import gemm_int8
from megafp4_kernels.gemm_triton import gemm_triton

LINEARS = {"qkv": (4096, 12288), "out": (4096, 4096), "up": (4096, 16384), "down": (16384, 4096)}
"""Input and output width of the linears of GPT-6.7B."""

_E4M3, _E5M2, _INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
PAIRINGS = {
    "folded MXFP4": (_E5M2, _E5M2),
    "E4M3 x E4M3": (_E4M3, _E4M3),
    "INT8 x INT8": (_INT8, _INT8),
    "E5M2 x E4M3": (_E5M2, _E4M3),
    "E4M3 x E5M2": (_E4M3, _E5M2),
    "E5M2 x E5M2": (_E5M2, _E5M2),
}
_FOLDED = "folded MXFP4"
_LIMITS = {_FOLDED: 3e-3, "INT8 x INT8": 2.5e-3}
"""Relative difference to float64; 1.7e-3 is the rounding of the result to BF16."""
_DENSE_LIMIT = 5e-3
"""Of FP8 operands that fill their mantissas: the tensor core drops bits as it sums."""
_COLUMNS = ("GEMM, M x N x K", "us", "TFLOP/s", "cuBLASLt", "row-wise", "BF16", "over BF16",
            "of roofline")  # fmt: skip

Multiply = Callable[..., Tensor]


class Operands(NamedTuple):
    """What one group of rows multiplies: a b^T with both K-major."""

    a: Tensor
    b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    dense_a: Tensor
    """BF16, for the baseline."""
    dense_b: Tensor


def shapes(tokens: int) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Name and M, N, K of fprop, dgrad and wgrad of every linear."""
    for name, (wide, out) in LINEARS.items():
        yield f"{name} fprop", (tokens, out, wide)
        yield f"{name} dgrad", (tokens, wide, out)
        yield f"{name} wgrad", (out, wide, tokens)


def measure(session: Session, tokens: int, rounds: int) -> Report:
    """Time every pairing of formats on every GEMM of the linears.

    Args:
        session: Rows that are wanted, budget, timer.
        tokens: Length of the activations.
        rounds: Samples of each.
    """
    title = f"8-bit GEMMs, {tokens} tokens: TFLOP/s beside cuBLASLt and BF16"
    report = session.report(title, _COLUMNS, "TFLOP/s")
    for pairing in PAIRINGS:
        own = {"gemm_int8": gemm_int8} if _INT8 in PAIRINGS[pairing] else {
            "gemm": gemm, "gemm_triton": gemm_triton}  # fmt: skip
        for name, shape in shapes(tokens):
            full = f"{name}, {' x '.join(map(str, shape))}, {pairing}"
            wanted = {f"{full}, {kernel}": multiply for kernel, multiply in own.items()}
            wanted = {row: work for row, work in wanted.items() if session.starts(report, row)}
            if wanted:
                _measure(session, report, pairing, shape, wanted, rounds)
    return report


def _measure(
    session: Session,
    report: Report,
    pairing: str,
    shape: tuple[int, int, int],
    kernels: dict[str, Multiply],
    rounds: int,
) -> None:
    """Time our kernels on one GEMM, together with the libraries'."""
    given = _operands(pairing, shape, session.device)
    limit = _LIMITS.get(pairing, _DENSE_LIMIT)
    left = given.a.float().double() * given.scale_a.double()
    right = given.b.float().double() * given.scale_b.double()
    exact = left @ right.t()
    del left, right
    peers = _working(report, _peers(given), pairing)
    for name, multiply in kernels.items():

        def own(multiply: Multiply = multiply) -> Tensor:
            return multiply(given.a, given.b, scale_a=given.scale_a, scale_b=given.scale_b)

        found = session.checked(
            report,
            name,
            limit,
            lambda own=own: relative(own(), exact),
            lambda own=own: {"own": own, **peers},
            rounds,
        )
        if found is None:
            continue
        error, times = found
        product = "int8" if given.a.dtype == _INT8 else "fp8"
        m, n, k = shape
        flops, moved = 2 * m * n * k, m * k + n * k + 2 * m * n
        point = Point(name.split(", ")[-1], flops, moved, times["own"].median, product)
        speeds = {key: flops / time.median / 1e9 for key, time in times.items()}
        report.add(
            name,
            1e3 * times["own"].median,
            speeds["own"],
            speeds.get("cuBLASLt", ""),
            speeds.get("row-wise", ""),
            speeds["bf16"],
            speeds["own"] / speeds["bf16"],
            point.fraction(report.ceilings),
            error=error,
            limit=limit,
            ms={key: time.as_json() for key, time in times.items()},
            roofline=point._asdict(),
        )


def _working(report: Report, peers: dict[str, Work], pairing: str) -> dict[str, Work]:
    """The libraries' products that can be had; the report names those that cannot."""
    found = {}
    for name, work in peers.items():
        try:
            work()
        except RuntimeError as refusal:
            missing = f"{name}, {pairing}"
            if all(one["row"] != missing for one in report.left_out):
                report.leave_out(missing, str(refusal).splitlines()[0])
            continue
        found[name] = work
    return found


def _operands(pairing: str, shape: tuple[int, int, int], device: str) -> Operands:
    m, n, k = shape
    a, b = (torch.randn(lines, k, device=device, dtype=torch.bfloat16) for lines in (m, n))
    if pairing == _FOLDED:
        left, right = (fold(quantize(x, "mxfp4", prescale=0.75)) for x in (a, b))
        scales = [one.scale.reshape(1).float().to(device) for one in (left, right)]
        return Operands(left.data, right.data, scales[0], scales[1], a, b)
    kinds = PAIRINGS[pairing]
    if _INT8 in kinds:
        left8, right8 = ((x.float() * 32).round().clamp(-127, 127).to(_INT8) for x in (a, b))
    else:
        left8, right8 = (x.to(kind) for x, kind in zip((a, b), kinds, strict=True))
    one = torch.full((1,), 2.0**-5 if _INT8 in kinds else 1.0, device=device)
    return Operands(left8, right8, one, one.clone(), a, b)


def _peers(given: Operands) -> dict[str, Work]:
    """Library products of the same operands; cuBLASLt has none of E5M2 x E5M2."""
    found: dict[str, Work] = {"bf16": lambda: given.dense_a @ given.dense_b.t()}
    if not given.a.is_cuda:
        return found
    kinds = given.a.dtype, given.b.dtype
    if kinds == (_INT8, _INT8):
        found["cuBLASLt"] = lambda: torch._int_mm(given.a, given.b.t())
    elif kinds != (_E5M2, _E5M2):
        found["cuBLASLt"] = lambda: scaled_mm(given.a, given.b, given.scale_a, given.scale_b)
    if kinds == (_E4M3, _E4M3):
        rows = given.scale_a.expand(len(given.a), 1).contiguous()
        cols = given.scale_b.expand(1, len(given.b)).contiguous()
        found["row-wise"] = lambda: scaled_mm(given.a, given.b, rows, cols)
    return found
