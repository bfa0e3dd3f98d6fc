"""What all quantized linears of a model share: where the run stands, and who watches.

One object, passed by hand. The training loop moves ``step`` and ``first_token`` before every
micro-batch; the linears read them in forward and keep what they read for backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from megafp4.backends.base import Backend, Operand
from megafp4.backends.ledger import Ledger
from megafp4.numerics import Peers, QTensor, Runs


class Position(NamedTuple):
    """Where in the run a forward pass stands; with seed and layer, all that its bits depend on."""

    step: int
    """Optimizer step."""
    first_token: int | Runs
    """Index of the micro-batch's first token within the step's global batch, or runs."""
    others: Peers | None = None
    """Who holds other tokens of the same sequences."""


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


class Squares:
    """What wgrad has measured: sums of squares of gradients, for as long as they describe them.

    A measurement counts while the parameter's gradient is the very memory that was measured, at the
    version that it had then. So a micro-batch that autograd adds, a hook, clipping or a gradient
    that was set anew ends it. Writes that autograd does not see do not: whoever writes through
    ``.data``, unscales with ``torch.amp.GradScaler``, or reduces gradients over ranks with
    ``torch.distributed``, must :meth:`clear`.
    """

    def __init__(self) -> None:
        self._found: dict[int, _Measured] = {}

    def record(
        self, parameter: torch.Tensor, gradient: torch.Tensor, squares: torch.Tensor
    ) -> None:
        """Keep sums of squares for as long as ``gradient`` stays what it is.

        Args:
            parameter: Whose gradient it is, or will be when backward hands it over.
            gradient: Contiguous; no reference to it is kept.
            squares: FP64, of any shape, that add up to the squared norm of ``gradient``.
        """
        storage = StorageWeakRef(gradient.untyped_storage())
        self._found[id(parameter)] = _Measured(storage, gradient._version, gradient.shape, squares)

    def of(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """What adds up to the squared norm of the parameter's gradient; None if it is not known."""
        found, gradient = self._found.get(id(parameter)), parameter.grad
        if found is None or gradient is None:
            return None
        # As long as a weak reference exists, no other storage can be taken for this one.
        same = (
            found.storage == StorageWeakRef(gradient.untyped_storage())
            and found.version == gradient._version
            and found.shape == gradient.shape
            and gradient.is_contiguous()
        )
        return found.squares if same else None

    def clear(self) -> None:
        """Forget all measurements."""
        self._found.clear()

    def __getstate__(self) -> dict[str, object]:
        """Stay out of copies and pickles."""
        return {"_found": {}}


class Magnitudes:
    """Largest magnitudes that whoever wrote a tensor has found, for as long as they are true.

    They count while the tensor is at the version that it had then, see :class:`Squares`.
    """

    def __init__(self) -> None:
        self._found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def record(self, tensor: torch.Tensor, amax: torch.Tensor) -> None:
        """Keep the largest magnitudes of the parts of a tensor: FP32 [n] on its device."""
        if not tensor.is_inference():  # which has no version
            self._found[tensor] = tensor._version, amax

    def of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """FP32 [n]; None if they are not known."""
        version, amax = self._found.get(tensor, (-1, None))
        return amax if not tensor.is_inference() and version == tensor._version else None

    def __reduce__(self) -> tuple[type[Magnitudes], tuple[()]]:
        """Stay out of copies and pickles."""
        return Magnitudes, ()


class Target(NamedTuple):
    """What becomes of a weight's gradient, besides that wgrad returns it."""

    accumulate_into: torch.Tensor | None = None
    """FP32 [out, in]: the gradient that exists already, to which the GEMM adds, or memory that is
    kept for it."""
    measured_for: torch.Tensor | None = None
    """Parameter under which the squares of an FP32 gradient are noted."""
    overwrite: bool = False
    """``accumulate_into`` holds nothing yet."""
    returned: bool = True
    """Whether autograd gets the result too, and hands it to the weight's hooks."""


RETURNED = Target()
"""It is returned, that is all."""


class _Measured(NamedTuple):
    storage: StorageWeakRef
    version: int
    shape: torch.Size
    squares: torch.Tensor


@dataclass
class Precision:
    """Shared, mutable state of a model's quantized linears."""

    seed: int = 0
    """Seed of stochastic rounding and Hadamard signs."""
    step: int = 0
    """Optimizer step, set by the training loop."""
    first_token: int | Runs = 0
    """Index of the next micro-batch's first token within the step, set by the training loop; runs
    where a rank holds parts of the sequences."""
    others: Peers | None = field(default=None, repr=False, compare=False)
    """The ranks that hold other parts of the same sequences, if they are cut."""
    accumulates: bool = False
    """Let wgrad add into ``weight.grad`` itself where that saves a pass over it. For loops that
    call ``backward()``: ``torch.autograd.grad`` would find no gradient of the weight then."""
    measures: bool = False
    """Let wgrad note in :attr:`squares` how large the gradients are that it writes, where that
    saves a pass over them. For loops that take the norm, which set it before a step's last backward
    pass."""
    squares: Squares = field(default_factory=Squares, repr=False, compare=False)
    """What wgrad has measured."""
    magnitudes: Magnitudes = field(default_factory=Magnitudes, repr=False, compare=False)
    """What the optimizer knows of weights, norms and activations of what they return: spares FP8
    casts a pass over them."""
    ledger: Ledger = field(default_factory=Ledger)
    """Counts every GEMM that runs."""
    probe: Probe | None = None
    """Called for each quantization; None costs nothing."""
    deferred: list[Callable[[], None]] | None = field(default=None, repr=False, compare=False)
    """Where backward leaves the wgrads that a zero-bubble pipeline runs later, in order; None runs
    them in backward. A call computes a weight's gradient and has autograd accumulate it."""

    destination: Callable[[torch.Tensor], tuple[torch.Tensor, bool] | None] | None = field(
        default=None, repr=False, compare=False
    )
    """Where sharded training keeps the gradient of a weight, and whether to overwrite what is
    there; None for weights whose gradients autograd keeps. Whoever is told a place must write."""

    def target(self, weight: torch.Tensor, backend: Backend) -> Target:
        """Say what wgrad is to do with the gradient of a weight that it is about to compute."""
        if not weight.is_leaf:
            return RETURNED
        if self.destination is not None and backend.accumulates:
            place = self.destination(weight)
            if place is not None:
                return Target(place[0], None, place[1])
        measured_for, grad = weight if self.measures else None, weight.grad
        hooked = weight._backward_hooks or weight._post_accumulate_grad_hooks
        adds = self.accumulates and backend.accumulates and not hooked
        fits = grad is not None and grad.dtype == torch.float32 and grad.is_contiguous()
        into = grad if adds and fits else None
        return Target(into, measured_for, returned=into is None)

    @property
    def position(self) -> Position:
        """Step and tokens, to be kept from forward to backward."""
        return Position(self.step, self.first_token, self.others)

    @contextlib.contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Let what runs meanwhile leave no trace in ledger and statistics."""
        ledger, probe = self.ledger, self.probe
        self.ledger, self.probe = Ledger(), None
        try:
            yield
        finally:
            self.ledger, self.probe = ledger, probe
