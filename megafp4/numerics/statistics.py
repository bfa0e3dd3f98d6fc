"""How much a quantization lost: the figures that tell a healthy recipe from a sick one."""

from __future__ import annotations

import torch

from megafp4.numerics.formats import Integer
from megafp4.numerics.qtensor import QTensor, as_rows, scales_as_rows


def operand_statistics(x: torch.Tensor, q: QTensor, prescale: float = 1.0) -> dict[str, float]:
    """Compare a tensor with its quantized form.

    Args:
        x: What was quantized (after a Hadamard transform, if there was one).
        q: Its codes and scales.
        prescale: Factor that was applied before rounding; undone before comparing.

    Returns:
        ``clip_rate``: share of elements beyond the largest code.
        ``underflow_rate``: share of non-zero elements that became zero.
        ``snr_db``: 10 log10 of signal over error power (inf for an exact result).
        ``octave_span``: log2 of the largest over the smallest scale within a line, blocks of zeros
        left out, the largest of all lines: folding MXFP4 into FP8 is exact up to 14.
        Elements or scales that are not finite are left out of all of them and counted in
        ``nonfinite_rate``.
    """
    x = x.detach().float()
    decoded = q.dequantize() / prescale
    finite = x.isfinite() & decoded.isfinite()
    count = max(1, int(finite.sum()))
    scales = scales_as_rows(q.scale_values(), q.format, q.axis, q.scaling)
    # FP32 scales are rounded: the largest element may exceed its own image by an ulp.
    limit = _largest(q) * scales / prescale * (1.0 + 2.0**-20)
    # A block whose E4M3 scale vanished has underflowed, not clipped.
    beyond = (as_rows(x.abs(), q.format, q.axis, q.scaling) > limit) & (limit > 0)
    nonzero = finite & (x != 0)
    error = torch.where(finite, x - decoded, 0.0).double().square().sum()
    signal = torch.where(finite, x, 0.0).double().square().sum()
    return {
        "clip_rate": float((beyond.reshape(x.shape) & finite).sum()) / count,
        "underflow_rate": float((nonzero & (decoded == 0)).sum()) / max(1, int(nonzero.sum())),
        "snr_db": float(10.0 * torch.log10(signal / error)) if signal > 0 else float("inf"),
        "octave_span": _octave_span(q),
        "nonfinite_rate": 1.0 - float(finite.sum()) / max(1, x.numel()),
    }


def _largest(q: QTensor) -> float:
    element = q.format.element
    # The most negative integer reaches one step further than the largest positive one.
    return float(-element.low) if isinstance(element, Integer) else element.max_value


def _octave_span(q: QTensor) -> float:
    if q.scaling not in ("block", "tile") or q.codes.numel() == 0:
        return 0.0
    holds = as_rows(q.values() != 0, q.format, q.axis, q.scaling)
    holds = holds.any(1) if q.scaling == "block" else holds.any(3).any(1)
    holds = holds.view(q.scales.shape)
    octave = torch.log2(q.scale_values())
    # A block of zeros is exact whatever its scale; that scale says nothing.
    usable = holds & octave.isfinite()
    high = torch.where(usable, octave, -torch.inf).amax(q.axis)
    low = torch.where(usable, octave, torch.inf).amin(q.axis)
    return float((high - low).clamp(min=0.0).max())
