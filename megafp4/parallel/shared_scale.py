"""FP8-LM's sum of gradients: one scale for all ranks and additions in FP8 [2310.18313, sec. 2.1].

All ranks cast a bucket with the scale of the rank whose largest magnitude is largest, times an
automatic factor mu, and the codes are added as FP8: every addition rounds to 3 mantissa bits and
saturates at 448. It is the paper's method for comparison; :class:`~megafp4.parallel.reduce.
FlatReducer` sends as many bytes and is 3 to 10 times more accurate.

NCCL adds along a ring, in half precision, and rounds after each addition; without NCCL the codes
are exchanged and added here in the order and with the roundings of that ring.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megafp4.errors import CheckpointError
from megafp4.parallel.blocks import (
    E4M3_MAX,
    cast_shared,
    decode_shared,
    largest_magnitude,
    scale_bytes,
    scales_of,
)
from megafp4.parallel.collectives import Group
from megafp4.parallel.reduce import check_shards, exchange

MAX_SATURATED = 1e-5
"""Share of codes at the largest value above which mu is halved."""

GROWTH = 2 ** (1 / 1000)
"""Factor of mu in every other step: it doubles in 1,000."""


class SharedScaleReducer:
    """Sums whose addends share a scale, with an auto-scaling factor mu for every bucket.

    mu starts at 1 / sqrt(ranks). If more than 0.001 % of a sum's codes are saturated it is halved
    for the next step, otherwise it grows by a thousandth of an octave, up to 1.

    Args:
        group: The ranks.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._mu: dict[str, Tensor] = {}

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size

    def reduce_scatter(
        self, x: Tensor, out: Tensor, what: str, *, factor: float = 1.0, accumulate: bool = False
    ) -> None:
        """As :meth:`~megafp4.parallel.reduce.Reducer.reduce_scatter`; ``what`` also names mu."""
        check_shards(x, out, self.size, factor, accumulate)
        if what not in self._mu:
            self._mu[what] = torch.full((), self.size**-0.5, device=x.device)
        mu = self._mu[what]
        scale = scales_of(scale_bytes(self.group.largest(largest_magnitude(x))))
        # Where a rank's gradients are not finite the scale is NaN and so is every sum.
        total = self._sum(cast_shared(x.view(-1), mu / scale), what)
        count = decode_shared(total, scale / mu * factor, out, accumulate)
        saturated = self.group.sum(count[None]) / x.numel()
        grown = (mu * GROWTH).clamp(max=1.0)
        self._mu[what] = torch.where(saturated > MAX_SATURATED, mu / 2, grown).view(())

    def state_dict(self) -> dict[str, Tensor]:
        """mu of every bucket, FP32 0-dim, the same on all ranks."""
        return dict(self._mu)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved factors.

        Raises:
            CheckpointError: A factor is not a number in (0, 1].
        """
        for name, mu in state.items():
            if mu.numel() != 1 or not 0 < mu.item() <= 1:
                raise CheckpointError(
                    f"the saved gradient scale of {name!r} is {mu.tolist()}: expected a number in "
                    "(0, 1], load the checkpoint of a run that reduces its gradients the same way"
                )
        self._mu = {name: mu.float().view(()).clone() for name, mu in state.items()}

    def _sum(self, codes: Tensor, what: str) -> Tensor:
        """This rank's shard of the FP8 sum of codes [size * n]."""
        if codes.is_cuda or self.size == 1:
            return self.group.reduce_scatter(codes, what)
        rows = codes.view(torch.uint8).view(self.size, -1)
        received = exchange(self.group, rows, what).wait().view(torch.float8_e4m3fn)
        # The ring's running sum of a shard starts behind its owner and ends with it.
        order = [(self.group.rank + 1 + i) % self.size for i in range(self.size)]
        total = received[order[0]]
        for rank in order[1:]:
            added = total.half() + received[rank].half()
            total = added.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return total
