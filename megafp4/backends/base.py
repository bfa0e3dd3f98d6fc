"""What a backend is: a way to cast the operands of a GEMM and to multiply them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch

from megafp4.errors import CheckpointError, UnsupportedError
from megafp4.numerics import Format, QTensor, Scaling, dge_multiplier
from megafp4.numerics.qtensor import unpack
from megafp4.recipes import DGE
from megafp4.recipes.cast import CastRequest, Used, cast_from, dge_slope, with_codes_of

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Prepared:
    """A quantized matrix as kernels read it: lines x K, whichever axis it was contracted over."""

    data: torch.Tensor
    """[lines, K], contiguous: FP8 or int8 codes, or values in BF16."""
    scale: torch.Tensor
    """FP32, one for all [1] or one a line [lines]; multiplies the accumulator."""
    format: str
    """Name of the format whose values these are."""


@dataclass(frozen=True)
class PackedOperand:
    """A quantized matrix that waits for its GEMM with its codes packed."""

    codes: torch.Tensor
    """uint8, packed along the contraction axis, see :meth:`megafp4.numerics.QTensor.pack`."""
    scales: torch.Tensor
    """As the format stores them."""
    tensor_scale: torch.Tensor | None
    format: Format
    axis: int
    scaling: Scaling

    def unpacked(self) -> QTensor:
        """The operand as it was."""
        codes = unpack(self.codes, self.format, self.axis)
        return QTensor(codes, self.scales, self.tensor_scale, self.format, self.axis, self.scaling)


Operand: TypeAlias = QTensor | torch.Tensor | Prepared | PackedOperand
"""A quantized matrix, or a BF16 / FP32 one."""


class Slope(NamedTuple):
    """DGE: the result is multiplied by the derivative of the weight's rounding."""

    weight: torch.Tensor
    """[out, in], before quantization."""
    operand: Operand
    """The same as fprop multiplied it."""
    dge: DGE


class Backend(Protocol):
    """Casts operands and multiplies them. What the codes are is the recipe's choice alone."""

    name: str
    accumulates: bool
    """Whether :meth:`gemm` adds into a gradient at less cost than a separate addition."""

    def check(self, a: str, b: str) -> None:
        """Refuse what :meth:`gemm` could not compute, before any work is done.

        Args:
            a: Format of the first operand (a name of :func:`operand_format`).
            b: Format of the second operand.

        Raises:
            UnsupportedError: This backend does not multiply these formats, or not on this machine.
        """

    def multiple(self, a: str, b: str) -> int:
        """What the contraction length, and both widths of the linear, must be multiples of.

        Args:
            a: Format of the first operand.
            b: Format of the second operand.
        """
        ...

    def cast(
        self,
        x: torch.Tensor,
        wanted: Sequence[CastRequest],
        used: tuple[Operand, torch.Tensor | None] | None = None,
    ) -> list[Operand]:
        """Make operands of one matrix; all at once, so that one pass over it can serve several.

        Args:
            x: FP32 or BF16 [rows, cols].
            wanted: The operands.
            used: What :meth:`cast` made of x for fprop, and the outliers cut off before: saves
                making it again for operands that start from its value. No number depends on it.

        Returns:
            One operand a request; codes and scales are those of
            :func:`megafp4.recipes.cast.cast_from`.

        Raises:
            UnsupportedError: This backend has no way to make one of them.
        """
        ...

    def adopt(self, stored: QTensor) -> Operand:
        """Take codes that exist already, such as a grid weight's, as an operand."""
        ...

    def ran_as(self, a: Operand, b: Operand) -> str:
        """Name for the ledger of who multiplies these two."""
        ...

    def gemm(
        self,
        a: Operand,
        b: Operand,
        axes: tuple[int, int],
        alpha: float = 1.0,
        out_dtype: torch.dtype = torch.float32,
        *,
        bias: torch.Tensor | None = None,
        slope: Slope | None = None,
        accumulate_into: torch.Tensor | None = None,
        overwrite: bool = False,
    ) -> torch.Tensor:
        """Multiply two matrices.

        Args:
            a: [M, K] if ``axes[0]`` is 1, [K, M] if it is 0.
            b: [N, K] if ``axes[1]`` is 1, [K, N] if it is 0.
            axes: Contraction axis of each operand; fprop (1, 1), dgrad (1, 0), wgrad (0, 0).
            alpha: Multiplies the FP32 accumulator.
            out_dtype: Type of the result, rounded to once.
            bias: [N], added in FP32.
            slope: Multiplies the result.
            accumulate_into: FP32 [M, N] that the result is added to, and which is returned.
            overwrite: Replace what ``accumulate_into`` holds.

        Returns:
            [M, N] of ``out_dtype``.

        Raises:
            UnsupportedError: As :meth:`check`.
        """
        ...

    def raised_blocks(self) -> Mapping[int, int]:
        """Count the blocks so far whose scale was raised to one that the hardware can express.

        Waits for the device.

        Returns:
            Count by random stream of the operand (:attr:`megafp4.numerics.Key.stream`); only the
            operands that can have any.
        """
        ...

    def state_dict(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What casts on a device carry from call to call and a resumed run must find again."""
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Continue with a state that :meth:`state_dict` returned, wherever its tensors are.

        Raises:
            CheckpointError: It is the state of another backend; nothing is changed then.
        """


class Stateless:
    """What is true of a backend that keeps nothing from call to call and has no granularity."""

    name: str

    def multiple(self, a: str, b: str) -> int:
        """Any length will do."""
        return 1

    def raised_blocks(self) -> Mapping[int, int]:
        """Scales are the recipe's: none is raised."""
        return {}

    def state_dict(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Nothing is carried from call to call."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Accept the empty state.

        Raises:
            CheckpointError: The state is that of another backend.
        """
        if state:
            raise CheckpointError(
                f"the checkpoint holds {next(iter(state))!r} of another backend, and backend "
                f"{self.name!r} keeps no state: continue with the backend that saved it"
            )


@runtime_checkable
class Splitting(Protocol):
    """A :class:`Backend` that clamps a matrix and casts what is left of it in one pass."""

    def cast_apart(
        self, x: torch.Tensor, request: CastRequest
    ) -> tuple[Operand, torch.Tensor | None] | None:
        """Cast a matrix clamped as its request says, and give what was cut off.

        Args:
            x: FP32 or BF16 [tokens, features], before clamping.
            request: The operand.

        Returns:
            The operand, and BF16 [tokens, features] or, where the recipe drops it, None. None in
            place of both where no kernel does this.
        """
        ...


@runtime_checkable
class Measuring(Protocol):
    """A :class:`Backend` whose GEMM can measure the gradient that it writes."""

    def measured_gemm(
        self,
        a: Operand,
        b: Operand,
        axes: tuple[int, int],
        alpha: float = 1.0,
        *,
        slope: Slope | None = None,
        accumulate_into: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """:meth:`Backend.gemm` with an FP32 result, and how large that is.

        Returns:
            The result, and FP64 sums of squares of parts of it, which add up to those of the whole,
            ``accumulate_into`` included; or None where measuring would cost a pass of its own.
        """
        ...


def operand_format(operand: Operand) -> str:
    """Name of an operand's format: of its codes, or ``bf16`` / ``fp32``.

    Raises:
        UnsupportedError: A plain tensor of another type.
    """
    if isinstance(operand, Prepared):
        return operand.format
    if isinstance(operand, QTensor | PackedOperand):
        return operand.format.name
    if operand.dtype not in _DTYPE_NAMES:
        raise UnsupportedError(f"a GEMM operand is {operand.dtype}: give BF16, FP32 or a QTensor")
    return _DTYPE_NAMES[operand.dtype]


def cast_all(
    x: torch.Tensor,
    wanted: Sequence[CastRequest],
    used: tuple[Operand, torch.Tensor | None] | None = None,
) -> list[Operand]:
    """Cast as the specification does, but nothing twice; see :meth:`Backend.cast`."""
    made: list[tuple[CastRequest, QTensor | torch.Tensor]] = []
    for request in wanted:
        if request.sums is not None:
            torch.sum(x, 0, dtype=torch.float32, out=request.sums)
        alike = next((like for one in made if (like := with_codes_of(*one, request))), None)
        made.append((request, alike or cast_from(x, request, _used(request, made, used))[0]))
    return [_pack(operand) if request.packed else operand for request, operand in made]


def _used(
    request: CastRequest,
    made: Sequence[tuple[CastRequest, QTensor | torch.Tensor]],
    given: tuple[Operand, torch.Tensor | None] | None,
) -> Used | None:
    """What an operand starts from, if it is there."""
    for other, operand in made:
        if request.through == other:
            return Used(operand, None)
    if given is None or not isinstance(given[0], QTensor | torch.Tensor):
        return None
    return Used(given[0], given[1])


def _pack(operand: QTensor | torch.Tensor) -> Operand:
    if not isinstance(operand, QTensor):
        return operand
    kept = operand.scales, operand.tensor_scale, operand.format, operand.axis, operand.scaling
    return PackedOperand(operand.pack(), *kept)


def hollow(operand: Operand) -> tuple[list[torch.Tensor], Operand]:
    """Split an operand into its tensors and the rest, for autograd keeps tensors alone."""
    if isinstance(operand, torch.Tensor):
        return [operand], operand.new_empty(0)
    names = _tensor_fields(operand)
    tensors = [getattr(operand, name) for name in names]
    empty: dict[str, Any] = {
        name: tensor.new_empty(0) for name, tensor in zip(names, tensors, strict=True)
    }
    return tensors, replace(operand, **empty)


def refill(rest: Operand, tensors: Sequence[torch.Tensor]) -> Operand:
    """Undo :func:`hollow`."""
    if isinstance(rest, torch.Tensor):
        return tensors[0]
    filled: dict[str, Any] = dict(zip(_tensor_fields(rest), tensors, strict=True))
    return replace(rest, **filled)


def _tensor_fields(operand: QTensor | Prepared | PackedOperand) -> list[str]:
    return [name for name, held in vars(operand).items() if isinstance(held, torch.Tensor)]


def finish(
    out: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
    slope: Slope | None,
    accumulate_into: torch.Tensor | None,
    overwrite: bool = False,
) -> torch.Tensor:
    """Add and multiply what an epilogue would, in FP32, then round once.

    Args:
        out: FP32 [M, N], overwritten.
        out_dtype: Type of the result.
        bias: [N] or None.
        slope: Or None.
        accumulate_into: FP32 [M, N] or None.
        overwrite: Replace what it holds.
    """
    if bias is not None:
        out += bias
    if slope is not None:
        out *= _derivative(slope)
    if accumulate_into is None:
        return out.to(out_dtype)
    return accumulate_into.copy_(out) if overwrite else accumulate_into.add_(out)


def _derivative(slope: Slope) -> torch.Tensor:
    """FP32 [out, in]: derivative of the weight's rounding, in whichever form fprop took it."""
    weight, operand, dge = slope
    if isinstance(operand, Prepared):  # as fprop contracts it, so its lines are the weight's rows
        reciprocal = 1.0 / operand.scale.reshape(-1, 1)
        return dge_multiplier(weight.float() * reciprocal, dge.k, dge.cap)
    assert not isinstance(operand, PackedOperand), "only wgrad's activation waits packed"
    return dge_slope(weight, operand, dge)


def line_major(operand: torch.Tensor, axis: int) -> torch.Tensor:
    """View a matrix with its contraction axis last."""
    return operand if axis == 1 else operand.t()


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A [M, K] times B [N, K]^T with FP32 operands, whatever autocast or the user allows.

    ``torch.set_float32_matmul_precision`` and the flags behind it let FP32 operands be rounded to
    TF32 or BF16. Switching them off for one product would be seen by other threads, and old and new
    flags exclude each other; in FP64 they have no say, and FP32 products are exact.
    """
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda or _cpu_may_round():
            # Always on CUDA, where the environment (NVIDIA_TF32_OVERRIDE) can allow TF32 as well.
            return (a.double() @ b.double().t()).float()
        return a.float() @ b.float().t()


def _cpu_may_round() -> bool:
    found = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return found in ("tf32", "bf16")
