"""FP4 tensor cores of compute capability 10.x: packed codes and swizzled scales as they are.

Untried on such a GPU: what a machine without one can show is that the calls are accepted, that
codes and scales lie where the hardware reads them, and that the Triton kernel compiles to
``tcgen05.mma ... .block_scale``.

* NVFP4 goes through ``torch.nn.functional.scaled_mm``, that is cuBLAS; alpha rides on a tensor
  scale, the result is rounded once.
* MXFP4 goes through the Triton kernel. ``scaled_mm`` has it only in builds of PyTorch with MSLK,
  rounds its result to BF16 before alpha can multiply it, and drops the bias; it is an option for
  those who would compare.
* Every other pair of formats is decoded to BF16, and the ledger says so (``blackwell/bf16``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from megafp4.backends.base import (
    Operand,
    PackedOperand,
    Slope,
    Stateless,
    cast_all,
    finish,
    line_major,
    operand_format,
)
from megafp4.backends.bf16 import BF16Backend
from megafp4.errors import ConfigError, UnsupportedError, unknown_name
from megafp4.numerics import QTensor
from megafp4.recipes.cast import CastRequest

_NATIVE = ("mxfp4", "nvfp4")
_MXFP4_KERNELS = ("triton", "scaled_mm")


@dataclass(frozen=True)
class BlockScaled:
    """An MXFP4 or NVFP4 matrix as the tensor cores read it, lines x K, K contracted."""

    codes: torch.Tensor
    """uint8 [lines, K / 2], even index in the low nibble; lines padded to 16, K to 32."""
    scales: torch.Tensor
    """E8M0 or E4M3 bytes of the blocks, uint8, flat, tiles of 128 lines by 4 blocks."""
    tensor_scale: torch.Tensor | None
    """FP32 [1] of NVFP4."""
    format: Literal["mxfp4", "nvfp4"]
    lines: int
    """Without padding."""


class BlackwellBackend(Stateless):
    """MXFP4 and NVFP4 pairs on FP4 tensor cores, the rest in BF16.

    Args:
        mxfp4: ``triton`` multiplies MXFP4 with this project's kernel, ``scaled_mm`` with PyTorch's,
            which rounds the result to BF16 once more.

    Raises:
        ConfigError: ``mxfp4`` is neither.
    """

    name = "blackwell"
    accumulates = False

    def __init__(self, mxfp4: Literal["triton", "scaled_mm"] = "triton") -> None:
        if mxfp4 not in _MXFP4_KERNELS:
            raise unknown_name("MXFP4 kernel", mxfp4, _MXFP4_KERNELS)
        self.mxfp4 = mxfp4
        self._bf16 = BF16Backend()

    def check(self, a: str, b: str) -> None:
        """Refuse FP32 operands and machines without such a GPU."""
        if "fp32" in (a, b):
            raise UnsupportedError(
                f"backend 'blackwell' cannot multiply {a} x {b}: choose backend 'reference' or BF16"
            )
        capability = device_capability()
        if capability is None or capability[0] != 10:
            found = "no CUDA GPU" if capability is None else "one of {}.{}".format(*capability)
            raise UnsupportedError(
                f"backend 'blackwell' needs a GPU of compute capability 10.x and this machine has "
                f"{found}: choose another backend"
            )

    def cast(
        self,
        x: torch.Tensor,
        wanted: Sequence[CastRequest],
        used: tuple[Operand, torch.Tensor | None] | None = None,
    ) -> list[Operand]:
        """Cast by the specification, on the GPU: right, and not fast."""
        return cast_all(x, wanted, used)

    def adopt(self, stored: QTensor) -> Operand:
        """Codes and scales are an operand as they are."""
        return stored

    def ran_as(self, a: Operand | BlockScaled, b: Operand | BlockScaled) -> str:
        """Name for the ledger: ``blackwell``, or ``blackwell/bf16`` for a pair without FP4."""
        native = _format(a) == _format(b) and _format(a) in _NATIVE
        return self.name if native else f"{self.name}/bf16"

    def gemm(
        self,
        a: Operand | BlockScaled,
        b: Operand | BlockScaled,
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

        Args:
            a: An operand, or what :func:`pack` made of it.
            b: Likewise.
            axes: Contraction axes; those of packed operands have been chosen.
            alpha: Multiplies the FP32 accumulator.
            out_dtype: Type of the result.
            bias: [N], added in FP32.
            slope: Multiplies the result.
            accumulate_into: FP32 [M, N] that the product is added to, and which is returned.
            overwrite: Replace what ``accumulate_into`` holds.

        Returns:
            [M, N].

        Raises:
            UnsupportedError: As :meth:`check`.
            ConfigError: A packed operand is paired with another format.
        """
        a, b = _unpacked(a), _unpacked(b)
        if slope is None and self.ran_as(a, b) == self.name:
            left, right = (
                operand if isinstance(operand, BlockScaled) else pack(operand, axis)
                for operand, axis in zip((a, b), axes, strict=True)
            )
            return self._native(left, right, alpha, out_dtype, bias, accumulate_into, overwrite)
        if isinstance(a, BlockScaled) or isinstance(b, BlockScaled):
            raise ConfigError(
                f"a packed operand was paired as {_format(a)} x {_format(b)}: pack both, in one "
                "format, or neither"
            )
        self.check(operand_format(a), operand_format(b))
        out = self._bf16.gemm(a, b, axes, alpha)
        return finish(out, out_dtype, bias, slope, accumulate_into, overwrite)

    def _native(
        self,
        a: BlockScaled,
        b: BlockScaled,
        alpha: float,
        out_dtype: torch.dtype,
        bias: torch.Tensor | None,
        accumulate_into: torch.Tensor | None,
        overwrite: bool,
    ) -> torch.Tensor:
        if a.codes.shape[1] == 0:
            out = torch.zeros(a.lines, b.lines, device=a.codes.device)
            return finish(out, out_dtype, bias, None, accumulate_into, overwrite)
        plain = bias is None and accumulate_into is None
        wanted = out_dtype if plain else torch.float32
        if a.format == "nvfp4" or self.mxfp4 == "scaled_mm":
            out = scaled_mm(a, b, alpha, wanted)
        else:
            out = _triton(a, b, alpha, wanted)
        out = out[: a.lines, : b.lines]
        return finish(out, out_dtype, bias, None, accumulate_into, overwrite)


def device_capability() -> tuple[int, int] | None:
    """Compute capability of the current CUDA device; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def pack(q: Operand, axis: int) -> BlockScaled:
    """Bring a quantized matrix into the form of the tensor cores.

    Lines are padded to a multiple of 16 and K to one of 32, with zeros, as ``scaled_mm`` and TMA
    ask for.

    Args:
        q: MXFP4, or NVFP4 in blocks or tiles, of a matrix.
        axis: Contraction axis of the GEMM. Blocks must lie along it; tiles serve both axes.

    Returns:
        lines x K, whichever the axis.

    Raises:
        UnsupportedError: Another format, or blocks along the other axis.
    """
    from megafp4_kernels.swizzle import swizzle

    if not isinstance(q, QTensor) or q.format.name not in _NATIVE:
        raise UnsupportedError(
            f"{_format(q)} has no FP4 tensor cores: give mxfp4 or nvfp4, or use backend 'bf16'"
        )
    if q.scaling != "tile" and q.axis != axis:
        raise UnsupportedError(
            f"blocks of {q.format.name!r} lie along axis {q.axis} and the GEMM contracts axis "
            f"{axis}: quantize along that one"
        )
    codes, scales = line_major(q.codes, axis), line_major(q.scales, axis)
    if q.scaling == "tile":
        scales = scales.repeat_interleave(q.format.block, 0)
    lines, depth = codes.shape
    more_lines, more_depth = -lines % 16, -depth % 32
    if more_lines or more_depth:
        codes = F.pad(codes, (0, more_depth, 0, more_lines))
        scales = F.pad(scales, (0, more_depth // q.format.block, 0, more_lines))
    tensor_scale = None if q.tensor_scale is None else q.tensor_scale.reshape(1)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).contiguous()  # transposed codes stay so
    kind: Literal["mxfp4", "nvfp4"] = "mxfp4" if q.format.name == "mxfp4" else "nvfp4"
    return BlockScaled(packed, swizzle(scales), tensor_scale, kind, lines)


def scaled_mm(a: BlockScaled, b: BlockScaled, alpha: float, out_dtype: torch.dtype) -> torch.Tensor:
    """Multiply with ``torch.nn.functional.scaled_mm``; fprop, dgrad and wgrad look the same here.

    Args:
        a: M lines.
        b: N lines, of the same format.
        alpha: Factor. MXFP4 applies it to a result that is BF16 already.
        out_dtype: BF16 or FP32.

    Returns:
        [M, N], padding included.
    """
    block, tensor = F.ScalingType.BlockWise1x32, F.ScalingType.TensorWise
    tiled, plain = F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE
    left = a.codes.view(torch.float4_e2m1fn_x2)
    right = b.codes.view(torch.float4_e2m1fn_x2).t()
    if a.tensor_scale is None or b.tensor_scale is None:
        scales = [o.scales.view(torch.float8_e8m0fnu) for o in (a, b)]
        out = F.scaled_mm(
            left,
            right,
            scales[0],
            block,
            scales[1],
            block,
            tiled,
            tiled,
            output_dtype=torch.bfloat16,
        )
        return (
            out if alpha == 1.0 and out_dtype == out.dtype else (out.float() * alpha).to(out_dtype)
        )
    scales = [o.scales.view(torch.float8_e4m3fn) for o in (a, b)]
    recipe = [F.ScalingType.BlockWise1x16, tensor]
    return F.scaled_mm(
        left,
        right,
        [scales[0], a.tensor_scale * alpha],
        recipe,
        [scales[1], b.tensor_scale],
        recipe,
        [tiled, plain],
        [tiled, plain],
        output_dtype=out_dtype,
    )


def _triton(a: BlockScaled, b: BlockScaled, alpha: float, out_dtype: torch.dtype) -> torch.Tensor:
    from megafp4_kernels.gemm_blackwell import gemm_mxfp4

    return gemm_mxfp4(
        a.codes, b.codes, scales_a=a.scales, scales_b=b.scales, alpha=alpha, out_dtype=out_dtype
    )


def _unpacked(operand: Operand | BlockScaled) -> Operand | BlockScaled:
    return operand.unpacked() if isinstance(operand, PackedOperand) else operand


def _format(operand: Operand | BlockScaled) -> str:
    return operand.format if isinstance(operand, BlockScaled) else operand_format(operand)
