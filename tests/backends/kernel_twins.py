"""What the kernels compute, by megafp4.numerics: backend hopper on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megafp4.numerics import (
    Key,
    Origin,
    QTensor,
    Scaling,
    amax,
    clamp_outliers,
    dge_multiplier,
    encode,
    fold_outliers,
    get_format,
    hadamard,
    hadamard_signs,
    quantize,
    scales_from_amax,
)
from megafp4.numerics.fold import fold
from megafp4.numerics.qtensor import unpack as unpack_codes

from megafp4_kernels import amax as amax_kernels  # isort: skip
from megafp4_kernels import (
    casts,
    gemm,
    gemm_int8,
    lines,
    mxfp4,
    nvfp4,
    nvfp4_amax,
    outliers,
    recast,
    tails,
)  # isort: skip


def key_of(stream: int, position: Tensor, step: int = -1) -> Key:
    """Undo Key.stream."""
    seed, now, *_ = position.tolist()
    layer, rest = stream >> 8, stream & 0xFF
    return Key(seed % (1 << 64), now if step < 0 else step, layer, rest >> 4, rest & 15)


def origin_of(
    x: Tensor, axis: int, position: Tensor, row_runs: Tensor | None, col_runs: Tensor | None
) -> Origin:
    """Undo Positions.of."""
    found = []
    for dim, runs in enumerate((row_runs, col_runs)):
        first, count = int(position[2 + dim]), x.shape[dim]
        if runs is None:
            found.append(first)
            continue
        assert runs.dtype == torch.int32
        assert len(runs) == 8 * -(-count // 128)
        assert count % 16 == 0
        found.append(tuple((first + 16 * one, 16) for one in runs[: count // 16].tolist()))
    return (found[0], found[1]) if axis == 1 else (found[1], found[0])


OCTAVES = 15
"""Blocks this many octaves below a window's base keep their exponent; tests may allow fewer."""


class Calls(list[str]):
    """Names of the kernels that ran, in order."""


def _mxfp4(
    x: Tensor, position: Tensor, plan: mxfp4.Plan, origin: Origin
) -> mxfp4.Folded | mxfp4.Packed:
    """Quantize lines x K."""
    if plan.hadamard:
        signs = hadamard_signs(
            key_of(plan.sign_stream, position, plan.sign_step), plan.hadamard, "cpu"
        )
        x = hadamard(x, plan.hadamard, 1, signs)
    q = quantize(
        x,
        "mxfp4",
        1,
        plan.rounding,  # type: ignore[arg-type]
        key_of(plan.stream, position),
        prescale=plan.prescale,
        origin=origin,
    )
    if plan.output == "packed":
        return mxfp4.Packed(q.pack(), q.scales)
    return _windowed(q, plan.window)


def _windowed(q: QTensor, window: Tensor | None) -> mxfp4.Folded:
    """Fold with the base that the window keeps, and raise the blocks too far below it."""
    folded = fold(q)
    if window is None or not q.values().any():
        return mxfp4.Folded(folded.data, folded.scale.reshape(1).float())
    chosen, base = int(folded.scale.log2()), int(window[1])
    if not window[0] or not base + 4 <= chosen + 10 <= base + 13:
        window[0], window[1] = 1, chosen
        window[mxfp4.MOVED] += 1
        base = chosen
    low = q.scales.int() - 127 < base - OCTAVES
    raised = low & q.values().view(*q.scales.shape, -1).any(-1)
    window[mxfp4.RAISED] += raised.sum()
    value, quantum = q.dequantize(), 2.0 ** (base - OCTAVES - 1)
    coarse = (value / quantum).round() * quantum
    value = torch.where(raised.repeat_interleave(mxfp4.BLOCK, 1), coarse, value)
    data = torch.ldexp(value, torch.tensor(-base)).to(torch.float8_e5m2)
    return mxfp4.Folded(data, torch.tensor([2.0**base]))


def _amax(x: Tensor, axis: int | None) -> Tensor:
    scaling = "tensor" if axis is None else "vector"
    return amax(x, "fp8-e4m3", 1 if axis is None else axis, scaling).reshape(-1)


def _line_peaks(data: Tensor, scale: Tensor) -> Tensor:
    return data.float().abs().amax(1) * scale


def _scale_of(largest: Tensor, fmt: str) -> Tensor:
    return scales_from_amax(largest.amax().view(1, 1), fmt)[0].reshape(-1)


def _scale(x: Tensor, fmt: str, axis: int | None) -> Tensor:
    scaling = "tensor" if axis is None else "vector"
    found = amax(x, fmt, 1 if axis is None else axis, scaling)
    return scales_from_amax(found, fmt)[0].reshape(-1)


def _as_operand(q: QTensor) -> Tensor:
    name = q.format.name
    if name in ("int8", "ternary"):
        return q.values().to(torch.int8)
    if name == "fp4-vector":
        return q.values().to(torch.float8_e4m3fn)
    return q.codes.view(casts.DTYPES[name])


class Twins:
    """The kernels' functions, with the kernels' signatures."""

    def __init__(self) -> None:
        self.calls = Calls()

    def quantize(
        self,
        x,
        position,
        row,
        col,
        *,
        row_runs=None,
        col_runs=None,
        col_from_e4m3=None,
        col_sums=None,
    ):  # type: ignore[no-untyped-def]
        self.calls.append("mxfp4.both" if row and col else "mxfp4.row" if row else "mxfp4.col")
        if col_sums is not None:
            assert x.dtype == torch.bfloat16
            assert col.hadamard
            assert col_from_e4m3 is None
            self.calls.append("mxfp4.sums")
            torch.sum(x, 0, dtype=torch.float32, out=col_sums)
        first = second = None
        if isinstance(row, mxfp4.E4M3Plan):
            q = encode(x, "fp8-e4m3", row.scale.view(1, 1), scaling="tensor")
            first = mxfp4.Folded(_as_operand(q), row.scale)
        elif row is not None:
            first = _mxfp4(x, position, row, origin_of(x, 1, position, row_runs, col_runs))
        if col is not None:
            origin = origin_of(x, 0, position, row_runs, col_runs)
            if col_from_e4m3 is not None:
                of = col_from_e4m3.view(1, 1)
                x = encode(x, "fp8-e4m3", of, scaling="tensor").dequantize()
            second = _mxfp4(x.t().contiguous(), position, col, origin)
        return first, second

    def unpack(self, packed, window=None):  # type: ignore[no-untyped-def]
        self.calls.append("mxfp4.unpack")
        like = quantize(torch.zeros(packed.codes.shape[0], packed.codes.shape[1] * 2), "mxfp4", 1)
        codes = unpack_codes(packed.codes, "mxfp4", 1)
        q = QTensor(codes, packed.scales, None, like.format, 1, "block")
        folded = fold(q)
        return mxfp4.Folded(folded.data, folded.scale.reshape(1).float())

    def cast(self, x, fmt, scale, *, row=True, col=False, scale_axis=None, **options):  # type: ignore[no-untyped-def]
        self.calls.append(f"cast.{fmt}")
        position, stream = options.get("position"), options.get("stream", 0)
        runs = options.get("row_runs"), options.get("col_runs")
        rounding = options.get("rounding", "nearest-even")
        if scale_axis is None:
            scales, scaling = scale.view(1, 1), "tensor"
        else:
            scales = scale[:, None] if scale_axis == 0 else scale[None, :]
            scaling = "vector"
        axis = 1 if row else 0
        q = encode(
            x,
            fmt,
            scales,
            axis if scaling == "tensor" else 1 - scale_axis,
            rounding,
            key_of(stream, position) if rounding == "stochastic" else None,
            scaling=scaling,  # type: ignore[arg-type]
            prescale=options.get("prescale", 1.0),
            origin=origin_of(x, axis, position, *runs) if rounding == "stochastic" else (0, 0),
        )
        data = _as_operand(q)
        return data if row else None, data.t().contiguous() if col else None

    def cast_lines(self, x, fmt, *, rounding="nearest-even", prescale=1.0, peak=False):  # type: ignore[no-untyped-def]
        self.calls.append(f"lines.{fmt}")
        q = quantize(x, fmt, 1, rounding, scaling="vector", prescale=prescale)
        scale = q.scales.view(-1)
        data = _as_operand(q)
        largest = data.float().abs().amax(1) * scale if peak else None
        return lines.Lines(data, scale, largest)

    def gemm(
        self,
        a,
        b,
        *,
        scale_a,
        scale_b,
        alpha=1.0,
        bias=None,
        out_dtype=torch.bfloat16,
        out=None,
        accumulate=False,
        slope=None,
    ):  # type: ignore[no-untyped-def]
        self.calls.append("gemm")
        made = (a.float() @ b.float().t()) * alpha * scale_a.view(-1, 1) * scale_b.view(1, -1)
        if bias is not None:
            made += bias
        if slope is not None:
            scaled = slope.weight.float() * (1.0 / slope.scale.view(-1, 1))
            made *= dge_multiplier(scaled, slope.k, slope.cap)
        return out.add_(made) if accumulate else made.to(out_dtype)

    def int8(self, a, b, **options):  # type: ignore[no-untyped-def]
        made = self.gemm(a, b, **options)
        self.calls[-1] = "gemm_int8"
        return made

    def nvfp4(
        self,
        x,
        axis=1,
        *,
        tile=False,
        rounding="nearest-even",
        prescale=1.0,
        position=None,
        row_runs=None,
        col_runs=None,
        stream=0,
        hadamard=0,
        sign_stream=0,
        sign_step=-1,
        block_amax=None,
        largest=None,
        codes=True,
        values=True,
    ):  # type: ignore[no-untyped-def]
        self.calls.append("nvfp4")
        g = hadamard
        if g:
            x = _hadamard(x, g, axis, key_of(sign_stream, position, sign_step))
        spec = get_format("nvfp4")
        scaling: Scaling = "tile" if tile else "block"
        blocks = amax(x, spec, axis, scaling)
        if block_amax is not None:
            assert torch.equal(block_amax, blocks if axis == 1 else blocks.t())
        scales, tensor_scale = scales_from_amax(
            blocks, spec, None if largest is None else largest.amax()
        )
        q = encode(
            x,
            spec,
            scales,
            axis,
            rounding,
            key_of(stream, position),
            scaling=scaling,
            tensor_scale=tensor_scale,
            prescale=prescale,
            origin=origin_of(x, axis, position, row_runs, col_runs),
        )
        assert q.tensor_scale is not None
        one = q.tensor_scale.view(1)
        of_lines = (q.scales if axis == 1 else q.scales.t()).contiguous()
        if codes:
            lines = q.codes if axis == 1 else q.codes.t()
            return nvfp4.NVFP4(lines[:, ::2] | lines[:, 1::2] << 4, of_lines, one, None)
        decoded = q.dequantize() / q.tensor_scale
        lines = decoded if axis == 1 else decoded.t()
        return nvfp4.NVFP4(None, of_lines, one, lines.bfloat16().contiguous())

    def block_magnitudes(self, x, axis=1, *, tile=False, position=None, hadamard=0, **signs):  # type: ignore[no-untyped-def]
        if hadamard:
            key = key_of(signs["sign_stream"], position, signs["sign_step"])
            x = _hadamard(x, hadamard, axis, key)
        found = amax(x, "nvfp4", axis, "tile" if tile else "block")
        return (found if axis == 1 else found.t()).contiguous()

    def occ(self, x, alpha, *, mode="signed", residual="exact", limits=None):  # type: ignore[no-untyped-def]
        self.calls.append(f"occ.{residual}")
        if limits is None:
            clamped, rest = clamp_outliers(x.float(), alpha, mode)
            q = quantize(clamped, "fp4-vector", 1, "nearest-up")
        else:
            clamped = x.float().clamp(*limits[:, :, None])
            rest = x.float() - clamped
            scales, _ = scales_from_amax(limits.abs().amax(0)[:, None], "fp4-vector")
            q = encode(clamped, "fp4-vector", scales, 1, "nearest-up", scaling="vector")
        value = q.dequantize()
        if residual == "folded":
            q = fold_outliers(q, x.float(), clamped)
            value, rest = q.dequantize(), torch.zeros_like(rest)
        elif residual == "none":
            rest = torch.zeros_like(rest)
        peak = (value + rest).abs().amax(1)
        if limits is None:
            limits = torch.stack([clamped.amin(1), clamped.amax(1)])
        saturated = torch.zeros(1, dtype=torch.int32)
        return outliers.Clamped(
            _as_operand(q), q.scales.view(-1), limits, peak, rest.bfloat16(), saturated
        )

    def tails(self, x, smallest, largest):  # type: ignore[no-untyped-def]
        self.calls.append("tails")
        low = x.topk(smallest, 1, largest=False).values
        return torch.cat([low, x.topk(largest, 1).values], 1)

    def limits(self, sent, smallest, largest, *, finite=False):  # type: ignore[no-untyped-def]
        ordered = sent.float().sort(1).values
        assert smallest
        assert not (finite and ordered.isinf().any())
        return torch.stack([ordered[:, smallest - 1], ordered[:, -largest]])

    def recast(self, data, scale, *, peak=None, x=None, limits=None, row=False, col=True):  # type: ignore[no-untyped-def]
        self.calls.append("recast")
        value = data.float() * scale.view(-1, 1)
        if x is not None:
            low, high = limits[0][:, None], limits[1][:, None]
            value = value + (x.float() - x.float().clamp(low, high))
        largest = value.abs().amax() if peak is None else peak.amax()
        q = encode(value, "fp8-e4m3", scales_from_amax(largest.view(1, 1), "fp8-e4m3")[0])
        codes = _as_operand(q)
        return codes if row else None, codes.t().contiguous() if col else None, q.scales.view(1)


def install(patch: pytest.MonkeyPatch) -> Calls:
    """Put the twins in the kernels' places; return the list that they write their names to."""
    twins = Twins()
    for module, name, twin in (
        (mxfp4, "quantize", twins.quantize),
        (mxfp4, "unpack", twins.unpack),
        (amax_kernels, "amax", _amax),
        (amax_kernels, "scale", _scale),
        (amax_kernels, "scale_of", _scale_of),
        (casts, "cast", twins.cast),
        (lines, "cast_lines", twins.cast_lines),
        (gemm, "gemm", twins.gemm),
        (gemm_int8, "gemm_int8", twins.int8),
        (nvfp4, "quantize_nvfp4", twins.nvfp4),
        (nvfp4_amax, "block_magnitudes", twins.block_magnitudes),
        (outliers, "occ", twins.occ),
        (tails, "tails", twins.tails),
        (tails, "limits", twins.limits),
        (recast, "recast", twins.recast),
        (recast, "line_peaks", _line_peaks),
    ):
        patch.setattr(module, name, twin)
    return twins.calls


def _hadamard(x: Tensor, g: int, axis: int, key: Key) -> Tensor:
    return hadamard(x, g, axis, hadamard_signs(key, g, "cpu"))
