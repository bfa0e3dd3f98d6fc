"""The rows of ``bench.py quantize``: what runs, and what the specification says it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.timing import Work
from megafp4.numerics import (
    Key,
    QTensor,
    clamp_outliers,
    encode,
    fold_outliers,
    hadamard,
    hadamard_signs,
    quantize,
)
from megafp4.numerics.formats import E4M3
from megafp4_kernels import amax, casts, mxfp4, nvfp4, outliers, recast, tails

_SEED, _STEP = 11, 3
_ALPHA = 0.99
_RHT_LIMIT = 1e-5
"""Share of codes that may differ: the tensor core sums a Hadamard chunk in another order."""
_E4M3_LIMIT = 5e-4
"""The same where the scale multiplies the sums instead of each value."""
_PACKED = 17 / 32
"""Bytes of an MXFP4 element: a code, and its share of the block's scale."""


@dataclass(frozen=True)
class Row:
    """Something to time."""

    name: str
    family: str
    work: Work
    check: Callable[[], float]
    """Share of codes and scales that are not the specification's."""
    limit: float
    read: float
    """Bytes an element that must be read."""
    written: float
    """Bytes an element that must be written."""
    operations: float
    """Operations an element that the specification names."""


def mxfp4_rows(x: Tensor, x32: Tensor) -> Iterator[Row]:
    """Rows of the MXFP4 quantizer.

    Args:
        x: BF16 [tokens, width].
        x32: FP32 [tokens, width].
    """
    position = _position(x)
    windows = [torch.zeros(mxfp4.WINDOW, dtype=torch.int32, device=x.device) for _ in range(2)]
    scale = amax.scale(x, "fp8-e4m3", None)

    def plan(axis: int, g: int, output: str = "folded", unbiased: bool = True) -> mxfp4.Plan:
        key = _key(axis)
        return mxfp4.Plan(
            hadamard=g,
            rounding="stochastic" if unbiased else "nearest-away",
            prescale=0.75 if unbiased else 1.0,
            stream=key.stream,
            sign_stream=key._replace(operand="signs").stream,
            output=output,
            window=windows[axis] if output == "folded" else None,
        )

    def row(name: str, source: Tensor, g: int, axes: str, unbiased: bool = True) -> Row:
        plans = [plan(axis, g, "folded", unbiased) if word in axes else None
                 for axis, word in ((1, "row"), (0, "col"))]  # fmt: skip
        outputs = len(axes.split("+"))

        def work() -> object:
            return mxfp4.quantize(source, position, *plans)

        return Row(
            f"{name}, {axes}",
            "MXFP4",
            work,
            lambda: _mismatches(work(), source, g, unbiased),
            _RHT_LIMIT if g else 0.0,
            source.element_size(),
            outputs,
            outputs * _operations(g),
        )

    for axes in ("row", "col", "row + col"):
        yield row("mxfp4, SR, H64", x, 64, axes)
    yield row("mxfp4, SR, H64, FP32 input", x32, 64, "row + col")
    yield row("mxfp4, SR", x, 0, "row + col")
    yield row("mxfp4, nearest", x, 0, "row + col", unbiased=False)

    def packed() -> tuple[object, mxfp4.Packed]:
        return mxfp4.quantize(x, position, None, plan(0, 64, "packed"))

    yield Row(
        "mxfp4, SR, H64, col, packed", "MXFP4", packed, lambda: _packed(packed()[1], x),
        _RHT_LIMIT, 2, _PACKED, _operations(64),
    )  # fmt: skip
    codes = packed()[1]

    def unpack() -> mxfp4.Folded:
        return mxfp4.unpack(codes)

    yield Row(
        "mxfp4, unpack", "MXFP4", unpack, lambda: _unpacked(unpack(), x), _RHT_LIMIT, _PACKED, 1, 1
    )

    def fused() -> object:
        return mxfp4.quantize(x, position, mxfp4.E4M3Plan(scale), plan(0, 64), col_from_e4m3=scale)

    yield Row(
        "fp8 row + mxfp4 col", "MXFP4", fused, lambda: _from_e4m3(fused(), x, scale),
        _E4M3_LIMIT, 2, 2, 2 + _operations(64),
    )  # fmt: skip


def other_rows(x: Tensor, x32: Tensor) -> Iterator[Row]:
    """Rows of the 8-bit casts, of NVFP4, of outlier clamping and of range statistics.

    Args:
        x: BF16 [tokens, width].
        x32: FP32 [tokens, width].
    """
    yield from _casts(x, x32)
    yield from _nvfp4_rows(x)
    yield from _outlier_rows(x)
    for name, axis in (("tensor", None), ("rows", 1), ("cols", 0)):
        yield Row(
            f"amax and scale, {name}", "amax",
            lambda axis=axis: amax.scale(x, "fp8-e4m3", axis),
            lambda axis=axis: _scales(amax.scale(x, "fp8-e4m3", axis), x, axis),
            0.0, 2, 0, 1,
        )  # fmt: skip


def _casts(x: Tensor, x32: Tensor) -> Iterator[Row]:
    def tensor_wise(name: str, source: Tensor, fmt: str, col: bool, ranged: bool) -> Row:
        known = amax.scale(source, fmt, None)

        def work() -> tuple[Tensor | None, Tensor | None]:
            used = amax.scale(source, fmt, None) if ranged else known
            return casts.cast(source, fmt, used, row=True, col=col)

        def check() -> float:
            expected = encode(source, fmt, known.view(1, 1), scaling="tensor").codes
            row, turned = work()
            shares = [_differing(_bytes(row), expected)]
            if turned is not None:
                shares.append(_differing(_bytes(turned), expected.t()))
            return max(shares)

        size = source.element_size()
        return Row(name, "8 bits", work, check, 0.0, size, 1 + col, 2 + ranged)

    def per_row(name: str, fmt: str, rounding: str, packed: bool = False) -> Row:
        def work() -> Tensor | None:
            used = amax.scale(x, fmt, 1)
            options = {"rounding": rounding, "scale_axis": 0, "packed": packed}
            return casts.cast(x, fmt, used, **options)[0]

        def check() -> float:
            expected = quantize(x, fmt, 1, rounding, scaling="vector")
            if packed:
                return _differing(work(), expected.pack())
            if fmt == "fp4-vector":
                return _differing(work().float(), expected.values())
            return _differing(_bytes(work()), expected.codes)

        return Row(name, "8 bits", work, check, 0.0, 2, 0.5 if packed else 1, 3)

    yield tensor_wise("fp8-e4m3, row", x, "fp8-e4m3", False, False)
    yield tensor_wise("fp8-e4m3, row + col", x, "fp8-e4m3", True, False)
    yield tensor_wise("fp8-e5m2, row + col", x, "fp8-e5m2", True, False)
    yield tensor_wise("fp8-e4m3, FP32 input, row + col", x32, "fp8-e4m3", True, False)
    yield tensor_wise("fp8-e4m3 with amax, row", x, "fp8-e4m3", False, True)
    yield tensor_wise("fp8-e4m3 with amax, row + col", x, "fp8-e4m3", True, True)
    yield per_row("fp8-e4m3 with amax, a scale a row", "fp8-e4m3", "nearest-even")
    yield per_row("int8 with amax, a scale a row", "int8", "nearest-even")
    yield per_row("fp4-vector with amax, a scale a row", "fp4-vector", "nearest-up")
    yield per_row("fp4-vector with amax, packed", "fp4-vector", "nearest-up", packed=True)


def _nvfp4_rows(x: Tensor) -> Iterator[Row]:
    position = _position(x)

    def row(name: str, axis: int, g: int, tile: bool, drawn: bool, packed: bool) -> Row:
        key = _key(axis)

        def work() -> nvfp4.NVFP4:
            return nvfp4.quantize_nvfp4(
                x,
                axis,
                tile=tile,
                rounding="stochastic" if drawn else "nearest-even",
                position=position,
                stream=key.stream,
                hadamard=g,
                sign_stream=key._replace(operand="signs").stream,
                codes=packed,
                values=not packed,
            )

        def check() -> float:
            turned = hadamard(x, g, axis, hadamard_signs(key, g, x.device)) if g else x
            rounding = "stochastic" if drawn else "nearest-even"
            scaling = "tile" if tile else "block"
            draw = key if drawn else None
            return _nvfp4(work(), quantize(turned, "nvfp4", axis, rounding, draw, scaling=scaling))

        scales = 1 / 256 if tile else 1 / 16
        written = scales + (0.5 if packed else 2)
        return Row(name, "NVFP4", work, check, 0.0, 2, written, _operations(g))

    yield row("nvfp4, row, BF16 values", 1, 0, False, False, False)
    yield row("nvfp4, row, packed", 1, 0, False, False, True)
    yield row("nvfp4, tiles, row, BF16 values", 1, 0, True, False, False)
    yield row("nvfp4, SR, row, BF16 values", 1, 0, False, True, False)
    yield row("nvfp4, SR, H16, col, BF16 values", 0, 16, False, True, False)


def _outlier_rows(x: Tensor) -> Iterator[Row]:
    for residual, written in (("folded", 1), ("exact", 3)):

        def clamp(residual: str = residual) -> outliers.Clamped:
            return outliers.occ(x, _ALPHA, residual=residual)

        def check(residual: str = residual) -> float:
            found = outliers.occ(x, _ALPHA, residual=residual)
            operand, rest = _clamped(x, residual)
            shares = [
                _differing(found.data.float(), operand.values()),
                _differing(found.scale, operand.scales[:, 0]),
            ]
            if found.residual is not None:
                shares.append(_differing(found.residual, rest.bfloat16()))
            return max(shares)

        yield Row(f"occ 0.99, {residual}, row", "outliers", clamp, check, 0.0, 2, written, 5)
    found = outliers.occ(x, _ALPHA, residual="folded")

    def work() -> tuple[Tensor | None, Tensor | None, Tensor]:
        return recast.recast(found.data, found.scale, peak=found.peak, col=True)

    def recast_check() -> float:
        value = _clamped(x, "folded")[0].dequantize()
        expected = quantize(value, "fp8-e4m3", 0)
        _, col, scale = work()
        return max(
            _differing(_bytes(col), expected.codes.t()), _differing(scale, expected.scales.view(1))
        )

    yield Row("recast to fp8-e4m3, col", "outliers", work, recast_check, 0.0, 1, 1, 3)
    yield _slice_row(x)


def _slice_row(x: Tensor) -> Row:
    """What each of two ranks does that hold the same features, all but the exchange."""
    few = tails.ranks(2 * x.shape[1], _ALPHA, "signed")

    def work() -> outliers.Clamped:
        picked = tails.tails(x, *few)
        limits = tails.limits(torch.cat([picked, picked], 1), *few)
        return outliers.occ(x, _ALPHA, limits=limits)

    def check() -> float:
        operand, _ = _clamped(torch.cat([x, x], 1), "exact")
        found = work()
        return max(
            _differing(found.data.float(), operand.values()[:, : x.shape[1]]),
            _differing(found.scale, operand.scales[:, 0]),
        )

    return Row("occ 0.99, exact, half of a row", "outliers", work, check, 0.0, 4, 3, 5)


def _position(x: Tensor) -> Tensor:
    return torch.tensor([_SEED, _STEP, 0, 0], dtype=torch.int64, device=x.device)


def _key(axis: int) -> Key:
    return Key(_SEED, _STEP, 0, "dgrad" if axis else "wgrad", "a")


def _operations(g: int) -> float:
    """Magnitude, scale, factor and rounding; of a transform a sign and log2(g) additions."""
    return 4 + (1 + math.log2(g) if g else 0)


def _bytes(codes: Tensor | None) -> Tensor:
    assert codes is not None
    return codes.view(torch.uint8)


def _differing(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    return float((found != expected).float().mean())


def _specified(x: Tensor, axis: int, g: int, unbiased: bool = True) -> QTensor:
    if g:
        x = hadamard(x, g, axis, hadamard_signs(_key(axis), g, x.device))
    if unbiased:
        return quantize(x, "mxfp4", axis, "stochastic", _key(axis), prescale=0.75)
    return quantize(x, "mxfp4", axis, "nearest-away")


def _mismatches(found: object, x: Tensor, g: int, unbiased: bool) -> float:
    """Share of values that differ from the specification's, the worse of the two outputs."""
    assert isinstance(found, tuple)
    shares = []
    for axis, folded in zip((1, 0), found, strict=True):
        if folded is None:
            continue
        expected = _specified(x, axis, g, unbiased).dequantize()
        value = folded.data.float() * folded.scale
        shares.append(_differing(value, expected if axis else expected.t()))
    return max(shares)


def _packed(found: mxfp4.Packed, x: Tensor) -> float:
    expected = _specified(x, 0, 64)
    codes = _differing(found.codes, expected.pack().t())
    return max(codes, _differing(found.scales, expected.scales.t()))


def _unpacked(found: mxfp4.Folded, x: Tensor) -> float:
    return _differing(found.data.float() * found.scale, _specified(x, 0, 64).dequantize().t())


def _from_e4m3(found: object, x: Tensor, scale: Tensor) -> float:
    assert isinstance(found, tuple)
    as_fp8 = encode(x, "fp8-e4m3", scale.view(1, 1), scaling="tensor")
    expected = _specified(as_fp8.dequantize(), 0, 64).dequantize().t()
    codes = _differing(_bytes(found[0].data), as_fp8.codes)
    return max(codes, _differing(found[1].data.float() * found[1].scale, expected))


def _scales(found: Tensor, x: Tensor, axis: int | None) -> float:
    if axis is None:
        return _differing(found, quantize(x, "fp8-e4m3").scales.view(1))
    return _differing(found, quantize(x, "fp8-e4m3", axis, scaling="vector").scales.view(-1))


def _nvfp4(found: nvfp4.NVFP4, q: QTensor) -> float:
    """Compare an operand, lines x K, with the specification's, which has the matrix's axes."""
    along = q.axis == 1
    codes, scales, values = (t if along else t.t() for t in (q.pack(), q.scales, q.values()))
    shares = [_differing(found.scales, scales)]
    shares.append(_differing(found.tensor_scale, q.tensor_scale.view(1)))
    if found.codes is not None:
        shares.append(_differing(found.codes, codes))
    if found.values is not None:
        block = E4M3.magnitudes().to(scales.device)[scales.int()].repeat_interleave(16, 1)
        if q.scaling == "tile":
            block = block.repeat_interleave(16, 0)
        shares.append(_differing(found.values.float(), values * block))
    return max(shares)


def _clamped(x: Tensor, residual: str) -> tuple[QTensor, Tensor]:
    """Operand and residual of the specification."""
    clamped, rest = clamp_outliers(x.float(), _ALPHA)
    operand = quantize(clamped, "fp4-vector", 1, "nearest-up")
    if residual == "folded":
        operand = fold_outliers(operand, x.float(), clamped)
    return operand, rest
