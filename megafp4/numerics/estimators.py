"""DGE and OCC, the two estimators of arXiv 2501.17116.

The differentiable gradient estimator (DGE) replaces the straight-through derivative of weight
quantization by that of a smooth curve; outlier clamping and compensation (OCC) keeps the few
largest activations out of the FP4 GEMM.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from megafp4.errors import ConfigError
from megafp4.numerics.formats import E2M1, get_format
from megafp4.numerics.qtensor import QTensor, lookup
from megafp4.numerics.quantize import encode
from megafp4.numerics.shards import Peers


def dge_multiplier(scaled: torch.Tensor, k: float = 5.0, cap: float = 3.0) -> torch.Tensor:
    """Derivative of the DGE curve on the E2M1 ladder [2501.17116, eq. 7-8].

    Between neighbouring grid points, u runs from -1 to 1 and f' = |u|^(1/k - 1) / k, at most
    ``cap``: steep at the rounding threshold in the middle, 1/k on the grid points.

    Args:
        scaled: FP32 weights times the scale used in the forward pass, so within [-6, 6].
        k: Sharpness; larger is closer to the true staircase.
        cap: Largest derivative.

    Returns:
        FP32, same shape: multiplies the weight gradient.
    """
    grid = E2M1.magnitudes().to(scaled.device)
    magnitude = scaled.float().abs().clamp(max=E2M1.max_value)
    interval = torch.bucketize(magnitude, grid, right=True).sub_(1).clamp_(max=len(grid) - 2)
    low, high = grid[interval], grid[interval + 1]
    u = (2.0 * (magnitude - low) / (high - low) - 1.0).abs()
    return (u.pow(1.0 / k - 1.0) / k).clamp(max=cap)


def clamp_outliers(
    x: torch.Tensor,
    alpha: float,
    mode: Literal["signed", "magnitude"] = "signed",
    peers: Peers | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clamp each token at its own quantiles [2501.17116, section 3.2].

    ``signed`` clamps to the values at sorted positions int((1 - alpha) d) and int(alpha d) of the
    token's d features, as published; for skewed activations half of the budget then goes to the
    harmless side, so ``magnitude`` clamps both signs at position int((2 alpha - 1) d) of the
    sorted magnitudes, leaving the same share of outliers.

    Args:
        x: Activations [..., d].
        alpha: Quantile, in (0.5, 1).
        mode: ``signed`` or ``magnitude``.
        peers: Who holds the other features, if x holds an equal share of them: each sends its own
            few largest and smallest, among which the token's are.

    Returns:
        (clamped, residual): x's dtype, and FP32, where the subtraction of BF16 values is exact
        unless they lie more than 16 octaves apart. What lies within the limits keeps its bits, what
        lies beyond becomes the limit, and a limit of zero is +0. NaN stays NaN.

    Raises:
        ConfigError: alpha or mode is not allowed.
    """
    if not 0.5 < alpha < 1.0:
        raise ConfigError(f"outlier quantile alpha is {alpha}: give a value between 0.5 and 1")
    if mode not in ("signed", "magnitude"):
        raise ConfigError(f"outlier mode is {mode!r}: choose 'signed' or 'magnitude'")
    if x.numel() == 0:
        return x, torch.zeros_like(x, dtype=torch.float32)
    features = x.shape[-1] * (1 if peers is None else peers.size)
    if mode == "signed":
        low = _ranked(x, int((1.0 - alpha) * features) + 1, peers, largest=False)
        high = _ranked(x, max(1, features - int(alpha * features)), peers)
    else:
        high = _ranked(x.abs(), max(1, features - int((2.0 * alpha - 1.0) * features)), peers)
        low = -high
    # Where -0 and +0 tie, what a selection returns is arbitrary; adding +0 makes both +0.
    clamped = torch.where(x < low, low + 0.0, torch.where(x > high, high + 0.0, x))
    return clamped, x.float() - clamped.float()


def _ranked(
    x: torch.Tensor, rank: int, peers: Peers | None, *, largest: bool = True
) -> torch.Tensor:
    """The rank-th largest or smallest of every token [..., 1], counted from 1.

    A few order statistics at either end: selecting them is several times cheaper than sorting.
    """
    if peers is not None:
        few = x.topk(min(rank, x.shape[-1]), dim=-1, largest=largest).values
        x = peers.side_by_side(few)
    return x.topk(rank, dim=-1, largest=largest).values[..., -1:]


def fold_outliers(
    quantized: QTensor, x: torch.Tensor, clamped: torch.Tensor, peers: Peers | None = None
) -> QTensor:
    """Put what was clamped off back into the codes, as E4M3: one GEMM instead of two.

    Within the limits, an element keeps its E2M1 value, which E4M3 holds exactly. Beyond them it is
    E4M3(x * (1 / scale)), to the nearest even, at most 448 times the scale. An outlier so meets the
    quantized weight, as in the code released with 2501.17116, not the weight of its equation.

    Args:
        quantized: ``clamped`` in ``fp4-vector``, one scale per token.
        x: FP32 [tokens, d], before the clamp.
        clamped: First result of :func:`clamp_outliers`.
        peers: Who holds the other features of the tokens, if x holds a share of them.

    Returns:
        ``fp8-e4m3`` with the scales of ``quantized``. Tokens that hold NaN or Inf become NaN.

    Raises:
        ConfigError: ``quantized`` has another format or other scales.
    """
    if quantized.format.name != "fp4-vector" or quantized.scaling != "vector":
        raise ConfigError(
            f"cannot fold outliers into {quantized.format.name!r} with {quantized.scaling} scaling:"
            " quantize to 'fp4-vector' with one scale per token"
        )
    e4m3 = get_format("fp8-e4m3")
    broken = (~x.isfinite()).any(-1, keepdim=True)
    if peers is not None:
        broken = peers.largest(broken.float()) > 0
    scales = torch.where(broken, torch.nan, quantized.scales)
    outer = encode(x, e4m3, scales, quantized.axis, scaling="vector")
    ladder = quantized.format.table.to(x.device)
    inner = encode(ladder, e4m3, ladder.new_ones(1), scaling="tensor").codes
    codes = torch.where(clamped == x, lookup(inner, quantized.codes), outer.codes)
    return replace(outer, codes=torch.where(scales.isnan(), 0, codes))
