"""Operands of a sharded sequence: every rank quantizes its own tokens and sends the codes.

What the recipe makes of a matrix is what the GEMM reads, so nothing is lost by sending that instead
of the matrix: 4.25 bits an element in MXFP4 instead of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megafp4.backends import Operand
from megafp4.backends.base import Prepared
from megafp4.errors import UnsupportedError
from megafp4.numerics import QTensor, get_format, unpack
from megafp4.numerics.qtensor import codes_per_byte
from megafp4.parallel.collectives import Group, Pending


class Gathering:
    """An operand whose parts are on their way."""

    def __init__(self, finish: Callable[[], Operand]) -> None:
        self._finish = finish
        self._operand: Operand | None = None

    def wait(self) -> Operand:
        """The operand of all tokens; on a GPU the host does not wait for it."""
        if self._operand is None:
            self._operand = self._finish()
        return self._operand


def gather_tokens(operand: Operand, axis: int, group: Group) -> Gathering:
    """Start to join the operands that the ranks made of their tokens, in rank order.

    Scales that the ranks share (of the tensor, or of lines that run through all tokens) must have
    been reduced before encoding and stay as they are.

    Args:
        operand: Of a matrix [tokens / ranks, features]; backends that keep lines x K hold it
            transposed if it is contracted over tokens.
        axis: Axis that the GEMM contracts over, 0 for tokens.
        group: The ranks that hold the tokens.

    Returns:
        On its way: the operand of [tokens, features], as a rank that held all of them casts it.

    Raises:
        UnsupportedError: MXFP4 that was folded into FP8: its window is the shard's own.
    """
    if group.size == 1:
        return Gathering(lambda: operand)
    if isinstance(operand, Tensor):
        return Gathering(group.start_all_gather(operand, "operand").wait)
    if isinstance(operand, Prepared):
        return _gather_prepared(operand, axis, group)
    dim = 0 if operand.axis == axis else 1
    per_token = operand.scaling in ("block", "tile") or (operand.scaling == "vector" and axis == 1)
    length, fmt = operand.codes.shape[operand.axis], operand.format
    packs = isinstance(operand, QTensor) and length % codes_per_byte(fmt) == 0
    sent = operand.pack() if isinstance(operand, QTensor) and packs else operand.codes
    codes = _start(sent, dim, group)
    scales = _start(operand.scales, dim, group, "scales") if per_token else None

    def finish() -> Operand:
        joined = _finish(codes, dim)
        return replace(
            operand,
            codes=unpack(joined, fmt, operand.axis) if packs else joined,
            scales=operand.scales if scales is None else _finish(scales, dim),
        )

    return Gathering(finish)


def _gather_prepared(operand: Prepared, axis: int, group: Group) -> Gathering:
    if get_format(operand.format).default_scaling == "block":
        raise UnsupportedError(
            f"a {operand.format} operand that was prepared for kernels cannot be gathered: "
            "gather it as codes"
        )
    dim = 0 if axis == 1 else 1
    data = _start(operand.data, dim, group)
    per_token = axis == 1 and operand.scale.numel() > 1
    scale = group.start_all_gather(operand.scale, "scales") if per_token else None

    def finish() -> Operand:
        joined = operand.scale if scale is None else scale.wait()
        return Prepared(_finish(data, dim), joined, operand.format)

    return Gathering(finish)


def _start(x: Tensor, dim: int, group: Group, what: str = "operand") -> Pending:
    """Start to join ranks' matrices along a dim; along dim 1 they arrive one behind the other."""
    return group.start_all_gather(x if dim == 0 else x.contiguous()[None], what)


def _finish(started: Pending, dim: int) -> Tensor:
    joined = started.wait()
    if dim == 0:
        return joined
    lines, row_bytes = joined.shape[1], joined.shape[2] * joined.itemsize
    # Copied in words: runs of bytes would be copied byte by byte.
    words = joined.view(torch.int64) if row_bytes % 8 == 0 else joined
    return words.transpose(0, 1).reshape(lines, -1).view(joined.dtype)
