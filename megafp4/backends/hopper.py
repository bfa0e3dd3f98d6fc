"""Hopper's FP8 and INT8 tensor cores: the recipe's codes, bit for bit, at FP8 rate.

========================  ===========================================================
format                    how it is multiplied
========================  ===========================================================
mxfp4                     folded: E2M1 x 2^(e - base) as E5M2 byte, 2^base in the epilogue
fp4-vector                its E2M1 values as E4M3 bytes, the line's scale in the epilogue
fp8-e4m3, fp8-e5m2        as they are
int8, int4, int3, ternary int8
nvfp4                     decoded to BF16 without the tensor scale, which is exact
bf16                      BF16
========================  ===========================================================

Pairs of the first three run on FP8 tensor cores, pairs of the fourth on INT8 ones; every other pair
runs in BF16, and the ledger says so (``hopper/bf16``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megafp4.backends.base import Operand, PackedOperand, Prepared, Slope, finish, line_major
from megafp4.backends.bf16 import decode, matmul
from megafp4.backends.hopper_cast import Caster
from megafp4.errors import UnsupportedError
from megafp4.numerics import QTensor
from megafp4.numerics.formats import Integer
from megafp4.recipes.cast import CastRequest

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Formats that run on FP8 and on INT8 tensor cores, each with its own kind.
_NATIVE = (("mxfp4", "fp4-vector", "fp8-e4m3", "fp8-e5m2"), ("int8", "int4", "int3", "ternary"))
_MULTIPLE = 16  # bytes of a row of an operand, for TMA


class HopperBackend:
    """FP8 tensor cores of compute capability 9.0, fed by fused quantizers."""

    name = "hopper"
    accumulates = True

    def __init__(self) -> None:
        self._caster = Caster()

    def check(self, a: str, b: str) -> None:
        """Refuse FP32 operands and machines without such a GPU."""
        if "fp32" in (a, b):
            raise UnsupportedError(
                f"backend 'hopper' cannot multiply {a} x {b}: choose backend 'reference' or BF16"
            )
        capability = device_capability()
        if capability != (9, 0):
            found = "no CUDA GPU" if capability is None else "one of {}.{}".format(*capability)
            raise UnsupportedError(
                "backend 'hopper' needs a GPU of compute capability 9.0 (H100, H200) and this "
                f"machine has {found}: choose another backend"
            )

    def multiple(self, a: str, b: str) -> int:
        """16 for pairs on FP8 and INT8 tensor cores, whose rows are loaded 16 bytes at a time."""
        return _MULTIPLE if any(a in kind and b in kind for kind in _NATIVE) else 1

    def cast(
        self,
        x: torch.Tensor,
        wanted: Sequence[CastRequest],
        used: tuple[Operand, torch.Tensor | None] | None = None,
    ) -> list[Operand]:
        """Cast with kernels; see :meth:`megafp4.backends.base.Backend.cast`."""
        return self._caster.cast(x, wanted, used)

    def cast_apart(
        self, x: torch.Tensor, request: CastRequest
    ) -> tuple[Operand, torch.Tensor | None] | None:
        """Clamp and cast; see :meth:`megafp4.backends.base.Splitting.cast_apart`."""
        return self._caster.apart(x, request)

    def adopt(self, stored: QTensor) -> Operand:
        """Bring the integer codes of a grid weight to int8; nothing else is stored as codes."""
        return adopt(stored)

    def raised_blocks(self) -> Mapping[int, int]:
        """Blocks of MXFP4 whose exponent was raised because their tensor spans too many octaves.

        Waits for the GPU. By stream; see :meth:`megafp4.backends.base.Backend.raised_blocks`.
        """
        return self._caster.windows.raised_blocks()

    def state_dict(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Windows of the MXFP4 operands: int32 [8] by stream."""
        return self._caster.windows.state_dict(device)

    def load_state_dict(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Continue with saved windows; see :meth:`megafp4.backends.base.Backend.load_state_dict`.

        Raises:
            CheckpointError: These are not windows; nothing is changed then.
        """
        self._caster.windows.load_state_dict(state, device)

    def pin_position(self, seed: int, step: int, first_token: int, device: torch.device) -> None:
        """Let all casts from now on count their positions from one that is written on the device.

        Meanwhile the first token of a :class:`~megafp4.precision.Position` counts from
        ``first_token``, and its step means nothing. A CUDA graph draws, when it is replayed, the
        random bits of the position that was pinned last. Every cast must have been made once, with
        a position pinned, before it is recorded.
        """
        self._caster.positions.pin(seed, step, first_token, device)

    def unpin_position(self) -> None:
        """Let casts again read the position that they are asked for."""
        self._caster.positions.unpin()

    def ran_as(self, a: Operand, b: Operand) -> str:
        """``hopper`` for FP8 and INT8 tensor cores, else ``hopper/bf16``."""
        return self.name if _kind(a) == _kind(b) != "bf16" else f"{self.name}/bf16"

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
        """Multiply; see :meth:`megafp4.backends.base.Backend.gemm`.

        A bias next to BF16 operands is rounded to BF16, as cuBLAS takes it.
        """
        kind = _kind(a) if _kind(a) == _kind(b) else "bf16"
        if kind == "bf16":
            return _bf16(a, b, axes, alpha, out_dtype, bias, slope, accumulate_into, overwrite)
        left, right = _prepared(a), _prepared(b)
        scales = {"scale_a": left.scale, "scale_b": right.scale, "alpha": alpha}
        if kind == "int8":
            from megafp4_kernels.gemm_int8 import gemm_int8

            if slope is None and accumulate_into is None:
                return gemm_int8(left.data, right.data, **scales, bias=bias, out_dtype=out_dtype)
            out = gemm_int8(left.data, right.data, **scales, out_dtype=torch.float32)
            return finish(out, out_dtype, bias, slope, accumulate_into, overwrite)
        from megafp4_kernels.gemm import gemm

        return gemm(
            left.data,
            right.data,
            **scales,
            bias=bias,
            out_dtype=out_dtype,
            out=accumulate_into,
            accumulate=accumulate_into is not None and not overwrite,
            slope=_fused(slope),
        )

    def measured_gemm(
        self,
        a: Operand,
        b: Operand,
        axes: tuple[int, int],
        alpha: float = 1.0,
        *,
        slope: Slope | None = None,
        accumulate_into: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply on FP8 tensor cores and measure; others do not measure.

        See :meth:`megafp4.backends.base.Measuring.measured_gemm`.
        """
        if not _kind(a) == _kind(b) == "fp8":
            out = self.gemm(a, b, axes, alpha, slope=slope, accumulate_into=accumulate_into)
            return out, None
        from megafp4_kernels.gemm import gemm
        from megafp4_kernels.gemm_arguments import squares_shape

        left, right = _prepared(a), _prepared(b)
        shape = squares_shape(left.data.shape[0], right.data.shape[0])
        squares = torch.empty(shape, dtype=torch.float64, device=left.data.device)
        out = gemm(
            left.data,
            right.data,
            scale_a=left.scale,
            scale_b=right.scale,
            alpha=alpha,
            out_dtype=torch.float32,
            out=accumulate_into,
            accumulate=accumulate_into is not None,
            slope=_fused(slope),
            squares=squares,
        )
        return out, squares


def device_capability() -> tuple[int, int] | None:
    """Compute capability of the current CUDA device; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def adopt(stored: QTensor) -> Operand:
    """Codes of integers, contracted along their scales' axis, as int8; others as they are."""
    along = stored.scaling == "tensor" or stored.scaling == "vector"
    if not isinstance(stored.format.element, Integer) or not along:
        return stored
    codes = line_major(stored.codes, stored.axis).to(torch.int8)
    spare = 8 - stored.format.bits
    signed = (codes << spare) >> spare if spare else codes
    return Prepared(signed.contiguous(), stored.scale_values().reshape(-1), stored.format.name)


def _kind(operand: Operand) -> str:
    """Tensor cores that the operand is made for: ``fp8``, ``int8`` or ``bf16``."""
    if isinstance(operand, PackedOperand):
        return "fp8" if operand.format.name == "mxfp4" else "bf16"
    if not isinstance(operand, Prepared):
        return "bf16"
    return "int8" if operand.data.dtype == torch.int8 else "fp8" if _is_fp8(operand) else "bf16"


def _is_fp8(operand: Prepared) -> bool:
    return operand.data.dtype in _FP8


def _fused(slope: Slope | None) -> Any:
    """The slope as the GEMM's epilogue takes it."""
    if slope is None:
        return None
    from megafp4_kernels.gemm_arguments import Slope as Fused

    scale = _prepared(slope.operand).scale
    return Fused(slope.weight.contiguous(), scale, slope.dge.k, slope.dge.cap)


def _prepared(operand: Operand) -> Prepared:
    if isinstance(operand, PackedOperand):
        from megafp4_kernels.mxfp4 import Packed, unpack

        folded = unpack(Packed(operand.codes, operand.scales))
        return Prepared(folded.data, folded.scale, operand.format.name)
    assert isinstance(operand, Prepared), "the kinds of both operands have been compared"
    return operand


def _bf16(
    a: Operand,
    b: Operand,
    axes: tuple[int, int],
    alpha: float,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
    slope: Slope | None,
    accumulate_into: torch.Tensor | None,
    overwrite: bool,
) -> torch.Tensor:
    """Multiply in BF16 with FP32 accumulation; scales and alpha on the FP32 result."""
    (left, scale_a), (right, scale_b) = _lines(a, axes[0]), _lines(b, axes[1])
    plain = scale_a is None and scale_b is None and alpha == 1.0
    if plain and out_dtype == torch.bfloat16 and slope is None and accumulate_into is None:
        if bias is None:
            return torch.mm(left, right.t())
        return torch.addmm(bias.to(torch.bfloat16), left, right.t())
    out = matmul(left, right)
    if not plain:
        out *= alpha
        if scale_a is not None:
            out *= scale_a.reshape(-1, 1)
        if scale_b is not None:
            out *= scale_b.reshape(1, -1)
    return finish(out, out_dtype, bias, slope, accumulate_into, overwrite)


def _lines(operand: Operand, axis: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """BF16 lines x K, and the FP32 scale of the lines that is left."""
    if isinstance(operand, PackedOperand):
        if _kind(operand) == "bf16":
            return decode(operand.unpacked(), operand.axis)
        return _lines(_prepared(operand), axis)
    if isinstance(operand, Prepared):
        return operand.data.to(torch.bfloat16), operand.scale
    return decode(operand, axis)
