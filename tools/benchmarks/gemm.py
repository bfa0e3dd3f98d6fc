"""FP8 GEMMs on the shapes of GPT-6.7B, beside cuBLASLt FP8 and BF16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.report import Report
from benchmarks.timing import ceilings, graphed, interleaved, relative
from megafp4.numerics import quantize
from megafp4.numerics.fold import fold
from megafp4_kernels.gemm import gemm

LINEARS = {"qkv": (4096, 12288), "out": (4096, 4096), "up": (4096, 16384), "down": (16384, 4096)}
"""Input and output width of the linears of GPT-6.7B."""
_LIMIT = 2.5e-3


def measure(tokens: int, rounds: int) -> Report:
    """Time fprop, dgrad and wgrad of every linear with folded MXFP4 operands."""
    found = ceilings()
    title = f"Folded MXFP4 GEMM (E5M2 x E5M2), {tokens} tokens"
    columns = ("GEMM, M x N x K", "TFLOP/s", "cuBLASLt FP8", "BF16", "over BF16")
    report = Report(title, columns, "TFLOP/s", found)
    for name, (wide, out) in LINEARS.items():
        for kind, shape in (
            ("fprop", (tokens, out, wide)),
            ("dgrad", (tokens, wide, out)),
            ("wgrad", (out, wide, tokens)),
        ):
            _add(report, f"{name} {kind}, " + " x ".join(map(str, shape)), shape, rounds)
    return report


def _add(report: Report, name: str, shape: tuple[int, int, int], rounds: int) -> None:
    m, n, k = shape
    a, b = (torch.randn(lines, k, device="cuda", dtype=torch.bfloat16) for lines in (m, n))
    left, right = (fold(quantize(x, "mxfp4", prescale=0.75)) for x in (a, b))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones(1, device="cuda")
    scales = [torch.as_tensor(o.scale, device="cuda").reshape(1).float() for o in (left, right)]

    def own() -> Tensor:
        return gemm(left.data, right.data, scale_a=scales[0], scale_b=scales[1])

    def peer() -> Tensor:
        return torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    rows: dict[str, Callable[[], object]] = {"own": own, "fp8": peer, "bf16": lambda: a @ b.t()}
    times = interleaved({key: graphed(work) for key, work in rows.items()}, rounds)
    exact = (left.data.float() * scales[0]).double() @ (right.data.float() * scales[1]).double().t()
    error = relative(own(), exact)
    flops = 2 * m * n * k / 1e9
    speeds = [flops / times[key].median for key in rows]
    quartiles = {key: [times[key].low, times[key].high] for key in rows}
    report.add(
        name,
        *speeds,
        speeds[0] / speeds[2],
        error=error,
        limit=_LIMIT,
        quartiles_ms=quartiles,
    )
