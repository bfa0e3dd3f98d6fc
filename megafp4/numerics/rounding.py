"""Rounding a magnitude to an integer number of steps.

Every format rounds the same way: divide by the local step (exact, a power of two), split into an
integer and a remainder (exact), decide whether to go up. Only the decision differs between modes,
and none of them depends on floating-point rounding, so a kernel that decides by integer arithmetic
on the bits gives the same result.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from megafp4.errors import unknown_name

Rounding = Literal["nearest-even", "nearest-away", "nearest-up", "stochastic"]
"""``nearest-even``: ties to the even code (OCP MX, hardware). ``nearest-away``: ties away from zero
(microxcaling's default). ``nearest-up``: ties toward plus infinity (the comparison ladder of
arXiv 2501.17116). ``stochastic``: up with probability equal to the remainder."""


def check_rounding(rounding: str) -> None:
    """Raise ConfigError unless ``rounding`` is a known mode."""
    if rounding not in get_args(Rounding):
        raise unknown_name("rounding", rounding, get_args(Rounding))


def round_steps(
    steps: torch.Tensor,
    rounding: Rounding,
    signed: torch.Tensor,
    dither: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round magnitudes, in units of their step, to whole steps.

    Args:
        steps: FP32, non-negative and finite.
        rounding: Mode.
        signed: FP32, same shape: the values with their signs, which ``nearest-up`` needs.
        dither: FP32 in (0, 1), same shape; needed by ``stochastic``, where a magnitude goes up
            exactly if remainder + dither >= 1.

    Returns:
        FP32 whole numbers. Whole inputs never move.
    """
    if rounding == "nearest-even":
        return steps.round()
    whole = steps.floor()
    remainder = steps - whole
    # Comparisons in place give 0.0 or 1.0: what is to be added.
    if rounding == "nearest-away":
        up = remainder.ge_(0.5)
    elif rounding == "nearest-up":
        up = torch.where(signed < 0, remainder > 0.5, remainder >= 0.5).float()
    else:
        assert dither is not None, "quantize() checks that stochastic rounding has a key"
        # 1 - dither is exact (dither has at most 24 bits); remainder + dither might not be.
        up = remainder.ge_(1.0 - dither)
    return whole.add_(up)
