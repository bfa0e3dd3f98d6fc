"""Quantize: the bit-exact specification that every kernel is held to.

Three separate steps, so that tensor parallelism can reduce the first over ranks before the third:

    amax     range statistic of every block, tile, line or tensor
    scales   from that statistic, as the format stores them
    encode   x / scale, rounded to codes

Rules that others get wrong, decided here:

* E8M0 scales come from the bits of the FP32 amax: byte = clamp(biased exponent - 2, 0, 254), 255 if
  not finite. Never log2 (wrong just below powers of two), never a cast (rounds half up).
* ``prescale`` multiplies after the scale is taken. With 3/4, MXFP4 stays below 6, nothing clips and
  stochastic rounding is unbiased [2502.20586, algorithm 2].
* FP32 scales are applied as a product with their FP32 reciprocal.
* The sign of zero is kept: -0.1 and -0.0 become code 8 of E2M1.
* NaN or Inf anywhere makes the scale of its block NaN, so the block decodes to NaN.
"""

from __future__ import annotations

from typing import Literal

import torch

from megafp4.errors import ConfigError, unknown_name
from megafp4.numerics.formats import E4M3, Format, Integer, Minifloat, Scaling, get_format
from megafp4.numerics.philox import Key, KeyLike, dither
from megafp4.numerics.qtensor import (
    QTensor,
    as_rows,
    cache_sized,
    decode_scales,
    scales_as_rows,
    scales_shape,
)
from megafp4.numerics.rounding import Rounding, check_rounding, round_steps
from megafp4.numerics.shards import Origin, Slice

Statistic = Literal["absmax", "absmean"]

# Smallest FP32 scale: its reciprocal is still finite.
_MIN_SCALE = 2.0**-126
# Smallest FP32 scale of a tensor whose blocks multiply it by down to 2^-9, the least E4M3 number:
# their product stays normal, so its reciprocal is finite and no device flushes it to zero.
_MIN_TENSOR_SCALE = 2.0**-117
# Least mean magnitude of a weight in BitNet's and DQT's code. An absmax has no such floor: the
# gradients of a loss averaged over many tokens are smaller.
_MIN_ABSMEAN = 1e-5


def quantize(
    x: torch.Tensor,
    fmt: str | Format,
    axis: int = -1,
    rounding: Rounding = "nearest-even",
    key: KeyLike | None = None,
    *,
    scaling: Scaling | None = None,
    statistic: Statistic = "absmax",
    prescale: float = 1.0,
    dither_bits: int = 8,
    origin: Origin = (0, 0),
    part: Slice | None = None,
) -> QTensor:
    """Quantize a tensor.

    Args:
        x: Floating-point tensor with at least one dim (FP32 or BF16; others are cast to FP32).
        fmt: Format or its name, see :func:`megafp4.formats`.
        axis: Contraction axis: blocks and packed codes lie along it.
        rounding: ``nearest-even``, ``nearest-away``, ``nearest-up`` or ``stochastic``.
        key: (seed, step, layer, gemm, operand) of the random draw; only for ``stochastic``.
        scaling: Which elements share a scale; None is the format's default.
        statistic: ``absmax`` maps the largest magnitude to the largest code; ``absmean`` the mean
            magnitude (BitNet b1.58, DQT), clipping what lies beyond.
        prescale: Factor applied after the scale is taken; 0.75 keeps MXFP4 from clipping.
        dither_bits: Random bits per element: 8, 16 or 32.
        origin: Global (line, k) of the first element, or runs, so that a slice of a tensor draws
            the same random bits as the whole.
        part: Who holds the rest of a matrix of which x is a slice: its codes are then those of the
            whole. All of them must call together.

    Returns:
        Codes and scales.

    Raises:
        ConfigError: Unknown format, scaling or rounding; contraction length not divisible by the
            block; stochastic rounding without a key; x not floating-point.
    """
    spec = get_format(fmt)
    scaling = spec.check_scaling(scaling)
    axis = _check(x, spec, axis, scaling)
    stat = amax(x, spec, axis, scaling, statistic, part)
    whole = None
    if part is not None and spec.scale == "e4m3" and stat.numel():
        whole = part.largest(stat.amax())
    scales, tensor_scale = scales_from_amax(stat, spec, whole, statistic)
    return encode(
        x,
        spec,
        scales,
        axis,
        rounding,
        key,
        scaling=scaling,
        tensor_scale=tensor_scale,
        prescale=prescale,
        dither_bits=dither_bits,
        origin=origin,
    )


def amax(
    x: torch.Tensor,
    fmt: str | Format,
    axis: int = -1,
    scaling: Scaling | None = None,
    statistic: Statistic = "absmax",
    part: Slice | None = None,
) -> torch.Tensor:
    """Range statistic of every group of elements that shares a scale.

    Args:
        x: Floating-point tensor.
        fmt: Format or its name.
        axis: Contraction axis.
        scaling: Which elements share a scale.
        statistic: ``absmax`` or ``absmean``.
        part: Who holds the rest, if x is a slice: groups that it shares with them are reduced.

    Returns:
        FP32, x's dims with the shared ones divided (block, tile) or 1 (vector, tensor). NaN or
        Inf where the group holds one. Zero for empty groups.
    """
    spec = get_format(fmt)
    scaling = spec.check_scaling(scaling)
    axis = _check(x, spec, axis, scaling)
    if statistic not in ("absmax", "absmean"):
        raise unknown_name("statistic", statistic, ("absmax", "absmean"))
    if statistic == "absmean" and not isinstance(spec.element, Integer):
        raise ConfigError(
            f"statistic 'absmean' is for integer formats, not {spec.name!r}: use 'absmax'"
        )
    shape = scales_shape(x.shape, spec, axis, scaling)
    if x.numel() == 0:
        return x.new_zeros(shape, dtype=torch.float32)
    rows = as_rows(x.detach(), spec, axis, scaling)
    dims = {
        "block": (1,),
        "tile": (1, 3),
        "vector": (0,) if x.shape[:axis].numel() == 1 else (1,),
        "tensor": (0, 1, 2),
    }[scaling]
    along: tuple[int, ...] = {"tensor": (0, 1), "vector": (axis,)}.get(scaling, ())
    if statistic == "absmean":
        # FP64 sums make the FP32 mean independent of the order of summation.
        mean = rows.abs().double().mean(dims).view(shape)
        for peers in [] if part is None else part.peers_along(along):  # of equal slices
            mean = peers.sum(mean) / peers.size
        return mean.float()
    largest = torch.maximum(rows.amax(dims), -rows.amin(dims))
    largest = largest.abs().float().view(shape)  # abs: the largest of zeros may be -0.0
    return largest if part is None else part.largest(largest, along)


def scales_from_amax(
    stat: torch.Tensor,
    fmt: str | Format,
    tensor_amax: torch.Tensor | None = None,
    statistic: Statistic = "absmax",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales as the format stores them.

    Args:
        stat: FP32 result of :func:`amax`, possibly reduced over ranks.
        fmt: Format or its name.
        tensor_amax: FP32 0-dim amax of the whole tensor, for nvfp4; None takes it from ``stat``.
        statistic: What ``stat`` is. A mean magnitude counts as at least 1e-5, as in BitNet's code.

    Returns:
        (scales, tensor_scale): uint8 bytes (E8M0, E4M3) or FP32 of ``stat``'s shape; the FP32
        0-dim tensor scale of nvfp4, else None.
    """
    spec = get_format(fmt)
    if spec.scale == "e8m0":
        biased = stat.view(torch.int32) >> 23 & 0xFF
        byte = (biased - 2).clamp(0, 254)
        return torch.where(biased == 255, 255, byte).to(torch.uint8), None
    if spec.scale == "e4m3":
        return _nvfp4_scales(stat, spec, tensor_amax)
    if statistic == "absmean":
        stat = stat.clamp(min=_MIN_ABSMEAN)
    scale = _divide(stat, spec.max_value).clamp(min=_MIN_SCALE)
    return torch.where(scale.isfinite(), scale, torch.nan), None


def _divide(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """Correctly rounded quotient on every device.

    PyTorch's CUDA kernel multiplies by the rounded reciprocal of a divisor that is a number.
    """
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def _nvfp4_scales(
    stat: torch.Tensor, spec: Format, tensor_amax: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two-level scales: the largest block scale becomes E4M3's largest value [2509.25149, B.2].

    tensor_scale = amax / (448 * 6); block scale = E4M3((block amax / 6) / tensor_scale), all FP32.
    """
    if tensor_amax is None:
        tensor_amax = stat.amax() if stat.numel() else stat.new_zeros(())
    tensor_scale = _divide(tensor_amax, E4M3.max_value * spec.max_value)
    tensor_scale = tensor_scale.clamp(min=_MIN_TENSOR_SCALE)
    tensor_scale = torch.where(tensor_scale.isfinite(), tensor_scale, torch.nan)
    ratio = _divide(stat, spec.max_value) / tensor_scale
    finite = ratio.isfinite()
    codes = _encode_minifloat(torch.where(finite, ratio, 0.0), E4M3, "nearest-even", None)
    return torch.where(finite, codes, 0x7F).to(torch.uint8), tensor_scale


def encode(
    x: torch.Tensor,
    fmt: str | Format,
    scales: torch.Tensor,
    axis: int = -1,
    rounding: Rounding = "nearest-even",
    key: KeyLike | None = None,
    *,
    scaling: Scaling | None = None,
    tensor_scale: torch.Tensor | None = None,
    prescale: float = 1.0,
    dither_bits: int = 8,
    origin: Origin = (0, 0),
) -> QTensor:
    """Round x to codes at given scales; beyond the largest code it saturates.

    Codes hold no NaN: it survives through the NaN scale that its own :func:`amax` gives. Whoever
    reduces an amax over ranks must therefore propagate NaN.

    Args:
        x: Floating-point tensor.
        fmt: Format or its name.
        scales: As returned by :func:`scales_from_amax`.
        axis: Contraction axis.
        rounding: Rounding mode.
        key: Random key, for stochastic rounding.
        scaling: Which elements share a scale.
        tensor_scale: Second scale of nvfp4.
        prescale: Factor applied after the scale.
        dither_bits: Random bits per element.
        origin: Global (line, k) of the first element.

    Returns:
        Codes with the scales that were given.

    Raises:
        ConfigError: As :func:`quantize`, or scales of another shape.
    """
    spec = get_format(fmt)
    scaling = spec.check_scaling(scaling)
    axis = _check(x, spec, axis, scaling)
    check_rounding(rounding)
    expected = scales_shape(x.shape, spec, axis, scaling)
    if scales.shape != expected:
        raise ConfigError(
            f"scales have shape {tuple(scales.shape)}, but {spec.name} with {scaling} scaling of "
            f"a tensor {tuple(x.shape)} along axis {axis} needs {tuple(expected)}"
        )
    noise = None
    if rounding == "stochastic":
        if key is None:
            raise ConfigError(
                "stochastic rounding needs key=(seed, step, layer, gemm, operand): "
                "give one, or choose a nearest rounding"
            )
        if len(key) != len(Key._fields):
            raise ConfigError(
                f"random key has {len(key)} fields: give (seed, step, layer, gemm, operand)"
            )
        outer, inner = x.shape[:axis].numel(), x.shape[axis + 1 :].numel()
        noise = dither(Key(*key), outer, x.shape[axis], inner, dither_bits, origin, x.device)
        noise = noise.reshape(x.shape).contiguous()
    reciprocal = _reciprocal(decode_scales(scales, spec, tensor_scale), spec)
    factors = scales_as_rows(reciprocal, spec, axis, scaling)
    rows = as_rows(x.detach(), spec, axis, scaling)
    noise_rows = None if noise is None else as_rows(noise, spec, axis, scaling)
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=x.device)
    for part in cache_sized(rows):
        scaled = rows[part].float() * factors[part if len(factors) > 1 else ...]
        if prescale != 1.0:
            scaled.mul_(prescale)
        # Blocks with a NaN scale decode to NaN whatever their codes; zero is the canonical one.
        scaled.nan_to_num_(nan=0.0)
        dithers = None if noise_rows is None else noise_rows[part]
        codes[part] = _encode_values(scaled, spec, rounding, dithers)
    return QTensor(codes.view(x.shape), scales, tensor_scale, spec, axis, scaling)


def _encode_values(
    scaled: torch.Tensor, spec: Format, rounding: Rounding, noise: torch.Tensor | None
) -> torch.Tensor:
    """FP32 values in units of the scale -> int32 codes."""
    if isinstance(spec.element, Minifloat):
        return _encode_minifloat(scaled, spec.element, rounding, noise)
    return _encode_integer(scaled, spec.element, rounding, noise, spec.bits)


def _reciprocal(scale: torch.Tensor, spec: Format) -> torch.Tensor:
    """FP32 reciprocal; exact for E8M0, 0 for an E4M3 block scale that underflowed to zero."""
    if spec.scale == "e4m3":
        return torch.where(scale == 0, 0.0, 1.0 / scale)
    return 1.0 / scale


def _encode_minifloat(
    scaled: torch.Tensor, element: Minifloat, rounding: Rounding, noise: torch.Tensor | None
) -> torch.Tensor:
    """FP32 values in units of the scale -> int32 codes.

    With e the exponent of the value (at least the smallest normal's), the codes of that binade are
    whole numbers of steps 2^(e - mantissa_bits), and codes of successive binades follow each
    other: code = steps + (e - min_exponent) * 2^mantissa_bits.
    """
    magnitude = scaled.abs()
    exponent = (magnitude.view(torch.int32) >> 23).sub_(127).clamp_(min=element.min_exponent)
    code = (exponent - element.min_exponent).mul_(1 << element.mantissa_bits)
    # 2^(mantissa_bits - e) by its bits, so that dividing by the step is exact.
    per_step = exponent.neg_().add_(element.mantissa_bits + 127).mul_(1 << 23).view(torch.float32)
    code.add_(round_steps(magnitude.mul_(per_step), rounding, scaled, noise).int())
    code.clamp_(max=element.max_code)
    # The arithmetic shift leaves -1 for a set sign bit, that of -0.0 included.
    sign = scaled.view(torch.int32) >> 31
    return code.sub_(sign, alpha=1 << element.exponent_bits + element.mantissa_bits)


def _encode_integer(
    scaled: torch.Tensor,
    element: Integer,
    rounding: Rounding,
    noise: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """FP32 values in units of the scale -> two's complement codes of ``bits`` bits."""
    # Beyond the largest integer everything saturates; bounding first keeps int32 safe.
    magnitude = scaled.abs().clamp_(max=-element.low + 1.0)
    whole = round_steps(magnitude, rounding, scaled, noise)
    signed = torch.copysign(whole, scaled).clamp_(element.low, element.high)
    return signed.int() & (1 << bits) - 1


def _check(x: torch.Tensor, spec: Format, axis: int, scaling: Scaling) -> int:
    """Validate what every step relies on; return the axis as a non-negative number."""
    if not x.is_floating_point():
        raise ConfigError(f"cannot quantize a {x.dtype} tensor: give a floating-point one")
    if x.dim() == 0 or not -x.dim() <= axis < x.dim():
        raise ConfigError(f"axis {axis} does not exist in a tensor of {x.dim()} dims")
    axis %= x.dim()
    if scaling == "tile" and x.dim() < 2:
        raise ConfigError("tile scaling needs a tensor of at least 2 dims")
    dims = (axis,) if scaling == "block" else (x.dim() - 2, x.dim() - 1)
    if scaling in ("block", "tile"):
        for dim in dims:
            if x.shape[dim] % spec.block:
                raise ConfigError(
                    f"dim {dim} of a tensor {tuple(x.shape)} is not divisible by the block of "
                    f"{spec.name}, {spec.block}: pad it or choose another format"
                )
    return axis
