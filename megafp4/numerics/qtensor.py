"""A quantized tensor: codes, scales and what they mean.

A plain dataclass, not a tensor subclass: a subclass would need a handler for every operator, and
the only operations on a quantized tensor are decode, pack and GEMM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megafp4.errors import ConfigError
from megafp4.numerics.formats import E4M3, Format, Scaling, get_format


@dataclass(frozen=True)
class QTensor:
    """Codes with their scales; the value of an element is table[code] * scale * tensor_scale."""

    codes: torch.Tensor
    """uint8, one code per element."""
    scales: torch.Tensor
    """As the format stores them: uint8 (E8M0 or E4M3 bytes) or FP32; one per block, tile, line or
    tensor, the dims of ``codes`` divided accordingly."""
    tensor_scale: torch.Tensor | None
    """FP32 0-dim second scale (nvfp4), else None."""
    format: Format
    axis: int
    """Contraction axis, non-negative."""
    scaling: Scaling

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that was quantized."""
        return self.codes.shape

    def scale_values(self) -> torch.Tensor:
        """Scales as FP32 (tensor scale included), in the shape of ``scales``."""
        return decode_scales(self.scales, self.format, self.tensor_scale)

    def values(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Code values without scales; exact in FP32 and BF16."""
        return lookup(self.format.table.to(device=self.codes.device, dtype=dtype), self.codes)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Code value times scale, computed in FP32 and cast to ``dtype``.

        A prescale is not undone: the GEMM's alpha does that.
        """
        codes = as_rows(self.codes, self.format, self.axis, self.scaling)
        scales = scales_as_rows(self.scale_values(), self.format, self.axis, self.scaling)
        table = self.format.table.to(self.codes.device)
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for part in cache_sized(codes):
            out[part] = lookup(table, codes[part]).mul_(scales[part if len(scales) > 1 else ...])
        return out.view(self.shape)

    def pack(self) -> torch.Tensor:
        """Codes packed along the contraction axis.

        4-bit and 3-bit codes lie two a byte, even index in the low nibble; ternary codes four a
        byte, lowest bits first; 8-bit codes stay as they are.

        Returns:
            uint8, the axis divided by the number of codes a byte.

        Raises:
            ConfigError: The axis is not a multiple of the codes a byte.
        """
        per_byte = codes_per_byte(self.format)
        length = self.shape[self.axis]
        if length % per_byte:
            raise ConfigError(
                f"cannot pack {length} codes of {self.format.name!r} along axis {self.axis}: "
                f"the length must be a multiple of {per_byte}"
            )
        if per_byte == 1:
            return self.codes
        width = 8 // per_byte
        grouped = self.codes.unflatten(self.axis, (length // per_byte, per_byte))
        packed = grouped.select(self.axis + 1, 0).clone()
        for i in range(1, per_byte):
            packed |= grouped.select(self.axis + 1, i) << (i * width)
        return packed


def codes_per_byte(fmt: str | Format) -> int:
    """How many codes :meth:`QTensor.pack` puts in a byte: 1, 2 or 4."""
    bits = get_format(fmt).bits
    return 1 if bits == 8 else 4 if bits == 2 else 2


def unpack(packed: torch.Tensor, fmt: str | Format, axis: int = -1) -> torch.Tensor:
    """Undo :meth:`QTensor.pack`.

    Args:
        packed: uint8.
        fmt: Format of the codes.
        axis: Axis along which they were packed.

    Returns:
        uint8, one code per element.
    """
    fmt = get_format(fmt)
    per_byte = codes_per_byte(fmt)
    if per_byte == 1:
        return packed
    width = 8 // per_byte
    axis %= packed.dim()
    parts = [packed >> (i * width) & (1 << fmt.bits) - 1 for i in range(per_byte)]
    return torch.stack(parts, dim=axis + 1).flatten(axis, axis + 1)


def decode_scales(
    scales: torch.Tensor, fmt: Format, tensor_scale: torch.Tensor | None
) -> torch.Tensor:
    """Stored scales as FP32."""
    if fmt.scale == "e8m0":
        exponent = scales.int()
        # 2^(byte - 127); byte 0 is the subnormal 2^-127, byte 255 is NaN.
        bits = torch.where(exponent == 0, 1 << 22, exponent << 23)
        return torch.where(exponent == 255, torch.nan, bits.view(torch.float32))
    if fmt.scale == "e4m3":
        assert tensor_scale is not None, "E4M3 block scales come with a tensor scale"
        table = torch.cat([E4M3.magnitudes(), -E4M3.magnitudes()]).to(scales.device)
        return table[scales.int()] * tensor_scale
    return scales


def lookup(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Table entry of every code."""
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def as_rows(x: torch.Tensor, fmt: Format, axis: int, scaling: Scaling) -> torch.Tensor:
    """View x as rows so that :func:`scales_as_rows` of its scales broadcasts against it.

    Rows are independent of each other, so the view can be worked through piece by piece.
    """
    outer, length, inner = x.shape[:axis].numel(), x.shape[axis], x.shape[axis + 1 :].numel()
    if scaling == "block":
        return x.reshape(outer * (length // fmt.block), fmt.block, inner)
    if scaling == "tile":
        rows, cols = x.shape[:-1].numel(), x.shape[-1]
        return x.reshape(rows // fmt.block, fmt.block, cols // fmt.block, fmt.block)
    if scaling == "tensor":
        return x.reshape(x.shape[0], 1, x.shape[1:].numel())
    return x.reshape(length, 1, inner) if outer == 1 else x.reshape(outer, length, inner)


def scales_as_rows(scales: torch.Tensor, fmt: Format, axis: int, scaling: Scaling) -> torch.Tensor:
    """View scales against :func:`as_rows`: as many rows, or a single one for all."""
    outer, inner = scales.shape[:axis].numel(), scales.shape[axis + 1 :].numel()
    if scaling == "block":
        return scales.reshape(outer * scales.shape[axis], 1, inner)
    if scaling == "tile":
        return scales.reshape(scales.shape[:-1].numel(), 1, scales.shape[-1], 1)
    return scales.reshape(outer, 1, inner)


# Elements worked on at once on a CPU, so that a dozen temporaries stay in its L2 cache.
_CHUNK = 1 << 14


def cache_sized(rows: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows that stay in cache on a CPU; all rows at once elsewhere."""
    count = len(rows)
    per_row = max(1, rows[:1].numel())
    step = max(1, _CHUNK // per_row if rows.device.type == "cpu" else count)
    for start in range(0, count, step):
        yield slice(start, start + step)


def scales_shape(shape: torch.Size, fmt: Format, axis: int, scaling: Scaling) -> torch.Size:
    """Shape of the scales of a tensor of ``shape``."""
    dims = list(shape)
    if scaling == "block":
        dims[axis] = math.ceil(dims[axis] / fmt.block)
    elif scaling == "tile":
        dims[-2:] = (math.ceil(d / fmt.block) for d in dims[-2:])
    elif scaling == "vector":
        dims[axis] = 1
    else:
        dims = [1] * len(dims)
    return torch.Size(dims)
