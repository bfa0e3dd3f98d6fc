"""What the backends that decode have in common: operands cast by the specification itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from megafp4.backends.base import (
    Operand,
    PackedOperand,
    Prepared,
    Slope,
    Stateless,
    cast_all,
    finish,
    operand_format,
)
from megafp4.errors import UnsupportedError
from megafp4.numerics import QTensor
from megafp4.recipes.cast import CastRequest


class SimulatedBackend(Stateless, ABC):
    """Casts with :mod:`megafp4.numerics`; a subclass multiplies."""

    accumulates = False

    def check(self, a: str, b: str) -> None:
        """Accept every pair of formats."""

    def cast(
        self,
        x: torch.Tensor,
        wanted: Sequence[CastRequest],
        used: tuple[Operand, torch.Tensor | None] | None = None,
    ) -> list[Operand]:
        """Cast; see :meth:`megafp4.backends.base.Backend.cast`."""
        return cast_all(x, wanted, used)

    def adopt(self, stored: QTensor) -> Operand:
        """Codes and scales are an operand as they are."""
        return stored

    def ran_as(self, a: Operand, b: Operand) -> str:
        """Name of the backend."""
        return self.name

    def gemm(
        self,
        a: Operand,
        b: Operand,
        axes: tuple[int, int],
        alpha: float = 1.0,
        out_dtype: torch.dtype = torch.float32,
        *,
        bias: torch.Tensor | None = None,
        slope: Slope | None = None,
        accumulate_into: torch.Tensor | None = None,
        overwrite: bool = False,
    ) -> torch.Tensor:
        """Multiply; see :meth:`megafp4.backends.base.Backend.gemm`."""
        self.check(operand_format(a), operand_format(b))
        out = self.product(_plain(a), _plain(b), axes, alpha)
        return finish(out, out_dtype, bias, slope, accumulate_into, overwrite)

    @abstractmethod
    def product(
        self,
        a: QTensor | torch.Tensor,
        b: QTensor | torch.Tensor,
        axes: tuple[int, int],
        alpha: float,
    ) -> torch.Tensor:
        """FP32 [M, N]: the product of the decoded operands times alpha."""


def _plain(operand: Operand) -> QTensor | torch.Tensor:
    if isinstance(operand, PackedOperand):
        return operand.unpacked()
    if isinstance(operand, Prepared):
        raise UnsupportedError(
            f"an operand of {operand.format} was prepared for kernels: cast it with this backend"
        )
    return operand
