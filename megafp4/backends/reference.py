"""The oracle: decode both operands to FP32 and multiply, without any further rounding of them."""

from __future__ import annotations

import torch

from megafp4.backends.base import line_major, matmul_fp32, operand_format
from megafp4.backends.simulated import SimulatedBackend
from megafp4.numerics import QTensor


class ReferenceBackend(SimulatedBackend):
    """Decodes to FP32 and multiplies in FP32 or better: every format, any device, no speed."""

    name = "reference"

    def product(
        self,
        a: QTensor | torch.Tensor,
        b: QTensor | torch.Tensor,
        axes: tuple[int, int],
        alpha: float,
    ) -> torch.Tensor:
        """FP32 [M, N]: the product of the decoded operands times alpha."""
        left, right = (line_major(_decode(o), axis) for o, axis in zip((a, b), axes, strict=True))
        return matmul_fp32(left, right) * alpha


def _decode(operand: QTensor | torch.Tensor) -> torch.Tensor:
    operand_format(operand)  # refuses other dtypes
    return operand.dequantize() if isinstance(operand, QTensor) else operand
