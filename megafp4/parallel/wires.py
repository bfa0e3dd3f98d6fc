"""What gradients are while they travel: FP8 messages, or BF16 or FP32 numbers.

A wire turns rows of numbers into rows to send and sums the rows that arrived. Every sum runs in
FP32 and in rank order, so that it has the same bits on every machine and, over an FP32 wire, the
bits of a serial accumulation.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megafp4.parallel import blocks


class Wire(Protocol):
    """How rows of ``count`` numbers (a multiple of ``blocks.GRANULE``) are sent."""

    def encode(self, x: Tensor) -> Tensor:
        """Rows to send, contiguous, of BF16 or FP32 [ranks, count] with contiguous rows."""
        ...

    def decode(self, rows: Tensor, out: Tensor) -> None:
        """Write what was sent to ``out``, BF16 or FP32 [ranks, count] with contiguous rows."""
        ...

    def sum(self, rows: Tensor, out: Tensor, factor: float, accumulate: bool) -> None:
        """Write the ranks' sum times ``factor`` to FP32 [count], or add to what it holds."""
        ...

    def sum_encoded(self, rows: Tensor, factor: float) -> Tensor:
        """The ranks' sum times ``factor`` as one row to send, [1, ...], rounded once."""
        ...


class Fp8Wire:
    """E4M3 codes with a power-of-two scale for each block of 128: 1.008 bytes a number."""

    def encode(self, x: Tensor) -> Tensor:
        """uint8 messages."""
        width = blocks.message_bytes(x.shape[1])
        message = torch.empty(x.shape[0], width, dtype=torch.uint8, device=x.device)
        blocks.cast_blocks(x, message)
        return message

    def decode(self, rows: Tensor, out: Tensor) -> None:
        """Exact but for the cast to a BF16 ``out``."""
        blocks.decode_blocks(rows, out)

    def sum(self, rows: Tensor, out: Tensor, factor: float, accumulate: bool) -> None:
        """Decoded and added in one pass."""
        blocks.sum_rows(rows, out, factor, accumulate)

    def sum_encoded(self, rows: Tensor, factor: float) -> Tensor:
        """Decoded, added and cast again in one pass."""
        message = torch.empty_like(rows[:1])
        blocks.sum_rows(rows, message[0], factor)
        return message


class FloatWire:
    """Numbers as they are in BF16 or FP32.

    Args:
        dtype: Type of what is sent.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def encode(self, x: Tensor) -> Tensor:
        """x in the wire's type; x itself where nothing has to change."""
        return x.to(self.dtype).contiguous()

    def decode(self, rows: Tensor, out: Tensor) -> None:
        """Copy."""
        out.copy_(rows)

    def sum(self, rows: Tensor, out: Tensor, factor: float, accumulate: bool) -> None:
        """One FP32 addition for each rank."""
        blocks.sum_rows(rows, out, factor, accumulate)

    def sum_encoded(self, rows: Tensor, factor: float) -> Tensor:
        """The FP32 sum, rounded to the wire's type."""
        total = torch.empty(rows.shape[1], dtype=torch.float32, device=rows.device)
        blocks.sum_rows(rows, total, factor)
        return total.to(self.dtype)[None]
