"""Counter-based randomness on the GPU: the bits of ``megafp4.numerics.philox``.

Philox4x32-10 [Salmon et al., SC'11]. Key: the two words of the seed. Counter: (k // 16, line, step,
stream), where stream = layer * 256 + GEMM * 16 + operand. One call dithers 16 consecutive elements
of a line, lowest byte of word 0 first; byte i is the dither (i + 1/2) / 256.

``position`` is an int64 tensor [4] in device memory: seed (as signed 64 bits), optimizer step,
first row, first column. Being read there, it can change under a CUDA graph without anything waiting
for it. Rows and columns are those of the whole matrix, of which a slice may be worked on. If the
slice is not contiguous there, its *runs* say where its rows (columns) lie: int32 [8 ceil(n / 128)],
of every 16 of them the index of the first, divided by 16; the first row (column) is added to it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 block function.

    Args:
        c0: uint32 tensor, word 0 of the counters; all four have one shape.
        c1: Word 1.
        c2: Word 2.
        c3: Word 3.
        k0: uint32 scalar, low word of the key.
        k1: High word.

    Returns:
        Four uint32 tensors.
    """
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        high1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        low0 = c0 * tl.full(c0.shape, 0xD2511F53, tl.uint32)
        low1 = c2 * tl.full(c2.shape, 0xCD9E8D57, tl.uint32)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = (k0 + tl.full((), 0x9E3779B9, tl.uint32)).to(tl.uint32)
        k1 = (k1 + tl.full((), 0xBB67AE85, tl.uint32)).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _draw(position, step, stream, line, group):
    """Words of the calls at (group, line), both uint32 tensors of one shape."""
    seed = tl.load(position)
    return philox4x32(
        group,
        line,
        tl.zeros_like(line) + step.to(tl.uint32),
        tl.zeros_like(line) + stream.to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit
def _global_lines(first, runs, origin, LINES: tl.constexpr):
    """Where lines from ``first`` on lie in the whole: uint32 [LINES]."""
    line = tl.arange(0, LINES)
    if runs is None:
        return ((first + origin) + line).to(tl.uint32)
    else:
        line = first + line
        return (tl.load(runs + line // 16) * 16 + line % 16 + origin).to(tl.uint32)


@triton.jit
def _global_groups(first, runs, origin, GROUPS: tl.constexpr):
    """Where every 16 elements from ``first`` on lie in the whole, in units of 16."""
    group = tl.arange(0, GROUPS)
    if runs is None:
        return ((first + origin) // 16 + group).to(tl.uint32)
    else:
        return (tl.load(runs + first // 16 + group) + origin // 16).to(tl.uint32)


@triton.jit
def dither(
    position,
    row_runs,
    col_runs,
    stream,
    first_line,
    first_k,
    LINES: tl.constexpr,
    K: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Dithers of a tile of a lines x K operand.

    Args:
        position: int64 [4], see the module. The first row or column that is contracted must be a
            multiple of 16.
        row_runs: Runs of the rows, see the module, or None.
        col_runs: Runs of the columns, or None.
        stream: Integer scalar, word 3 of the counter.
        first_line: First line of the tile.
        first_k: First element of its lines, a multiple of 16.
        LINES: Lines of the tile.
        K: Elements of a line, a multiple of 16.
        AXIS: Contraction axis of the matrix: 1 if lines are rows, 0 if they are columns.

    Returns:
        FP32 [LINES, K], each in (0, 1).
    """
    row, col = tl.load(position + 2), tl.load(position + 3)
    if AXIS == 1:
        line = _global_lines(first_line, row_runs, row, LINES)
        group = _global_groups(first_k, col_runs, col, K // 16)
    else:
        line = _global_lines(first_line, col_runs, col, LINES)
        group = _global_groups(first_k, row_runs, row, K // 16)
    lines = line[:, None] + tl.zeros((LINES, K // 16), tl.uint32)
    groups = group[None, :] + tl.zeros((LINES, K // 16), tl.uint32)
    w0, w1, w2, w3 = _draw(position, tl.load(position + 1), stream, lines, groups)
    # The last index of a join runs fastest: (w0, w1, w2, w3) in memory order.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (LINES, K // 4, 1))
    shift = (8 * tl.arange(0, 4)).to(tl.uint32)
    values = (words >> shift[None, None, :]) & 0xFF
    return (tl.reshape(values, (LINES, K)).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 256)


@triton.jit
def sign_words(position, sign_stream, sign_step):
    """The 128 random signs of a Hadamard transform: bit i % 32 of word i // 32, a set bit is -1.

    Args:
        position: int64 [4], see the module.
        sign_stream: Integer scalar, word 3 of the counter, with the operand id of signs.
        sign_step: Integer scalar; below zero, the step of ``position`` is used.

    Returns:
        Four uint32 tensors [1].
    """
    step = tl.load(position + 1)
    step = tl.where(sign_step >= 0, sign_step, step)
    zero = tl.zeros((1,), tl.uint32)
    return _draw(position, step, sign_stream, zero, zero)
