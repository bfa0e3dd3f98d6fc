"""Steps of dense parameters: on a GPU all that keep their state alike move in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megafp4.numerics.philox import Key
from megafp4.optim.adamw import StepNumbers
from megafp4.optim.quantizers import Draw
from megafp4.optim.states import State, StateCodec, codec_step

if TYPE_CHECKING:
    from megafp4_kernels.adamw import AdamWLaunch


@dataclass(frozen=True)
class Dense:
    """A dense parameter with everything that its step reads and writes."""

    name: str
    """Its name."""
    param: nn.Parameter
    """What the model reads."""
    codec: StateCodec
    """How it and its moments are kept."""
    state: State
    """The moments, and what else the codec keeps."""
    key: Key
    """What its random bits are for, at step 0."""
    index: int
    """Place of its weight's largest magnitude."""
    start: int = 0
    """Place of its first element in the whole parameter, of which it may be a part."""


@dataclass
class FusedSteps:
    """Launches of the fused kernel, whose tables are made once."""

    amax: Tensor | None
    """FP32, contiguous: the largest magnitude of each parameter, if anybody wants it."""
    _launches: dict[int, tuple[list[int], AdamWLaunch]] = field(default_factory=dict, init=False)

    def step(
        self,
        tensors: Sequence[Dense],
        numbers: StepNumbers,
        step: int,
        scale: Tensor | None,
        skip: Tensor | None,
    ) -> None:
        """Move parameters of one codec, with gradients on one CUDA device.

        Args:
            tensors: The parameters.
            numbers: Constants of the step, shared by all.
            step: Index of this step.
            scale: FP32 [1] on the device; multiplies every gradient.
            skip: FP32 [1] on the device: 1 leaves everything as it is, 0 takes the step.
        """
        by_dtype: dict[torch.dtype, list[tuple[Dense, Tensor]]] = {}
        for one in tensors:
            grad = _readable(one.param)
            by_dtype.setdefault(grad.dtype, []).append((one, grad))
        for pairs in by_dtype.values():
            chosen = [one for one, _ in pairs]
            launch = self._launch(chosen)
            seed = chosen[0].key.seed
            launch.step([grad for _, grad in pairs], numbers, scale, skip, seed, step)
            # The kernel writes behind autograd's back, whose version counters tell operands made
            # from a weight that it has changed.
            for one in chosen:
                torch.autograd.graph.increment_version(one.param)

    def _launch(self, tensors: list[Dense]) -> AdamWLaunch:
        from megafp4_kernels.adamw import AdamWLaunch  # needs triton, an optional package

        # Whoever gives a parameter other memory gets another table.
        where = [one.param.data_ptr() for one in tensors]
        first = tensors[0].index
        if first not in self._launches or self._launches[first][0] != where:
            launch = AdamWLaunch(
                tensors[0].codec.name,
                [{"weight": one.param.detach(), **one.state} for one in tensors],
                [one.key.stream for one in tensors],
                self.amax,
                [one.index for one in tensors],
                [one.start for one in tensors],
            )
            self._launches[first] = where, launch
        return self._launches[first][1]


def exact_steps(
    tensors: Sequence[Dense], numbers: StepNumbers, step: int, scale: Tensor | None
) -> None:
    """Move parameters one after the other, as the kernel is specified; arguments as there."""
    factor = 1.0 if scale is None else scale.view(())
    for one in tensors:
        assert one.param.grad is not None
        draw = Draw(one.key._replace(step=step), one.start)
        weight = one.param.detach()
        codec_step(one.codec, weight, one.param.grad, one.state, numbers, factor, draw)


def _readable(param: nn.Parameter) -> Tensor:
    """The gradient of a parameter as the kernel reads it, copied only where it has to be."""
    grad = param.grad
    assert grad is not None
    if grad.dtype != torch.bfloat16:
        grad = grad.float()
    grad = grad.contiguous()
    return grad.clone() if grad.data_ptr() % 16 else grad
