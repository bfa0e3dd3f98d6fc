"""BF16 tensor cores: decode to BF16, multiply, put the scales that factor out into the epilogue.

What is exact. All code values are exact in BF16 (E2M1, E4M3, E5M2, int8 need at most 8 significant
bits), and so is E2M1 times an E8M0 or E4M3 block scale. A scale per line or per tensor is FP32 and
would not be: it multiplies the FP32 accumulator instead, as does NVFP4's tensor scale. Then the
only difference to the oracle is the order of FP32 additions.

What is not. A scale per line that lies *on* the contraction axis (the rows of a grid weight in
dgrad) cannot leave the sum; it multiplies the decoded value, which is rounded to BF16 once.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megafp4.backends.base import line_major, matmul_fp32
from megafp4.backends.simulated import SimulatedBackend
from megafp4.errors import UnsupportedError
from megafp4.numerics import QTensor


class BF16Backend(SimulatedBackend):
    """BF16 operands with FP32 accumulation and FP32 epilogue, on CPU or any GPU."""

    name = "bf16"

    def check(self, a: str, b: str) -> None:
        """Refuse FP32 operands, which BF16 cannot hold."""
        if "fp32" in (a, b):
            raise UnsupportedError(
                f"backend 'bf16' cannot multiply {a} x {b}: choose backend 'reference' or BF16"
            )

    def product(
        self,
        a: QTensor | torch.Tensor,
        b: QTensor | torch.Tensor,
        axes: tuple[int, int],
        alpha: float,
    ) -> torch.Tensor:
        """FP32 [M, N]: the product of the decoded operands times alpha."""
        left, left_scale = decode(a, axes[0])
        right, right_scale = decode(b, axes[1])
        out = matmul(left, right) * alpha
        if left_scale is not None:
            out *= left_scale.reshape(-1, 1)
        if right_scale is not None:
            out *= right_scale.reshape(1, -1)
        return out


def decode(operand: QTensor | torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """BF16 operand, contraction axis last, and the FP32 scale of its lines for the epilogue."""
    scale = None
    if not isinstance(operand, QTensor):
        decoded = operand
    elif operand.scaling == "tensor" or (operand.scaling == "vector" and operand.axis == axis):
        decoded, scale = operand.values(torch.bfloat16), operand.scale_values()
    elif operand.tensor_scale is not None:
        one = torch.ones_like(operand.tensor_scale)
        decoded = replace(operand, tensor_scale=one).dequantize(torch.bfloat16)
        scale = operand.tensor_scale
    else:
        decoded = operand.dequantize(torch.bfloat16)
    return line_major(decoded, axis), scale


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A B^T with an FP32 result."""
    if a.is_cuda:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    # CPU kernels round a BF16 product to BF16; with FP32 operands the same exact products are
    # accumulated in FP32, which is what a tensor core does.
    return matmul_fp32(a, b)
