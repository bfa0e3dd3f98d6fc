"""INT8 GEMM: integer sums, scales in the epilogue; for INT8, BitNet and DQT forward passes."""

from __future__ import annotations

import torch
from torch import Tensor

from megafp4_kernels.gemm_arguments import gather
from megafp4_kernels.gemm_triton import multiply

# Products of magnitude up to 2^14 must not overflow the INT32 sum.
_MAX_DEPTH = 1 << 16


def gemm_int8(
    a: Tensor,
    b: Tensor,
    *,
    scale_a: Tensor,
    scale_b: Tensor,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Compute alpha * scale_a * scale_b * (a b^T) + bias; the integer sum is exact.

    The sum is converted to FP32, scaled and rounded once to ``out_dtype``.

    Args:
        a: int8 [M, K], contiguous; K is a multiple of 16, at most 65536.
        b: int8 [N, K], likewise; ternary codes are int8 too.
        scale_a: FP32 [1] or [M].
        scale_b: FP32 [1] or [N].
        alpha: Factor of the product.
        bias: FP32 or BF16 [N].
        out_dtype: bfloat16 or float32.

    Returns:
        [M, N] of ``out_dtype``.

    Raises:
        ValueError: Shapes, dtypes, strides or devices do not fit together.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8 or a.shape[-1] > _MAX_DEPTH:
        raise ValueError(
            f"a is {a.dtype} {list(a.shape)} and b {b.dtype}: give int8 with K at most {_MAX_DEPTH}"
        )
    return multiply(*gather(a, b, scale_a, scale_b, alpha, bias, None), out_dtype)
