"""How a weight and its moments are kept between steps: one codec for each published way.

========  ======================  ==========================  ===================  ==============
name      weight (the parameter)  first moment                second moment        bytes each [1]_
========  ======================  ==========================  ===================  ==============
fp32      FP32                    FP32                        FP32                 4 + 8
bf16-sr   BF16, stochastic        BF16                        BF16, stochastic     2 + 4
fp8lm     BF16, and 8 bits below  E4M3 x 2^e                  FP16 x 2^e           2 + 4.02
coat      FP32                    E4M3 of an expanded range   as the first         4 + 2.13
coat-sr   BF16, stochastic        E4M3 of an expanded range   as the first         2 + 2.13
eco       BF16                    BF16, and what was lost     as coat's            2 + 3.06
========  ======================  ==========================  ===================  ==============

.. [1] Weight + the codec's state. Scales belong to groups of 128 elements of the flat tensor.

A weight on a grid is its own only copy (:mod:`megafp4.optim.dqt`); ``coat`` and ``coat-sr`` keep
its moments as ``coat`` does, 2.13 bytes, and the others in FP32.

A step decodes to FP32, moves (:func:`megafp4.optim.adamw.adamw_update`) and encodes; the weight is
moved by the moments before these are rounded. The functions here are the specification, on any
device; ``megafp4_kernels.adamw`` does the same in one pass over memory, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from megafp4.optim import quantizers as q
from megafp4.optim.adamw import StepNumbers, adamw_update, denominator_of

State: TypeAlias = dict[str, Tensor]
"""What a codec keeps beside one parameter, by kind."""
Moved: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""FP32 weight and moments after a step."""


class Step(NamedTuple):
    """What an encoder may want to know of the step."""

    numbers: StepNumbers
    """Its constants."""
    draw: q.Draw | None
    """Its random bits; needed by codecs that round stochastically."""

    def random_words(self, like: Tensor) -> Tensor:
        """32 random bits for each element of a tensor, int64 [groups, 128]."""
        assert self.draw is not None
        return q.random_words(self.draw, like.numel(), like.device)


class StateCodec(ABC):
    """A way to keep a weight and its two moments."""

    name: str
    """Value of ``optim.states``."""
    weight_dtype = torch.float32
    """Type of the parameter that the model reads."""
    element_dtypes: ClassVar[dict[str, torch.dtype]]
    """State with one number per element, of the parameter's shape."""
    group_dtypes: ClassVar[dict[str, tuple[torch.dtype, int]]]
    """State with that many numbers per group of 128: [groups, numbers]."""

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Type of each kind of state."""
        groups = {kind: dtype for kind, (dtype, _) in self.group_dtypes.items()}
        return self.element_dtypes | groups

    def adopt(self, param: nn.Parameter) -> State:
        """Allocate the state of an FP32 parameter, which takes the codec's type where it lies.

        A parameter that has the codec's type already keeps its value. Gradients stay FP32.
        """
        state = {
            kind: torch.zeros(param.shape, dtype=dtype, device=param.device)
            for kind, dtype in self.element_dtypes.items()
        }
        groups = q.group_count(param.numel())
        for kind, (dtype, numbers) in self.group_dtypes.items():
            state[kind] = torch.zeros(groups, numbers, dtype=dtype, device=param.device)
        if self.weight_dtype != torch.float32:
            master = param.detach().float()
            param.data = torch.empty_like(master, dtype=self.weight_dtype)
            param.grad_dtype = torch.float32
            self._start(param.detach(), master, state)
        return state

    def _start(self, weight: Tensor, master: Tensor, state: State) -> None:
        """Write a first weight, whose type is not FP32."""
        del state
        weight.copy_(master)

    @abstractmethod
    def decode(self, weight: Tensor, state: State) -> Moved:
        """FP32 weight and moments, of one shape; they may be the stored tensors themselves."""

    @abstractmethod
    def encode(self, moved: Moved, weight: Tensor, state: State, step: Step) -> None:
        """Store weight and moments, of the shape that :meth:`decode` gave them."""


class GridCodec(StateCodec):
    """A codec that can keep the moments of a weight without the weight."""

    @abstractmethod
    def decode_moments(self, state: State) -> tuple[Tensor, Tensor]:
        """Contiguous FP32 moments, in the order of the elements, perhaps with zeros behind them.

        They may be the stored tensors themselves.
        """

    @abstractmethod
    def encode_moments(self, m: Tensor, v: Tensor, state: State) -> None:
        """Store what :meth:`decode_moments` gave and was changed since."""


class FP32States(GridCodec):
    """FP32 throughout, as in Megatron: the parameter is its own master."""

    name = "fp32"
    element_dtypes: ClassVar = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    group_dtypes: ClassVar = {}

    def decode(self, weight: Tensor, state: State) -> Moved:
        """Give the stored tensors themselves."""
        return weight, state["exp_avg"], state["exp_avg_sq"]

    def encode(self, moved: Moved, weight: Tensor, state: State, step: Step) -> None:
        """Nothing to do: what moved is what is stored."""

    def decode_moments(self, state: State) -> tuple[Tensor, Tensor]:
        """Give the stored tensors themselves."""
        return state["exp_avg"], state["exp_avg_sq"]

    def encode_moments(self, m: Tensor, v: Tensor, state: State) -> None:
        """Nothing to do: what moved is what is stored."""


class BF16States(StateCodec):
    """BF16 throughout and no master: the weight is rounded stochastically [2502.20566].

    So is the second moment, which differs from the paper: to nearest, BF16 would not let through
    the changes of 0.1 % that a beta2 of 0.999 makes. Each element draws 32 bits, the lower half for
    the weight.
    """

    name = "bf16-sr"
    weight_dtype = torch.bfloat16
    element_dtypes: ClassVar = {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
    group_dtypes: ClassVar = {}

    def decode(self, weight: Tensor, state: State) -> Moved:
        """Widen what is stored."""
        return q.grouped(weight), q.grouped(state["exp_avg"]), q.grouped(state["exp_avg_sq"])

    def encode(self, moved: Moved, weight: Tensor, state: State, step: Step) -> None:
        """Round the first moment to nearest, the others stochastically."""
        new, m, v = moved
        random = step.random_words(weight)
        q.put(weight, q.round_to_bf16(new, random & 0xFFFF))
        q.put(state["exp_avg"], m.bfloat16())
        q.put(state["exp_avg_sq"], q.round_to_bf16(v, random >> 16))


class FP8LMStates(StateCodec):
    """FP8-LM's states [2310.18313, sec. 2.3]: E4M3 first moment, FP16 second, a short master.

    Two deviations. A scale belongs to 128 elements and not to a tensor, so that it can be taken
    from the very values it scales, in the one pass that makes them. And the master is not FP16 with
    a scale beside the BF16 copy that the GEMMs read, 4 bytes, but that copy and the 8 bits that
    follow it, 3 bytes: a master of 24 bits, 5 of them more than FP16's mantissa has.
    """

    name = "fp8lm"
    weight_dtype = torch.bfloat16
    element_dtypes: ClassVar = {
        "exp_avg": torch.float8_e4m3fn,
        "exp_avg_sq": torch.float16,
        "master_low": torch.int8,
    }
    group_dtypes: ClassVar = {"exponents": (torch.int8, 2)}

    def _start(self, weight: Tensor, master: Tensor, state: State) -> None:
        high, low = q.split_24_bits(master)
        weight.copy_(high)
        state["master_low"].copy_(low)

    def decode(self, weight: Tensor, state: State) -> Moved:
        """Join the master; bring the moments back to scale."""
        m, v = q.grouped(state["exp_avg"].float()), q.grouped(state["exp_avg_sq"])
        m *= q.power_of_two(state["exponents"][:, :1])
        v *= q.power_of_two(state["exponents"][:, 1:])
        return q.grouped(q.join_24_bits(weight, state["master_low"])), m, v

    def encode(self, moved: Moved, weight: Tensor, state: State, step: Step) -> None:
        """Split the master; scale each group of moments by what its new values ask for."""
        new, m, v = moved
        high, low = q.split_24_bits(new)
        q.put(weight, high)
        q.put(state["master_low"], low)
        of_m, of_v = q.e4m3_exponent(m), q.fp16_exponent(v)
        q.put(state["exp_avg"], q.encode_e4m3(m * q.power_of_two(-of_m)))
        q.put(state["exp_avg_sq"], (v * q.power_of_two(-of_v)).half())
        state["exponents"].copy_(torch.cat([of_m, of_v], 1))


class CoatStates(GridCodec):
    """COAT's states [2410.19313, sec. 4]: both moments in E4M3 with dynamic range expansion.

    The master is FP32 and is the parameter, as in the authors' code. Each group of 128 keeps the
    largest magnitude and the power of its first moment, then those of its second; see
    :func:`megafp4.optim.quantizers.expand` for the logarithm.
    """

    name = "coat"
    element_dtypes: ClassVar = {"exp_avg": torch.float8_e4m3fn, "exp_avg_sq": torch.float8_e4m3fn}
    group_dtypes: ClassVar = {"ranges": (torch.float32, 4)}

    def adopt(self, param: nn.Parameter) -> State:
        """As every codec; a group that is zero has a power of 16."""
        state = super().adopt(param)
        state["ranges"][:, 1::2] = 16.0
        return state

    def decode(self, weight: Tensor, state: State) -> Moved:
        """Contract the ranges of both moments."""
        return q.grouped(weight), *self.decode_moments(state)

    def encode(self, moved: Moved, weight: Tensor, state: State, step: Step) -> None:
        """Expand the ranges of both new moments."""
        new, m, v = moved
        self._put_weight(weight, new, step)
        self.encode_moments(m, v, state)

    def decode_moments(self, state: State) -> tuple[Tensor, Tensor]:
        """Contract the ranges of both moments, [groups, 128]."""
        largest_m, power_m, largest_v, power_v = state["ranges"].t().unsqueeze(-1).contiguous()
        m = q.contract(_grouped_codes(state["exp_avg"]), largest_m, power_m)
        return m, q.contract(_grouped_codes(state["exp_avg_sq"]), largest_v, power_v)

    def encode_moments(self, m: Tensor, v: Tensor, state: State) -> None:
        """Expand the ranges of both new moments."""
        of_m, of_v = q.expansion(m), q.expansion(v)
        q.put(state["exp_avg"], q.expand(m, *of_m))
        q.put(state["exp_avg_sq"], q.expand(v, *of_v))
        state["ranges"].copy_(torch.cat([*of_m, *of_v], 1))

    def _put_weight(self, weight: Tensor, new: Tensor, step: Step) -> None:
        del step
        q.put(weight, new)


class CoatSRStates(CoatStates):
    """COAT's moments beside a BF16 weight without a master, rounded stochastically [2502.20566]."""

    name = "coat-sr"
    weight_dtype = torch.bfloat16

    def _put_weight(self, weight: Tensor, new: Tensor, step: Step) -> None:
        q.put(weight, q.round_to_bf16(new, step.random_words(weight) & 0xFFFF))


class EcoStates(StateCodec):
    """ECO [2601.22101] on BF16 weights: no master, what rounding loses goes into the first moment.

    The weight is rounded to nearest and its error e is added to the first moment as
    e (1 - 1 / beta1) (1 - beta1^t) / lr times Adam's denominator, with which the weight and the
    moves that are still to come follow the trajectory that nothing was rounded on. The first moment
    holds what the weight lacks, so it is BF16; the second is COAT's, and no random bits are drawn.
    """

    name = "eco"
    weight_dtype = torch.bfloat16
    element_dtypes: ClassVar = {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.float8_e4m3fn}
    group_dtypes: ClassVar = {"ranges": (torch.float32, 2)}

    def adopt(self, param: nn.Parameter) -> State:
        """As every codec; a group that is zero has a power of 16."""
        state = super().adopt(param)
        state["ranges"][:, 1] = 16.0
        return state

    def decode(self, weight: Tensor, state: State) -> Moved:
        """Widen weight and first moment; contract the range of the second."""
        largest, power = state["ranges"].t().unsqueeze(-1).contiguous()
        v = q.contract(_grouped_codes(state["exp_avg_sq"]), largest, power)
        return q.grouped(weight), q.grouped(state["exp_avg"]), v

    def encode(self, moved: Moved, weight: Tensor, state: State, step: Step) -> None:
        """Round the weight to nearest, with its error into the first moment; expand the second."""
        new, m, v = moved
        rounded = new.bfloat16()
        q.put(weight, rounded)
        lost = (new - rounded.float()).mul_(step.numbers.feedback)
        q.put(state["exp_avg"], (m + lost.mul_(denominator_of(v, step.numbers))).bfloat16())
        of_v = q.expansion(v)
        q.put(state["exp_avg_sq"], q.expand(v, *of_v))
        state["ranges"].copy_(torch.cat(of_v, 1))


def _grouped_codes(codes: Tensor) -> Tensor:
    """E4M3 codes [groups, 128], as :func:`megafp4.optim.quantizers.grouped` lays values out."""
    return q.grouped(codes.float()).to(codes.dtype)


CODECS: dict[str, StateCodec] = {
    codec.name: codec
    for codec in (
        FP32States(),
        BF16States(),
        FP8LMStates(),
        CoatStates(),
        CoatSRStates(),
        EcoStates(),
    )
}
"""By the value of ``optim.states``."""

GRID_CODECS: dict[str, GridCodec] = {"coat": CoatStates(), "coat-sr": CoatStates()}
"""Those of weights on a grid, by the value of ``optim.states``; FP32 for the others."""


@torch.no_grad()
def codec_step(
    codec: StateCodec,
    weight: Tensor,
    grad: Tensor,
    state: State,
    numbers: StepNumbers,
    scale: float | Tensor = 1.0,
    draw: q.Draw | None = None,
) -> None:
    """Take one AdamW step of one parameter: the specification of the fused kernel.

    Args:
        codec: How weight and state are kept.
        weight: Parameter of the codec's type, contiguous, detached; overwritten.
        grad: FP32 or BF16 gradient, same shape.
        state: Of :meth:`StateCodec.adopt`; overwritten.
        numbers: Constants of the step.
        scale: FP32 factor of the gradient.
        draw: Which random bits to round with, where the codec draws some.
    """
    moved = codec.decode(weight, state)
    grad = grad.float() * scale
    adamw_update(moved[0], grad if moved[0] is weight else q.grouped(grad), *moved[1:], numbers)
    codec.encode(moved, weight, state, Step(numbers, draw))
