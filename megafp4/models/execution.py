"""How a model runs, not what it computes: what is compiled, and what is kept for backward.

The models call the work between their linears (norms, activations, rotary embedding, residuals) as
functions of tensors, through an :class:`Execution`. Layers share those functions, so each one is
compiled once per kind and shape and never once per layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megafp4.precision import Magnitudes

Recompute = Literal["none", "selective", "full"]
Observer = Callable[[Tensor], object]
"""Sees every tensor that is kept for backward."""
Result = TypeVar("Result")


_COMPILER_OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}
"""Round to BF16 wherever the uncompiled pieces do; memory bounds them, so it costs no time."""


class _Repeatable(NamedTuple):
    """A tensor that backward can make again."""

    out: Tensor
    make: Callable[[], Tensor]
    inputs: list[Any]
    """What it is made of, and keeps alive."""


class Execution:
    """Runs pieces of a model.

    Args:
        compiled: Compile every piece with ``torch.compile``; the linears stay outside.
        recompute: ``none`` keeps what autograd asks for. ``selective`` makes the inputs of the
            linears again in backward (outputs of norms and activations: cheap, and as large as
            anything that is kept) but no GEMM and no attention. ``full`` keeps the residual stream
            between the blocks and runs each block again [arXiv 1604.06174, with one segment a
            block]. Random bits are keyed by meaning and dropout's generator is rewound, so all
            three give the same gradients (compiled, to the rounding of the recomputed pieces).
    """

    def __init__(self, compiled: bool = False, recompute: Recompute = "none") -> None:
        self.compiled = compiled
        self.recompute = recompute
        self.observer: Observer | None = None
        """Told of what blocks keep for backward; for the memory report."""
        self.magnitudes: Magnitudes | None = None
        """Told the largest magnitude of each row of what compiled norms and activations return."""
        self._made: dict[Any, Callable[..., Any]] = {}
        self._repeatable: dict[int, _Repeatable] | None = None

    def run(self, piece: Callable[..., Result], *args: Any) -> Result:
        """Call a function of tensors and constants, compiled if this run compiles."""
        if not self.compiled:
            return piece(*args)
        if piece not in self._made:
            self._made[piece] = torch.compile(
                piece, dynamic=False, fullgraph=True, options=_COMPILER_OPTIONS
            )
        result: Result = self._made[piece](*args)
        return result

    def repeatable(self, piece: Callable[..., Tensor], *args: Any) -> Tensor:
        """As :meth:`run`, for what is cheaper to compute again than to keep until backward."""
        if self.compiled and self.magnitudes is not None:
            out, amax = self.run(_measured(piece), *args)
            self.magnitudes.record(out, amax)
        else:
            out = self.run(piece, *args)
        if self._repeatable is not None:
            # Without their history: what is kept for backward must not keep the graph itself.
            inputs = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
            self._repeatable[_address(out)] = _Repeatable(
                out, lambda: self.run(piece, *inputs), inputs
            )
        return out

    def block(self, forward: Callable[..., Tensor], x: Tensor, *args: Any, draws: bool) -> Tensor:
        """Run one block of the model.

        Args:
            forward: The block.
            x: Residual stream [B, S, H].
            args: Further arguments of ``forward``.
            draws: Whether the block moves PyTorch's random generator (dropout).
        """
        if self.recompute == "none" or not torch.is_grad_enabled():
            return forward(x, *args)
        if self.recompute == "full":
            self._observe(x)
            again: Tensor = checkpoint(
                forward, x, *args, use_reentrant=False, preserve_rng_state=draws
            )
            return again
        with self._selecting():
            return forward(x, *args)

    @contextlib.contextmanager
    def _selecting(self) -> Iterator[None]:
        """Keep no tensor for backward that :meth:`repeatable` made."""
        # Holds the outputs until the block has run, so that their addresses stay theirs.
        self._repeatable = {}
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._repeatable = None

    def _pack(self, kept: Tensor) -> Tensor | Callable[[], Tensor]:
        found = None if self._repeatable is None else self._repeatable.get(_address(kept))
        if found is None or found.out.numel() != kept.numel() or not kept.is_contiguous():
            self._observe(kept)
            return kept
        self._observe(*found.inputs)
        make, shape = found.make, kept.shape
        return lambda: make().view(shape)

    def _observe(self, *kept: Any) -> None:
        if self.observer is not None:
            for one in kept:
                if isinstance(one, Tensor):
                    self.observer(one)

    def __deepcopy__(self, memo: dict[int, Any]) -> Execution:
        """Copies of a model run as it does; compiled code cannot be copied and is made anew."""
        return Execution(self.compiled, self.recompute)

    def __getstate__(self) -> dict[str, Any]:
        """Pickles of a model hold how it runs, not the compiled code."""
        return {"compiled": self.compiled, "recompute": self.recompute}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


@functools.cache
def _measured(piece: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A piece that also returns the largest magnitude of each row: compiled, in the same pass."""

    def measured(*args: Any) -> tuple[Tensor, Tensor]:
        out = piece(*args)
        return out, out.detach().abs().amax(-1).float().flatten()

    # Dynamo limits how often one code object is compiled: each piece gets its own.
    measured.__code__ = measured.__code__.replace(co_name=f"measured_{piece.__name__}")
    return measured


def _unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return kept()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
