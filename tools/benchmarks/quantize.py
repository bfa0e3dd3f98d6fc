"""Quantizers on one BF16 matrix, each checked value for value against the specification."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.report import Report
from benchmarks.timing import ceilings, graphed, interleaved
from megafp4.numerics import Key, QTensor, encode, hadamard, hadamard_signs, quantize
from megafp4_kernels import amax, casts, mxfp4

_SEED, _STEP = 11, 3
_RHT_LIMIT = 1e-5
"""Share of codes that may differ: the tensor core sums a Hadamard chunk in another order."""
_E4M3_LIMIT = 5e-4
"""The same where the scale multiplies the sums instead of each value."""

Check = Callable[[], float]


def measure(tokens: int, width: int, rounds: int) -> Report:
    """Time every quantizer; bytes are those read and written once."""
    x = (
        torch.randn(tokens, width, device="cuda") * torch.randn(width, device="cuda").exp()
    ).bfloat16()
    position = torch.tensor([_SEED, _STEP, 0], dtype=torch.int64, device="cuda")
    window = [torch.zeros(mxfp4.WINDOW, dtype=torch.int32, device="cuda") for _ in range(2)]
    scale = amax.scale(x, "fp8-e4m3", None)

    def plan(axis: int, g: int, output: str = "folded") -> mxfp4.Plan:
        key = _key(axis)
        signs = key._replace(operand="signs")
        kept = window[axis] if output == "folded" else None
        return mxfp4.Plan(g, "stochastic", 0.75, key.stream, signs.stream, -1, "none", output, kept)

    def folded(g: int, row: bool, col: bool) -> Callable[[], object]:
        first, second = plan(1, g) if row else None, plan(0, g) if col else None
        return lambda: mxfp4.quantize(x, position, first, second)

    def both(g: int, row: bool, col: bool) -> Check:
        return lambda: _mismatches(folded(g, row, col)(), x, g)

    def packed() -> object:
        return mxfp4.quantize(x, position, None, plan(0, 64, "packed"))

    def fused() -> object:
        first = mxfp4.E4M3Plan(scale)
        return mxfp4.quantize(x, position, first, plan(0, 64), col_from_e4m3=scale)

    def cast() -> object:
        return casts.cast(x, "fp8-e4m3", scale, row=True, col=True)

    def ranged() -> object:
        return amax.scale(x, "fp8-e4m3", None)

    rows: list[tuple[str, Callable[[], object], int, Check, float]] = [
        ("mxfp4, SR, H64, row", folded(64, True, False), 1, both(64, True, False), _RHT_LIMIT),
        ("mxfp4, SR, H64, col", folded(64, False, True), 1, both(64, False, True), _RHT_LIMIT),
        ("mxfp4, SR, H64, row + col", folded(64, True, True), 2, both(64, True, True), _RHT_LIMIT),
        ("mxfp4, SR, row + col", folded(0, True, True), 2, both(0, True, True), 0.0),
        ("mxfp4, SR, H64, col, packed", packed, 0, lambda: _packed(packed(), x), _RHT_LIMIT),
        ("fp8 row + mxfp4 col", fused, 2, lambda: _from_e4m3(fused(), x, scale), _E4M3_LIMIT),
        ("fp8, row + col", cast, 2, lambda: _fp8(cast(), x, scale), 0.0),
        ("amax and scale", ranged, -1, lambda: _scale(x, scale), 0.0),
    ]
    times = interleaved({name: graphed(work) for name, work, *_ in rows}, rounds)
    found = ceilings()
    report = Report(
        f"Quantizers, {tokens} x {width} BF16",
        ("quantizer", "us", "TB/s", "of copy"),
        "TB/s",
        found,
    )
    for name, _, outputs, check, limit in rows:
        time = times[name]
        written = {0: 17 / 32, -1: 0.0}.get(outputs, float(outputs))
        speed = x.numel() * (2 + written) / time.median / 1e9
        report.add(
            name,
            1e3 * time.median,
            speed,
            speed / found["copy TB/s"],
            error=check(),
            limit=limit,
            quartiles_us=[1e3 * time.low, 1e3 * time.high],
        )
    return report


def _key(axis: int) -> Key:
    return Key(_SEED, _STEP, 0, "dgrad" if axis else "wgrad", "a")


def _specified(x: Tensor, axis: int, g: int) -> QTensor:
    if g:
        x = hadamard(x, g, axis, hadamard_signs(_key(axis), g, x.device))
    return quantize(x, "mxfp4", axis, "stochastic", _key(axis), prescale=0.75)


def _differing(found: Tensor, expected: Tensor) -> float:
    return float((found != expected).float().mean())


def _mismatches(found: object, x: Tensor, g: int) -> float:
    """Share of values that differ from the specification's, the worse of the two outputs."""
    assert isinstance(found, tuple)
    shares = []
    for axis, folded in zip((1, 0), found, strict=True):
        if folded is None:
            continue
        expected = _specified(x, axis, g).dequantize()
        value = folded.data.float() * folded.scale
        shares.append(_differing(value, expected if axis else expected.t()))
    return max(shares)


def _packed(found: object, x: Tensor) -> float:
    assert isinstance(found, tuple)
    expected = _specified(x, 0, 64)
    codes = _differing(found[1].codes, expected.pack().t())
    return max(codes, _differing(found[1].scales, expected.scales.t()))


def _from_e4m3(found: object, x: Tensor, scale: Tensor) -> float:
    assert isinstance(found, tuple)
    as_fp8 = encode(x, "fp8-e4m3", scale.view(1, 1), scaling="tensor")
    expected = _specified(as_fp8.dequantize(), 0, 64).dequantize().t()
    codes = _differing(found[0].data.view(torch.uint8), as_fp8.codes)
    return max(codes, _differing(found[1].data.float() * found[1].scale, expected))


def _scale(x: Tensor, scale: Tensor) -> float:
    return _differing(scale, quantize(x, "fp8-e4m3").scales.view(1))


def _fp8(found: object, x: Tensor, scale: Tensor) -> float:
    assert isinstance(found, tuple)
    expected = encode(x, "fp8-e4m3", scale.view(1, 1), scaling="tensor").codes
    row, col = (one.view(torch.uint8) for one in found)
    return max(_differing(row, expected), _differing(col, expected.t()))
