"""Scales of Hopper's operands, from a pass over a matrix and from the ranks that hold the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megafp4.backends.base import Prepared
from megafp4.backends.hopper_requests import shares_scale
from megafp4.numerics import Slice, scales_from_amax
from megafp4.recipes.cast import CastRequest

if TYPE_CHECKING:
    from megafp4_kernels.lines import Lines
    from megafp4_kernels.outliers import Clamped


def tensor_scale(x: torch.Tensor, request: CastRequest) -> torch.Tensor:
    """FP32 [1]: scale of all of a matrix, from its largest magnitude if that is known."""
    from megafp4_kernels.amax import amax, scale, scale_of

    fmt, part = request.operand.format, request.part
    if request.amax is not None:
        return scale_of(request.amax, fmt)
    if part is not None and x.numel():
        return scale_of(part.largest(amax(x, None)), fmt)
    return scale(x, fmt, None)


def line_scales(x: torch.Tensor, request: CastRequest) -> torch.Tensor:
    """FP32 [lines]: scales of rows or columns, parts of which other ranks may hold."""
    from megafp4_kernels.amax import amax, scale

    fmt, axis = request.operand.format, request.axis
    if request.part is None or not shares_scale(request) or not x.numel():
        return scale(x, fmt, axis)
    largest = request.part.largest(amax(x, axis), (axis,))
    return scales_from_amax(largest, fmt)[0]


def shared_peak(
    used: Prepared | Lines | Clamped, peak: torch.Tensor | None, part: Slice | None
) -> torch.Tensor | None:
    """Peaks of an operand's rows, or [1] that of all ranks' rows."""
    from megafp4_kernels.amax import amax
    from megafp4_kernels.recast import line_peaks

    if part is None or not used.data.numel():
        return peak
    peak = line_peaks(used.data, used.scale) if peak is None else peak
    return part.largest(amax(peak.view(1, -1), None))


def rows_at_once(x: torch.Tensor, request: CastRequest, peak: bool = False) -> Lines | None:
    """Scale and cast the rows in one pass, or None where they share scales, draw or are long."""
    from megafp4_kernels.lines import MAX_COLS, cast_lines

    spec = request.operand
    alone = request.axis == 1 and spec.shared_scale == "vector" and not shares_scale(request)
    if not alone or spec.rounding == "stochastic" or x.shape[1] > MAX_COLS:
        return None
    return cast_lines(x, spec.format, rounding=spec.rounding, prescale=spec.prescale, peak=peak)
