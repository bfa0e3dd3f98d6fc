"""What a backend is: a way to multiply two operands that are already quantized."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import torch

from megafp4.errors import UnsupportedError
from megafp4.numerics import QTensor

Operand: TypeAlias = QTensor | torch.Tensor
"""A quantized matrix, or a BF16 / FP32 one."""

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class Backend(Protocol):
    """Computes GEMMs. Quantization is not its choice: it gets codes and must honour them."""

    name: str

    def check(self, a: str, b: str) -> None:
        """Refuse what :meth:`gemm` could not compute, before any work is done.

        Args:
            a: Format of the first operand (a name of :func:`operand_format`).
            b: Format of the second operand.

        Raises:
            UnsupportedError: This backend does not multiply these formats.
        """

    def gemm(
        self,
        a: Operand,
        b: Operand,
        axes: tuple[int, int],
        alpha: float = 1.0,
        out_dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Multiply two matrices.

        Args:
            a: [M, K] if ``axes[0]`` is 1, [K, M] if it is 0.
            b: [N, K] if ``axes[1]`` is 1, [K, N] if it is 0.
            axes: Contraction axis of each operand; fprop (1, 1), dgrad (1, 0), wgrad (0, 0).
            alpha: Multiplies the FP32 accumulator.
            out_dtype: Type of the result, rounded to once.

        Returns:
            [M, N] of ``out_dtype``.

        Raises:
            UnsupportedError: As :meth:`check`.
        """
        ...


def operand_format(operand: Operand) -> str:
    """Name of an operand's format: of its codes, or ``bf16`` / ``fp32``.

    Raises:
        UnsupportedError: A plain tensor of another type.
    """
    if isinstance(operand, QTensor):
        return operand.format.name
    if operand.dtype not in _DTYPE_NAMES:
        raise UnsupportedError(f"a GEMM operand is {operand.dtype}: give BF16, FP32 or a QTensor")
    return _DTYPE_NAMES[operand.dtype]


def line_major(operand: torch.Tensor, axis: int) -> torch.Tensor:
    """View a matrix with its contraction axis last."""
    return operand if axis == 1 else operand.t()


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A [M, K] times B [N, K]^T with FP32 operands, whatever autocast or the user allows.

    ``torch.set_float32_matmul_precision`` and the flags behind it let FP32 operands be rounded to
    TF32 or BF16. Switching them off for one product would be seen by other threads, and old and new
    flags exclude each other; in FP64 they have no say, and FP32 products are exact.
    """
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda or _cpu_may_round():
            # Always on CUDA, where the environment (NVIDIA_TF32_OVERRIDE) can allow TF32 as well.
            return (a.double() @ b.double().t()).float()
        return a.float() @ b.float().t()


def _cpu_may_round() -> bool:
    found = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return found in ("tf32", "bf16")
