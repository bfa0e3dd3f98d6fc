"""What the GEMMs of this package have in common: their arguments, and what these must be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.bfloat16)

SCHEMA = (
    "Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, float alpha, Tensor? bias, "
    "Tensor? weight, Tensor? weight_scale, float k, float cap"
)
"""Of :class:`Operands`, for ``torch.library``."""


class Slope(NamedTuple):
    """Multiply the result by the DGE curve's derivative [arXiv 2501.17116, eq. 8].

    Attributes:
        weight: [M, N], FP32 or BF16, contiguous.
        scale: FP32 [1] or [M]; the derivative is taken at weight * (1 / scale).
        k: Sharpness of the curve.
        cap: Largest derivative.
    """

    weight: Tensor
    scale: Tensor
    k: float = 5.0
    cap: float = 3.0


class Operands(NamedTuple):
    """What the custom operators read, in the order of :data:`SCHEMA`."""

    a: Tensor
    b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    alpha: float = 1.0
    bias: Tensor | None = None
    weight: Tensor | None = None
    weight_scale: Tensor | None = None
    k: float = 1.0
    cap: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        return self.a.shape[0], self.b.shape[0]


def gather(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    alpha: float,
    bias: Tensor | None,
    slope: Slope | None,
) -> Operands:
    """Bring a GEMM's arguments into the order of the operators."""
    weight, weight_scale, k, cap = slope or (None, None, 1.0, 1.0)
    return Operands(
        a, b, scale_a, scale_b, float(alpha), bias, weight, weight_scale, float(k), float(cap)
    )


def squares_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the sums of squares of a result: one for each block of 16 x 128 values."""
    return -(-rows // 16), -(-columns // 128)


def check_operands(
    o: Operands, dtypes: tuple[torch.dtype, ...], *, rows_apart: bool = False
) -> None:
    """Raise ValueError, in one sentence, for operands that no kernel of these dtypes multiplies.

    Args:
        o: The arguments.
        dtypes: What ``a`` and ``b`` may be.
        rows_apart: Their rows may lie apart, by multiples of 16 bytes.
    """
    for name, operand in (("a", o.a), ("b", o.b)):
        if operand.dtype not in dtypes or operand.ndim != 2:
            raise ValueError(
                f"{name} is {operand.dtype} {list(operand.shape)}: give a matrix of "
                f"{_names(dtypes)}"
            )
        if rows_apart:
            if operand.stride(1) != 1 or (operand.shape[0] > 1 and operand.stride(0) % 16):
                raise ValueError(
                    f"{name} has strides {operand.stride()}: make it contiguous along K, with "
                    "rows that are a multiple of 16 bytes apart"
                )
        elif not operand.is_contiguous():
            raise ValueError(f"{name} has strides {operand.stride()}: give a contiguous matrix")
    rows, columns = o.shape
    k, k_b = o.a.shape[1], o.b.shape[1]
    if k_b != k or k % 16 or not k:
        raise ValueError(
            f"K is {k} in a and {k_b} in b: give one contraction length that is a positive "
            "multiple of 16"
        )
    _check_vector("scale_a", o.scale_a, (1, rows), FLOATS[:1])
    _check_vector("scale_b", o.scale_b, (1, columns), FLOATS[:1])
    if o.bias is not None:
        _check_vector("bias", o.bias, (columns,), FLOATS)
    if o.weight is not None and o.weight_scale is not None:
        if o.k <= 0:
            raise ValueError(f"the slope's k is {o.k}: give a positive sharpness")
        _check_matrix("the slope's weight", o.weight, o.shape, FLOATS)
        _check_vector("the slope's scale", o.weight_scale, (1, rows), FLOATS[:1])
    for name, tensor in zip(Operands._fields, o, strict=True):
        if isinstance(tensor, Tensor):
            _check_device(name, tensor, o)


def check_result(
    o: Operands, out: Tensor, accumulate: bool = False, squares: Tensor | None = None
) -> None:
    """Raise ValueError, in one sentence, for a result that cannot take these operands' product.

    Args:
        o: The arguments, which have passed :func:`check_operands`.
        out: Where the product goes.
        accumulate: Whether it is added.
        squares: Where the sums of squares of the result go.
    """
    _check_device("out", out, o)
    if accumulate and out.dtype != torch.float32:
        raise ValueError(f"accumulate adds in FP32 and out is {out.dtype}: give a float32 out")
    _check_matrix("the result", out, o.shape, FLOATS)
    if squares is None:
        return
    _check_device("squares", squares, o)
    if out.dtype != torch.float32:
        raise ValueError(
            f"squares are of an FP32 result and out is {out.dtype}: give a float32 out"
        )
    _check_matrix("squares", squares, squares_shape(*o.shape), (torch.float64,))


def _check_matrix(
    name: str, matrix: Tensor, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]
) -> None:
    if matrix.dtype not in dtypes or matrix.shape != shape or not matrix.is_contiguous():
        raise ValueError(
            f"{name} is {matrix.dtype} {list(matrix.shape)} with strides {matrix.stride()}: give "
            f"contiguous {_names(dtypes)} {list(shape)}"
        )


def _check_vector(
    name: str, vector: Tensor, lengths: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if (
        vector.dtype not in dtypes
        or vector.ndim != 1
        or vector.shape[0] not in lengths
        or not vector.is_contiguous()
    ):
        allowed = " or ".join(str([length]) for length in dict.fromkeys(lengths))
        raise ValueError(
            f"{name} is {vector.dtype} {list(vector.shape)}: give contiguous {_names(dtypes)} "
            f"{allowed}"
        )


def _check_device(name: str, tensor: Tensor, o: Operands) -> None:
    if tensor.device != o.a.device:
        raise ValueError(f"a is on {o.a.device} and {name} on {tensor.device}: give one device")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
