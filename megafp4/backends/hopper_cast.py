"""From a matrix to the operands of Hopper's tensor cores, with as few passes over it as there are.

What is fused: both MXFP4 operands of one matrix; FP8 of a forward pass with the MXFP4 operand that
its value gives wgrad; both FP8 operands that share a tensor's scale; scaling and casting of rows;
clamping, scaling and casting to E2M1 with the outliers folded in. Slices, too: kernels draw by the
place of a slice in the whole, and what ranks share of a scale or of a token's outliers is exchanged
between two kernels.
Whatever has no kernel is cast by the specification, on the GPU and with the same codes, only
slower: BitNet's weights, and values behind a BF16 operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megafp4.backends.base import Operand, PackedOperand, Prepared
from megafp4.backends.hopper_outliers import Clipped, clip
from megafp4.backends.hopper_requests import (
    draws,
    is_format,
    is_ladder,
    is_placed,
    is_plain_fp8,
    is_recast,
    sides,
    streams_of,
    sums_on_the_way,
)
from megafp4.backends.hopper_scales import line_scales, rows_at_once, shared_peak, tensor_scale
from megafp4.backends.hopper_state import Positions, Windows
from megafp4.errors import UnsupportedError
from megafp4.numerics import QTensor, get_format
from megafp4.numerics.formats import E2M1, Integer
from megafp4.recipes.cast import CastRequest, cast_from

if TYPE_CHECKING:
    from megafp4_kernels.mxfp4 import Folded, Packed, Plan

_MXFP4_ROUNDINGS = ("stochastic", "nearest-even", "nearest-away")


class Caster:
    """Casts, and keeps what kernels need from call to call: windows and positions."""

    def __init__(self) -> None:
        self.windows = Windows()
        self.positions = Positions()

    def cast(
        self,
        x: torch.Tensor,
        wanted: Sequence[CastRequest],
        used: tuple[Operand, torch.Tensor | None] | None = None,
    ) -> list[Operand]:
        """See :meth:`megafp4.backends.base.Backend.cast`."""
        x = x.contiguous()
        for request in wanted:
            if request.sums is not None and not sums_on_the_way(x, request):
                torch.sum(x, 0, dtype=torch.float32, out=request.sums)
        if len(wanted) == 2 and (pair := self._pair(x, *wanted)) is not None:
            return list(pair)
        fprop = used[0] if used is not None and isinstance(used[0], Clipped) else None
        return [self._one(x, request, fprop) for request in wanted]

    def _pair(
        self, x: torch.Tensor, first: CastRequest, second: CastRequest
    ) -> tuple[Operand, Operand] | None:
        """Both operands in one pass, or None where no kernel makes these two together."""
        if (first.axis, second.axis) != (1, 0):
            return None
        if not (is_placed(first) and is_placed(second)):
            return None
        direct = first.through is None and second.through is None
        if direct and is_format(first, "mxfp4") and is_format(second, "mxfp4"):
            row, col = self._mxfp4(x, first, second)
            return _operand(row, first), _operand(col, second)
        plain = first.through is None and is_plain_fp8(first)
        e4m3 = plain and is_format(first, "fp8-e4m3")
        if e4m3 and is_format(second, "mxfp4") and second.through in (None, first):
            return self._e4m3_and_mxfp4(x, first, second)
        same = plain and is_plain_fp8(second) and first.operand.format == second.operand.format
        if same and second.through is None:
            return self._fp8_both(x, first, second)
        if second.through == first and is_recast(second):
            return self._fp4_and_recast(x, first, second)
        return None

    def _one(self, x: torch.Tensor, request: CastRequest, fprop: Clipped | None) -> Operand:
        spec, through = request.operand, request.through
        if not spec.quantized or not is_placed(request):
            return self._specified(x, request)
        if through is not None:
            return self._through(x, request, through, fprop)
        if is_format(request, "mxfp4"):
            row, col = self._mxfp4(x, *(sides(request)))
            return _operand(row if request.axis == 1 else col, request)
        if is_format(request, "nvfp4"):
            return self._nvfp4(x, request)
        if spec.clamp is not None and spec.folds_outliers:
            return _fp4(x, request) if is_ladder(request) else self._specified(x, request)
        if spec.statistic == "absmax" and request.gemm.hadamard is None:
            return self._lines(x, request)
        return self._specified(x, request)

    def _through(
        self, x: torch.Tensor, request: CastRequest, through: CastRequest, fprop: Clipped | None
    ) -> Operand:
        """An operand that starts from the value of another."""
        from_e4m3 = is_format(through, "fp8-e4m3") and is_plain_fp8(through)
        if from_e4m3 and is_format(request, "mxfp4") and request.axis == 0:
            of = tensor_scale(x, through)
            _, col = self._mxfp4(x, None, request, of)
            return _operand(col, request)
        if is_recast(request):
            return self._recast(x, request, through, fprop)
        return self._specified(x, request)

    def _mxfp4(
        self,
        x: torch.Tensor,
        row: CastRequest | None,
        col: CastRequest | None,
        from_e4m3: torch.Tensor | None = None,
    ) -> tuple[Folded | Packed | None, Folded | Packed | None]:
        from megafp4_kernels.mxfp4 import quantize

        any_of = row or col
        assert any_of is not None
        at = self.positions.of(any_of, x.device)._asdict()
        plans = [None if one is None else self._plan(one, x.device) for one in (row, col)]
        row_plan, col_plan = plans
        sums = None if col is None else _sums_of(x, col)
        return quantize(x, row=row_plan, col=col_plan, **at, col_from_e4m3=from_e4m3, col_sums=sums)

    def _e4m3_and_mxfp4(
        self, x: torch.Tensor, first: CastRequest, second: CastRequest
    ) -> tuple[Operand, Operand]:
        from megafp4_kernels.mxfp4 import E4M3Plan, quantize

        of = tensor_scale(x, first)
        at, plan = self.positions.of(second, x.device)._asdict(), self._plan(second, x.device)
        through, sums = None if second.through is None else of, _sums_of(x, second)
        row, col = quantize(
            x, row=E4M3Plan(of), col=plan, **at, col_from_e4m3=through, col_sums=sums
        )
        return _operand(row, first), _operand(col, second)

    def _fp8_both(
        self, x: torch.Tensor, first: CastRequest, second: CastRequest
    ) -> tuple[Operand, Operand]:
        from megafp4_kernels.casts import cast

        fmt = first.operand.format
        of = tensor_scale(x, first)
        row, col = cast(x, fmt, of, row=True, col=True)
        assert row is not None
        assert col is not None
        return Prepared(row, of, fmt), Prepared(col, of, fmt)

    def _lines(self, x: torch.Tensor, request: CastRequest) -> Operand:
        """A format with FP32 scales, of the tensor or of its lines."""
        from megafp4_kernels.casts import DTYPES, cast

        spec, axis = request.operand, request.axis
        if spec.format not in DTYPES or spec.dither_bits != 8:
            return self._specified(x, request)
        if (made := rows_at_once(x, request)) is not None:
            return Prepared(made.data, made.scale, spec.format)
        shared = spec.shared_scale == "tensor"
        of = tensor_scale(x, request) if shared else line_scales(x, request)
        row, col = cast(
            x,
            spec.format,
            of,
            row=axis == 1,
            col=axis == 0,
            rounding=spec.rounding,
            prescale=spec.prescale,
            **self.positions.of(request, x.device)._asdict(),
            stream=request.key.stream,
            scale_axis=None if shared else 1 - axis,
        )
        data = row if axis == 1 else col
        assert data is not None
        return Prepared(data, of, spec.format)

    def apart(
        self, x: torch.Tensor, request: CastRequest
    ) -> tuple[Operand, torch.Tensor | None] | None:
        """See :meth:`megafp4.backends.base.Splitting.cast_apart`."""
        from megafp4_kernels.outliers import MAX_FEATURES

        clamp = request.operand.clamp
        if clamp is None or clamp.residual == "folded" or not is_ladder(request):
            return None
        if x.shape[1] % 2 or x.shape[1] > MAX_FEATURES:
            return None
        found = clip(x.contiguous(), request)
        left = Clipped(found.data, found.scale, "fp4-vector", found.limits, found.peak)
        return left, found.residual

    def _fp4_and_recast(
        self, x: torch.Tensor, first: CastRequest, second: CastRequest
    ) -> tuple[Operand, Operand] | None:
        from megafp4_kernels.recast import recast

        clamp = first.operand.clamp
        if clamp is None:
            made = rows_at_once(x, first, peak=True)
            rows = made or self._lines(x, first)
            assert not isinstance(rows, torch.Tensor | QTensor | PackedOperand)
            used = Prepared(rows.data, rows.scale, first.operand.format)
            peak = None if made is None else made.peak
        elif first.operand.folds_outliers:
            found = clip(x, first)
            used, peak = Prepared(found.data, found.scale, "fp8-e4m3"), found.peak
        else:
            return None
        peak = shared_peak(used, peak, first.part)
        _, col, of = recast(used.data, used.scale, peak=peak, col=True)
        assert col is not None
        return used, Prepared(col, of, second.operand.format)

    def _recast(
        self, x: torch.Tensor, request: CastRequest, through: CastRequest, fprop: Clipped | None
    ) -> Operand:
        from megafp4_kernels.recast import recast

        clamp = through.operand.clamp
        row = request.axis == 1
        if clamp is None:
            made = rows_at_once(x, through, peak=True)
            used = made or self._lines(x, through)
            assert not isinstance(used, torch.Tensor | QTensor | PackedOperand)
            peak = shared_peak(used, None if made is None else made.peak, through.part)
            by_row, by_col, of = recast(used.data, used.scale, peak=peak, row=row, col=not row)
        else:
            found = fprop or clip(x, through)
            exact = clamp.residual == "exact"
            by_row, by_col, of = recast(
                found.data,
                found.scale,
                peak=shared_peak(found, found.peak, through.part),
                x=x if exact else None,
                limits=found.limits if exact else None,
                row=row,
                col=not row,
            )
        data = by_row if row else by_col
        assert data is not None
        return Prepared(data, of, request.operand.format)

    def _nvfp4(self, x: torch.Tensor, request: CastRequest) -> Operand:
        from megafp4_kernels.amax import amax
        from megafp4_kernels.nvfp4 import quantize_nvfp4
        from megafp4_kernels.nvfp4_amax import block_magnitudes

        spec = request.operand
        streams = streams_of(request)
        if spec.dither_bits != 8 or (request.gemm.hadamard or 16) != 16:
            return self._specified(x, request)
        at = self.positions.of(request, x.device)
        rotation = {
            "tile": spec.shared_scale == "tile",
            "hadamard": request.gemm.hadamard or 0,
            "sign_stream": streams[1],
            "sign_step": streams[2],
        }
        blocks = largest = None
        if request.part is not None and x.numel():
            blocks = block_magnitudes(x, request.axis, position=at.position, **rotation)
            largest = request.part.largest(amax(blocks, None))
        made = quantize_nvfp4(
            x,
            request.axis,
            rounding=spec.rounding,
            prescale=spec.prescale,
            **at._asdict(),
            stream=streams[0],
            **rotation,
            block_amax=blocks,
            largest=largest,
            codes=request.travels,
            values=not request.travels,
        )
        if request.travels:
            assert made.codes is not None
            fmt = get_format("nvfp4")
            return PackedOperand(made.codes, made.scales, made.tensor_scale, fmt, 1, "block")
        assert made.values is not None
        return Prepared(made.values, made.tensor_scale, "nvfp4")

    def _specified(self, x: torch.Tensor, request: CastRequest) -> Operand:
        """Cast by the specification, then bring the codes into the form of the tensor cores."""
        if self.positions.pinned(x.device) and draws(request):
            raise UnsupportedError(
                f"{request.operand} has no kernel that reads its random bits from the GPU, so a "
                "CUDA graph would repeat them: leave train.cuda_graph off"
            )
        operand, _ = cast_from(x, request)
        if not isinstance(operand, QTensor) or operand.scaling in ("block", "tile"):
            return operand
        scale = operand.scale_values().reshape(-1)
        element = operand.format.element
        if isinstance(element, Integer):
            data = operand.values().to(torch.int8)
        elif element == E2M1:
            data = operand.values().to(torch.float8_e4m3fn)
        else:
            data = operand.codes.view(_FLOAT8[operand.format.name])
        lines = data if request.axis == 1 else data.t()
        return Prepared(lines.contiguous(), scale, operand.format.name)

    def _plan(self, request: CastRequest, device: torch.device) -> Plan:
        from megafp4_kernels.mxfp4 import Plan

        spec = request.operand
        if spec.rounding not in _MXFP4_ROUNDINGS or spec.dither_bits != 8:
            raise UnsupportedError(
                f"backend 'hopper' rounds MXFP4 {', '.join(_MXFP4_ROUNDINGS)} with 8 random bits, "
                f"not {spec.rounding!r} with {spec.dither_bits}: change the recipe or the backend"
            )
        streams = streams_of(request)
        # Folded, a slice has a window of its own and could not be joined with the others.
        packed = request.packed or request.travels
        window = None if packed else self.windows.of(streams[0], device)
        return Plan(
            request.gemm.hadamard or 0,
            spec.rounding,
            spec.prescale,
            *streams,
            "packed" if packed else "folded",
            window,
        )


_FLOAT8 = {"fp8-e4m3": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}


def _fp4(x: torch.Tensor, request: CastRequest) -> Operand:
    """E2M1 with the outliers folded in, so in E4M3."""
    found = clip(x, request)
    return Prepared(found.data, found.scale, "fp8-e4m3")


def _sums_of(x: torch.Tensor, request: CastRequest) -> torch.Tensor | None:
    """Sums that the MXFP4 quantizer is to fill while it makes an operand along the columns."""
    return request.sums if sums_on_the_way(x, request) else None


def _operand(made: Folded | Packed | None, request: CastRequest) -> Operand:
    """Wrap what the MXFP4 quantizer made; lines x K, so the axis of packed codes is 1."""
    from megafp4_kernels.mxfp4 import Folded

    assert made is not None, "the quantizer makes what it has a plan for"
    spec = get_format(request.operand.format)
    if isinstance(made, Folded):
        return Prepared(made.data, made.scale, spec.name)
    return PackedOperand(made.codes, made.scales, None, spec, 1, "block")
