"""What this GPU reaches, measured: the lines of the roofline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from benchmarks.timing import Timer, Work, time_on_gpu
from megafp4_kernels.gemm import gemm
from megafp4_kernels.gemm_int8 import gemm_int8

COPY = "copy TB/s"
PRODUCTS = {"bf16": "BF16 TFLOP/s", "fp8": "FP8 TFLOP/s", "int8": "INT8 TFLOP/s"}
"""Names of the ceilings of matrix products, by what their operands are."""
_INTEGERS = {"int8", "int4", "int3", "ternary"}
_SIZE = 8192
_COPIED = 1 << 30
_COPIES = {"4096": (4096, 8), "16384": (16384, 16)}


class Point(NamedTuple):
    """A row's place in the roofline plot."""

    family: str
    """Rows of one family look alike in the plot."""
    flops: float
    """Operations: two a multiplication and addition; of a quantizer, those of its specification."""
    bytes: float
    """Bytes that must move: inputs once, outputs once."""
    ms: float
    """Measured."""
    product: str = ""
    """What the operands of a matrix product are: a key of :data:`PRODUCTS`; else empty."""

    def fraction(self, ceilings: Mapping[str, float]) -> float:
        """Least time that the measured ceilings allow, over the time that it took."""
        least = self.bytes / ceilings[COPY] / 1e9
        if self.product:
            least = max(least, self.flops / ceilings[PRODUCTS[self.product]] / 1e9)
        return least / self.ms


def measure_ceilings(timer: Timer = time_on_gpu, rounds: int = 10) -> dict[str, float]:
    """Measure what the rows are compared with, on random data.

    Returns:
        TB/s of the best of several copies (read plus written); TFLOP/s of the best of two products
        of 8192 x 8192 matrices each for BF16, FP8 and INT8.
    """
    copies = timer(_copies(), rounds)
    best = {COPY: 2 * _COPIED / min(time.median for time in copies.values()) / 1e9}
    products = timer(_products(), rounds)
    for kind, name in PRODUCTS.items():
        fastest = min(time.median for key, time in products.items() if key.split()[0] == kind)
        best[name] = 2 * _SIZE**3 / fastest / 1e9
    return best


def product_of(entry: Mapping[str, object]) -> str:
    """Key of :data:`PRODUCTS` that an entry of the precision ledger ran as."""
    if entry["backend"] != "hopper":
        return "bf16"
    return "int8" if {entry["a"], entry["b"]} <= _INTEGERS else "fp8"


def _copies() -> dict[str, Work]:
    """Copies of 1 GiB: which is fastest depends on the driver and on PyTorch."""
    source = torch.randn(_COPIED // 2, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    words = source.view(torch.int32), target.view(torch.int32)
    work: dict[str, Work] = {
        # A kernel that copies: a graph turns copy_() into the copy of the driver.
        "neg": lambda: torch.neg(source, out=target),
        "copy_": lambda: target.copy_(source),
    }
    for name, (block, warps) in _COPIES.items():
        work[name] = lambda block=block, warps=warps: copy_words(*words, block, warps)
    return work


def copy_words(source: torch.Tensor, target: torch.Tensor, block: int, warps: int) -> None:
    """Copy int32 tensors of one size, a multiple of ``block``."""
    _copy_kernel[(source.numel() // block,)](source, target, BLOCK=block, num_warps=warps)


@triton.jit
def _copy_kernel(source, target, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))


def _products() -> dict[str, Work]:
    a, b = (torch.randn(_SIZE, _SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    ai, bi = (torch.randint(-127, 128, a.shape, device="cuda", dtype=torch.int8) for _ in range(2))
    one = torch.ones(1, device="cuda")
    out = torch.empty_like(a)
    return {
        "bf16 cuBLAS": lambda: torch.mm(a, b.t(), out=out),
        "fp8 cuBLASLt": lambda: scaled_mm(a8, b8, one, one),
        "fp8 gemm": lambda: gemm(a8, b8, scale_a=one, scale_b=one),
        "int8 cuBLASLt": lambda: torch._int_mm(ai, bi.t()),
        "int8 gemm_int8": lambda: gemm_int8(ai, bi, scale_a=one, scale_b=one),
    }


def scaled_mm(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor
) -> torch.Tensor:
    """cuBLASLt's FP8 product a b^T in BF16, with its fast accumulation."""
    return torch._scaled_mm(
        a, b.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
    )
