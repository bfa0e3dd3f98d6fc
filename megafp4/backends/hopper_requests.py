"""What is asked of a cast, as far as kernels care: predicates of a :class:`CastRequest`."""

from __future__ import annotations

import torch

from megafp4.recipes.cast import CastRequest

_FP8 = ("fp8-e4m3", "fp8-e5m2")


def draws(request: CastRequest) -> bool:
    """Whether an operand, or the one whose value it starts from, depends on random bits."""
    if request.through is not None and draws(request.through):
        return True
    spec = request.operand
    rotated = request.gemm.hadamard is not None and request.gemm.signs == "random"
    return spec.quantized and (spec.rounding == "stochastic" or rotated)


def is_drawn_by_place(request: CastRequest) -> bool:
    """Whether its random bits depend on where in the whole matrix an element lies."""
    return request.operand.quantized and request.operand.rounding == "stochastic"


def is_placed(request: CastRequest) -> bool:
    """Whether kernels can draw where it lies: runs, and a slice's first k, in multiples of 16."""
    if request.part is None or not is_drawn_by_place(request):
        return True
    line, k = request.origin
    runs = [run for runs in (line, k) if not isinstance(runs, int) for run in runs]
    firsts = [k] if isinstance(k, int) else []
    return all(number % 16 == 0 for number in (*firsts, *(n for run in runs for n in run)))


def is_weight(request: CastRequest) -> bool:
    """Whether the matrix is the weight, not the activation or its gradient."""
    return request.side == "b" and request.key.gemm != "wgrad"


def shares_scale(request: CastRequest) -> bool:
    """Whether other ranks hold elements that have a scale with this slice's in common."""
    part, shared = request.part, request.operand.shared_scale
    along = (0, 1) if shared == "tensor" else (request.axis,)
    return part is not None and bool(part.peers_along(along))


def is_format(request: CastRequest, fmt: str) -> bool:
    """Whether it is of a format."""
    return request.operand.format == fmt


def is_plain_fp8(request: CastRequest) -> bool:
    """Whether it is FP8 with one scale, to the nearest even, as it stands."""
    spec = request.operand
    return (
        spec.format in _FP8
        and spec.shared_scale == "tensor"
        and spec.rounding == "nearest-even"
        and spec.prescale == 1
        and spec.clamp is None
        and request.gemm.hadamard is None
    )


def sums_on_the_way(x: torch.Tensor, request: CastRequest) -> bool:
    """Whether the MXFP4 quantizer adds up the rows that it transforms."""
    rotated = is_format(request, "mxfp4") and request.gemm.hadamard is not None
    direct = request.axis == 0 and request.through is None and is_placed(request)
    return rotated and direct and x.dtype == torch.bfloat16


def is_ladder(request: CastRequest) -> bool:
    """Whether it is E2M1 with one scale a row, ties up, as the kernel that clamps rounds it."""
    return request.operand.rounding == "nearest-up" and is_rows_of_e2m1(request)


def is_rows_of_e2m1(request: CastRequest) -> bool:
    """Whether it is E2M1 with one scale a row, of the matrix as it stands."""
    spec, direct = request.operand, request.through is None and request.gemm.hadamard is None
    plain = spec.shared_scale == "vector" and spec.statistic == "absmax" and spec.prescale == 1
    return direct and plain and spec.format == "fp4-vector" and request.axis == 1


def is_recast(request: CastRequest) -> bool:
    """Whether it is tensor-wise E4M3 of the value of E2M1 codes with one scale a row."""
    through = request.through
    if through is None or not (is_format(request, "fp8-e4m3") and is_plain_fp8(request)):
        return False
    return is_rows_of_e2m1(through) and (through.operand.clamp is None or is_ladder(through))


def sides(request: CastRequest) -> tuple[CastRequest | None, CastRequest | None]:
    """It as the operand of the rows or of the columns."""
    return (request, None) if request.axis == 1 else (None, request)


def streams_of(request: CastRequest) -> tuple[int, int, int]:
    """Philox words of the dither and of the signs, and the signs' step (-1: the position's)."""
    signs = request.key._replace(operand="signs")
    if request.gemm.signs == "fixed":
        return request.key.stream, signs._replace(layer=0).stream, 0
    return request.key.stream, signs.stream, -1
