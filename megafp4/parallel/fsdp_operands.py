"""Weights that travel as the operands that a recipe makes of them, cast by who keeps the rows.

Every rank casts its rows as the recipe casts the whole weight: a scale that several ranks' rows
share is taken over all of them before encoding, and random bits are those of an element's place in
the whole, so the codes are the serial run's. A weight is cast once for all ranks, and FP8 or FP4
codes and scales are sent.
A :class:`~megafp4.precision.Probe` does not see these casts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megafp4.backends import Backend, HopperBackend, Operand, ReferenceBackend
from megafp4.backends.base import Prepared
from megafp4.errors import ConfigError
from megafp4.linear import Linear
from megafp4.linear_op import LinearOp
from megafp4.numerics import QTensor, Slice, get_format, unpack
from megafp4.numerics.qtensor import codes_per_byte
from megafp4.parallel.collectives import Group
from megafp4.parallel.fsdp_weights import Form
from megafp4.precision import WeightCache
from megafp4.recipes import DGE, OperandSpec
from megafp4.recipes.cast import CastRequest


class GatheredOperands(WeightCache):
    """A layer's cache in which operands lie that were cast elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived: dict[str, Operand] = {}
        """By GEMM."""

    def get(self, name: str, weight: Tensor, step: int, make: Callable[[], Operand]) -> Operand:
        """Return the operand that arrived, or what :class:`WeightCache` returns."""
        found = self.arrived.get(name)
        return super().get(name, weight, step, make) if found is None else found


class _Cast(NamedTuple):
    """An operand of this rank's rows and which of its tensors travel."""

    operand: Operand
    axis: int
    tensors: tuple[Tensor, ...]


class AsOperands(Form):
    """What fprop and dgrad multiply, cast by the rank that keeps the rows.

    Args:
        shape: Of the whole weight.
        linear: The layer.
        cache: Its cache, where operands go that have arrived.
        group: The ranks.
        first: Global index of this rank's first row.
    """

    def __init__(
        self,
        shape: torch.Size,
        linear: Linear,
        cache: GatheredOperands,
        group: Group,
        first: int,
    ) -> None:
        super().__init__(shape)
        self.linear, self.op, self.cache = linear, linear.op, cache
        self.group, self.first = group, first

    def send(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """Codes and scales, or BF16 rows: of fprop's operand, and of dgrad's where it differs.

        Raises:
            ConfigError: The layer has changed its recipe.
        """
        if self.linear.op is not self.op:
            raise ConfigError(
                f"{self.op.name!r} changed its recipe while its weight is gathered as operands of "
                f"{self.op.recipe.name!r}: shard the model with operands=False"
            )
        requests = [self._request(gemm, rows) for gemm in ("fprop", "dgrad")]
        wanted = requests[:1] if _alike(*requests) else requests
        made = [
            _travelling(operand, request.axis)
            for operand, request in zip(self.op.backend.cast(rows, wanted), wanted, strict=True)
        ]
        return tuple(tensor for one in made for tensor in one.tensors), made

    def receive(self, parts: tuple[Tensor, ...], kept: Any) -> Tensor | None:
        """Join the operands and leave them to the layer."""
        left, arrived = list(parts), []
        for cast in kept:
            mine, left = left[: len(cast.tensors)], left[len(cast.tensors) :]
            arrived.append(_joined(cast, mine))
        if len(arrived) == 1:
            arrived.append(_along_rows(arrived[0]))
        self.cache.arrived = dict(zip(("fprop", "dgrad"), arrived, strict=True))
        return None

    def release(self) -> None:
        """Drop the operands."""
        self.cache.arrived = {}

    def _request(self, gemm: Any, rows: Tensor) -> CastRequest:
        request = self.op._request(gemm, "b", self.op.precision.position, rows)
        return self._placed(request)

    def _placed(self, request: CastRequest) -> CastRequest:
        """The same request for this rank's rows."""
        origin = (self.first, 0) if request.axis == 1 else (0, self.first)
        through = None if request.through is None else self._placed(request.through)
        return replace(
            request, origin=origin, through=through, part=Slice(self.group, 0), amax=None
        )


def travels_as_operands(op: LinearOp, rows: int, dtype: torch.dtype) -> bool:
    """Whether a rank can cast its rows as if it had all, and less is sent than the rows.

    It cannot where blocks of dgrad's operand lie in the rows of two ranks, where the mean of a
    matrix sets the scale (its sum over ranks rounds in another order), where a GEMM also reads the
    weight itself (DGE, and outliers that meet it in BF16), or where kernels keep operands in a form
    that depends on the whole.

    Args:
        op: The layer; a share of one that tensor parallelism cuts is never cast elsewhere.
        rows: Of a rank.
        dtype: Type in which the rows are kept.
    """
    recipe = op.recipe
    clamp = recipe.fprop.a.clamp
    reads = isinstance(recipe.fprop.b.estimator, DGE) or (
        clamp is not None and clamp.residual == "exact"
    )
    if type(op) is not LinearOp or recipe.grid is not None or reads:
        return False
    specs = recipe.fprop.b, recipe.dgrad.b
    if not _casts_rows(op.backend, specs):
        return False
    if any(spec.quantized and spec.statistic != "absmax" for spec in specs):
        return False
    tile = max(get_format(s.format).block if s.shared_scale == "tile" else 1 for s in specs)
    if rows % recipe.dgrad.divisor or rows % tile:
        return False
    once = specs[0] == specs[1] and (not specs[0].quantized or specs[0].shared_scale == "tensor")
    sent = _bytes(specs[0]) + (0 if once else _bytes(specs[1]))
    return sent < dtype.itemsize


def _bytes(spec: OperandSpec) -> float:
    """Bytes of an element while it travels, scales left out."""
    return 1 / codes_per_byte(spec.format) if spec.quantized else spec.dtype.itemsize


def _casts_rows(backend: Backend, specs: Sequence[OperandSpec]) -> bool:
    """Whether operands that a backend makes of some rows can be joined."""
    if isinstance(backend, ReferenceBackend):
        return True
    quantized = [get_format(spec.format) for spec in specs if spec.quantized]
    if isinstance(backend, HopperBackend):  # blocks are folded within a window of their own
        return all(fmt.default_scaling != "block" for fmt in quantized)
    return not quantized


def _alike(fprop: CastRequest, dgrad: CastRequest) -> bool:
    """Whether both GEMMs multiply the same numbers of a weight."""
    spec, other = fprop.operand, dgrad.operand
    drawn = spec.rounding == "stochastic" or fprop.gemm.hadamard or dgrad.gemm.hadamard
    one_scale = not spec.quantized or spec.shared_scale == "tensor"
    return one_scale and not drawn and spec == other and fprop.through == dgrad.through


def _along_rows(operand: Operand) -> Operand:
    """Fprop's operand as dgrad contracts it."""
    if isinstance(operand, Prepared):
        return replace(operand, data=_turned(operand.data))
    return replace(operand, axis=0) if isinstance(operand, QTensor) else operand


def _turned(codes: Tensor) -> Tensor:
    """Transpose codes of a byte."""
    return codes.view(torch.uint8).t().contiguous().view(codes.dtype)


def _travelling(operand: Operand, axis: int) -> _Cast:
    """Say which tensors of an operand of some rows the other ranks lack."""
    if isinstance(operand, Tensor):
        return _Cast(operand, axis, (operand,))
    if isinstance(operand, Prepared):
        data = operand.data if axis == 1 else _turned(operand.data)
        mine = (operand.scale,) if axis == 1 and operand.scale.numel() > 1 else ()
        return _Cast(operand, axis, (data.view(torch.uint8), *mine))
    assert isinstance(operand, QTensor), "weights are not packed"
    shared = operand.scaling == "tensor" or (operand.scaling == "vector" and axis == 0)
    codes = operand.pack() if _packs(operand) else operand.codes
    scales = () if shared else (operand.scales.contiguous(),)
    return _Cast(operand, axis, (codes.contiguous(), *scales))


def _joined(cast: _Cast, parts: list[Tensor]) -> Operand:
    """The operand of all rows."""
    own, rest = cast.operand, parts[1:]
    if isinstance(own, Tensor):
        return parts[0]
    if isinstance(own, Prepared):
        _read_here(own.scale)
        data = parts[0].view(own.data.dtype)
        data = data if cast.axis == 1 else _turned(data)
        return replace(own, data=data, scale=rest[0] if rest else own.scale)
    assert isinstance(own, QTensor)
    _read_here(own.scales, own.tensor_scale)
    codes = unpack(parts[0], own.format, own.axis) if _packs(own) else parts[0]
    return replace(own, codes=codes, scales=rest[0] if rest else own.scales)


def _read_here(*tensors: Tensor | None) -> None:
    """Keep the memory of what was made on the stream on which FSDP2 packs until it is read here."""
    for one in tensors:
        if one is not None and one.is_cuda:
            one.record_stream(torch.cuda.current_stream(one.device))


def _packs(operand: QTensor) -> bool:
    return operand.shape[operand.axis] % codes_per_byte(operand.format) == 0
