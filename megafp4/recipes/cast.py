"""Applying a recipe to a matrix: from a tensor to an operand of one GEMM, and back to its value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megafp4.numerics import (
    Key,
    Origin,
    Peers,
    QTensor,
    Slice,
    clamp_outliers,
    dge_multiplier,
    fold_outliers,
    hadamard,
    hadamard_signs,
    quantize,
)
from megafp4.recipes.estimators import DGE
from megafp4.recipes.recipe import GemmSpec, OperandSpec, Side


@dataclass(frozen=True)
class CastRequest:
    """One operand that is wanted of a matrix."""

    gemm: GemmSpec
    side: Side
    axis: int
    """Contraction axis, 0 or 1."""
    key: Key
    """Random key of the operand."""
    origin: Origin = (0, 0)
    """Global (line, k) of the first element, or runs."""
    segments: tuple[int, ...] | None = None
    """Row counts of the matrices fused in it, see :func:`cast`."""
    through: CastRequest | None = None
    """The operand whose value is cast, where it is not the matrix itself."""
    packed: bool = False
    """Whether the operand is to be kept for a while, its codes packed."""
    sums: Tensor | None = field(default=None, compare=False)
    """FP32 [cols], to be filled with the matrix's sums over its rows when it is cast."""
    amax: Tensor | None = field(default=None, compare=False)
    """FP32 [n]: largest magnitudes of n parts that make up the matrix (the whole one, where this is
    a slice), if these are known."""
    part: Slice | None = None
    """Who holds the rest, if the matrix is a slice."""
    travels: bool = False
    """Whether the operand of a slice is to be joined with the others' before it is multiplied."""

    @property
    def operand(self) -> OperandSpec:
        """How the operand is cast."""
        return self.gemm.side(self.side)


class Used(NamedTuple):
    """What fprop multiplied, for operands that start from its value."""

    operand: QTensor | Tensor
    outliers: Tensor | None
    """What :func:`split_outliers` had cut off before."""


def cast_from(
    x: Tensor, request: CastRequest, used: Used | None = None
) -> tuple[QTensor | Tensor, Tensor]:
    """Cast a matrix, or the value of another operand made of it.

    Args:
        x: FP32 or BF16 [rows, cols].
        request: The operand; its ``packed`` is up to the caller.
        used: What ``request.through`` gives for x, if it has been made; no bit depends on it.

    Returns:
        As :func:`cast`.
    """
    if request.through is not None:
        if used is None:
            inner, outliers = split_outliers(x, request.through.operand, request.through.part)
            used = Used(cast_from(inner, request.through)[0], outliers)
        x = value(used.operand, request.through.operand)
        x = x if used.outliers is None else x.add_(used.outliers)
    return cast(
        x,
        request.gemm,
        request.side,
        request.axis,
        request.key,
        request.origin,
        request.segments,
        request.part,
    )


def cast(
    x: Tensor,
    spec: GemmSpec,
    side: Side,
    axis: int,
    key: Key,
    origin: Origin = (0, 0),
    segments: Sequence[int] | None = None,
    part: Slice | None = None,
) -> tuple[QTensor | Tensor, Tensor]:
    """Turn a matrix into one operand of a GEMM: Hadamard, prescale, quantize; or a plain cast.

    Args:
        x: FP32 or BF16 [rows, cols]; outliers that are folded in are still there.
        spec: The GEMM.
        side: Which operand of it x is.
        axis: Contraction axis, 0 or 1.
        key: Random key of the operand; the Hadamard signs derive from it, the same on both sides.
        origin: Global (line, k) of x's first element, or runs.
        segments: Row counts of the matrices fused in x, each with a tensor-wide absmean scale of
            its own; None means one.
        part: Who holds the rest, if x is a slice; the operand is then a slice of the whole's.

    Returns:
        (operand, seen): codes and scales, or a BF16 / FP32 tensor; and what it stands for, x after
        Hadamard and prescale.

    Raises:
        ConfigError: See :func:`megafp4.quantize` and :func:`megafp4.numerics.hadamard`.
    """
    operand = spec.side(side)
    if not operand.quantized:
        return x.to(operand.dtype), x
    if spec.hadamard:
        x = hadamard(x, spec.hadamard, axis, _signs(spec, key, x.device))
    inner = x
    if operand.folds_outliers and operand.clamp:
        x = x.float()
        inner, _ = clamp_outliers(x, operand.clamp.alpha, operand.clamp.mode, _features(part))
    split = operand.statistic == "absmean" and operand.shared_scale == "tensor" and segments
    parts = [
        quantize(
            piece,
            operand.format,
            axis,
            operand.rounding,
            key,
            scaling=operand.scaling,
            statistic=operand.statistic,
            prescale=operand.prescale,
            dither_bits=operand.dither_bits,
            origin=origin,
            part=part,
        )
        for piece in (torch.split(x, list(segments)) if split and segments else (inner,))
    ]
    joined = _join(parts)
    if operand.folds_outliers:
        joined = fold_outliers(joined, x, inner, _features(part))
    seen = x if operand.prescale == 1 else x.float() * operand.prescale
    return joined, seen


def split_outliers(
    x: Tensor, spec: OperandSpec, part: Slice | None = None
) -> tuple[Tensor, Tensor | None]:
    """Clamp activations as the recipe says [2501.17116, section 3.2].

    Args:
        x: FP32 or BF16 [tokens, features].
        spec: The operand.
        part: Who holds the rest, if x is a slice.

    Returns:
        (what is to be quantized, what was cut off), FP32; the latter None if nothing is to be
        multiplied on the side. Outliers that :func:`cast` folds in stay in x.
    """
    if spec.clamp is None or spec.folds_outliers:
        return x, None
    # In FP32: a difference of two BF16 values would be rounded to BF16.
    clamped, residual = clamp_outliers(
        x.float(), spec.clamp.alpha, spec.clamp.mode, _features(part)
    )
    return clamped, residual if spec.clamp.residual == "exact" else None


def _features(part: Slice | None) -> Peers | None:
    """Who holds other features of the same tokens."""
    return None if part is None else next(iter(part.peers_along((1,))), None)


def with_codes_of(
    made: CastRequest, operand: QTensor | Tensor, wanted: CastRequest
) -> QTensor | None:
    """Another operand of the same matrix, if its codes are those of one that is made already.

    Args:
        made: The operand that exists.
        operand: What it gave.
        wanted: The other one.

    Returns:
        The operand along the other axis; None unless there is one scale for the tensor, and
        neither random bits nor a Hadamard transform tell the two apart.
    """
    if not isinstance(operand, QTensor) or operand.scaling != "tensor":
        return None
    spec, other = made.operand, replace(wanted.operand, saved_as=made.operand.saved_as)
    drawn = spec.rounding == "stochastic" or made.gemm.hadamard or wanted.gemm.hadamard
    origin = made.through == wanted.through and made.segments == wanted.segments
    return None if drawn or spec != other or not origin else replace(operand, axis=wanted.axis)


def dge_slope(weight: Tensor, operand: QTensor | Tensor, dge: DGE) -> Tensor:
    """Derivative of the weight's rounding, which multiplies its gradient [2501.17116, eq. 8].

    Args:
        weight: [out, in], before quantization.
        operand: The same, as fprop multiplied it; its scales tell where in the ladder a weight is.
        dge: Sharpness and cap.

    Returns:
        FP32 [out, in].
    """
    assert isinstance(operand, QTensor), "OperandSpec allows DGE for quantized weights only"
    # Multiplied by the reciprocal, as quantize() does.
    return dge_multiplier(weight.float() * (1.0 / operand.scale_values()), dge.k, dge.cap)


def value(operand: QTensor | Tensor, spec: OperandSpec) -> Tensor:
    """What an operand stands for: FP32 decoded value, prescale undone; a plain cast as it is."""
    if not isinstance(operand, QTensor):
        return operand
    decoded = operand.dequantize()
    return decoded if spec.prescale == 1 else decoded / spec.prescale


def _signs(spec: GemmSpec, key: Key, device: torch.device) -> Tensor:
    assert spec.hadamard is not None
    if spec.signs == "fixed":
        key = key._replace(step=0, layer=0)
    return hadamard_signs(key._replace(operand="signs"), spec.hadamard, device)


def _join(parts: list[QTensor]) -> QTensor:
    """Stack row segments, each with one scale, into a matrix with one scale per row."""
    if len(parts) == 1:
        return parts[0]
    rows = [q.scales.expand(q.shape[0], 1) for q in parts]
    return replace(
        parts[0],
        codes=torch.cat([q.codes for q in parts]),
        scales=torch.cat(rows),
        axis=1,
        scaling="vector",
    )
