"""What all quantized linears of a model share: where the run stands, and who watches.

One object, passed by hand. The training loop moves ``step`` and ``first_token`` before every
micro-batch; the linears read them in forward and keep what they read for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from megafp4.backends.base import Operand
from megafp4.backends.ledger import Ledger
from megafp4.numerics import QTensor


class Position(NamedTuple):
    """Where in the run a forward pass stands; with seed and layer, all that its bits depend on."""

    step: int
    """Optimizer step."""
    first_token: int
    """Index of the micro-batch's first token within the step's global batch."""


class Probe(Protocol):
    """Watches quantizations, e.g. to log what they lose."""

    def __call__(self, layer: str, gemm: str, operand: str, x: torch.Tensor, q: QTensor, /) -> None:
        """Receive one quantization.

        Args:
            layer: Name of the layer.
            gemm: ``fprop``, ``dgrad`` or ``wgrad``.
            operand: ``a`` or ``b``.
            x: What the codes stand for: the operand after clamping, Hadamard and prescale.
            q: Its codes and scales.
        """


class WeightCache:
    """Operands made from one weight, kept until the step or the weight changes.

    All micro-batches of a step multiply the same quantized weight. Operands that are plain casts
    are not kept: casting again costs less than the memory. A change is seen as autograd sees it, by
    the version of the tensor; writes through ``.data`` show at the next step.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Operand, torch.Tensor]] = {}

    def get(
        self, name: str, weight: torch.Tensor, step: int, make: Callable[[], Operand]
    ) -> Operand:
        """Return the operand called ``name`` made from ``weight`` at ``step``, or make it now."""
        weight = weight.detach()
        version = None if weight.is_inference() else weight._version
        state = (step, version, weight.data_ptr(), weight.stride())
        if name in self._kept and self._kept[name][0] == state:
            return self._kept[name][1]
        operand = make()
        if not isinstance(operand, torch.Tensor):
            # As long as `weight` is alive, no other tensor can come to lie at its address.
            self._kept[name] = state, operand, weight
        return operand

    def clear(self) -> None:
        """Drop what is kept."""
        self._kept.clear()

    def __getstate__(self) -> dict[str, object]:
        """Stay out of copies and pickles."""
        return {"_kept": {}}


@dataclass
class Precision:
    """Shared, mutable state of a model's quantized linears."""

    seed: int = 0
    """Seed of stochastic rounding and Hadamard signs."""
    step: int = 0
    """Optimizer step, set by the training loop."""
    first_token: int = 0
    """Index of the next micro-batch's first token within the step, set by the training loop."""
    accumulates: bool = False
    """Let wgrad add into ``weight.grad`` itself where that saves a pass over it. For loops that
    call ``backward()``: ``torch.autograd.grad`` would find no gradient of the weight then."""
    ledger: Ledger = field(default_factory=Ledger)
    """Counts every GEMM that runs."""
    probe: Probe | None = None
    """Called for each quantization; None costs nothing."""

    @property
    def position(self) -> Position:
        """Step and first token, to be kept from forward to backward."""
        return Position(self.step, self.first_token)
