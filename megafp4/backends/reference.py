"""The oracle: decode both operands to FP32 and multiply, without any further rounding of them."""

from __future__ import annotations

import torch

from megafp4.backends.base import Operand, line_major, matmul_fp32, operand_format
from megafp4.numerics import QTensor


class ReferenceBackend:
    """Decodes to FP32 and multiplies in FP32 or better: every format, any device, no speed."""

    name = "reference"

    def check(self, a: str, b: str) -> None:
        """Accept every pair of formats."""

    def gemm(
        self,
        a: Operand,
        b: Operand,
        axes: tuple[int, int],
        alpha: float = 1.0,
        out_dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Multiply; see :meth:`megafp4.backends.base.Backend.gemm`."""
        left, right = (line_major(_decode(o), axis) for o, axis in zip((a, b), axes, strict=True))
        return (matmul_fp32(left, right) * alpha).to(out_dtype)


def _decode(operand: Operand) -> torch.Tensor:
    operand_format(operand)  # refuses other dtypes
    return operand.dequantize() if isinstance(operand, QTensor) else operand
