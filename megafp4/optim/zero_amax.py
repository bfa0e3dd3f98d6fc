"""Largest magnitudes of weights whose pieces several ranks own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megafp4.parallel.collectives import Group


class WeightAmax:
    """Keeps the largest magnitude of each weight, at one place in memory, the same on all ranks.

    Args:
        pieces: What this rank owns of each weight, memory that stays where it is; none of some. All
            ranks name the same weights in the same order.
        group: The owners.
        tensor: Ranks that hold other parts of the same weights.
        device: Where weights are.

    Raises:
        CommunicationError: Another rank is gone.
    """

    def __init__(
        self,
        pieces: Mapping[str, list[Tensor]],
        group: Group,
        tensor: Group,
        device: torch.device,
    ) -> None:
        self._group, self._tensor = group, tensor
        self._pieces = [piece for owned in pieces.values() for piece in owned]
        places = [i for i, owned in enumerate(pieces.values()) for _ in owned]
        self._places = torch.tensor(places, dtype=torch.int64, device=device)
        self._amax = torch.zeros(len(pieces), device=device)
        self.by_name = {name: self._amax[i : i + 1] for i, name in enumerate(pieces)}
        """FP32 [1] by name."""
        self.measure()

    def measure(self) -> None:
        """Measure what is owned now, and agree; does nothing where there are no weights.

        Raises:
            CommunicationError: Another rank is gone.
        """
        if not self.by_name:
            return
        found = torch.zeros_like(self._amax)
        if self._pieces:
            norms = torch._foreach_norm(self._pieces, math.inf)
            found.index_copy_(0, self._places, torch.stack([norm.float() for norm in norms]))
        self._amax.copy_(self._tensor.largest(self._group.largest(found)))
