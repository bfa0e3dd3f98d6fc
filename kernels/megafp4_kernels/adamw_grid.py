"""Direct Quantized Training in one pass over memory: AdamW, then stochastic rounding to the grid.

Bit-equal to ``megafp4.optim.dqt``, which explains the step. Bytes of memory traffic per weight,
with 8-bit codes and FP32 gradients: 22 with FP32 moments, 10 with COAT's; two less with BF16
gradients.

A program works on one tile, rows of 128 elements of the flat weight; a row of the weight consists
of whole ones, so that each has one step of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafp4_kernels import adamw_states as states
from megafp4_kernels.casts import has_fp8_conversions
from megafp4_kernels.philox import philox4x32

GROUP = 128
"""Elements of a row of a tile, which share scales of moments."""
FORMS: dict[str, dict[str, torch.dtype]] = {
    "fp32": {"exp_avg": torch.float32, "exp_avg_sq": torch.float32},
    "coat": {
        "exp_avg": torch.float8_e4m3fn,
        "exp_avg_sq": torch.float8_e4m3fn,
        "ranges": torch.float32,
    },
}
"""Types of the tensors of each form of moments."""

_ROWS, _WARPS = 4, 2


class Grid(NamedTuple):
    """What the codes of a weight are."""

    bits: int
    """Of a code, in two's complement."""
    low: int
    """Lowest point."""
    high: int
    """Highest point."""

    @property
    def per_byte(self) -> int:
        """Codes that lie in a byte, lowest bits first."""
        return 1 if self.bits == 8 else 4 if self.bits == 2 else 2


class Draw(NamedTuple):
    """Which random bits a weight is rounded with."""

    lines: Tensor
    """int32 [rows]: where the rows lie in the whole matrix."""
    first_col: int
    """Where the first column lies."""
    stream: int
    """Word 3 of the Philox counter."""
    seed: int
    """64 bits."""
    step: int
    """Optimizer step."""


@triton.jit
def _random(seed_low, seed_high, step, stream, line, first_call):
    """32 random bits for each element: uint32 [ROWS, 128], of calls [ROWS] and those behind."""
    calls = first_call[:, None] + tl.arange(0, 32)[None, :]
    zero = tl.zeros_like(calls).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(
        calls.to(tl.uint32),
        zero + line.to(tl.uint32)[:, None],
        zero + step.to(tl.uint32),
        zero + stream.to(tl.uint32),
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
    )
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (line.shape[0], 128))


@triton.jit
def _nearby_point(position, random, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Grid points next to positions, stochastically: int32."""
    magnitude = tl.minimum(tl.abs(position), 1.0 - LOW)
    whole = tl.floor(magnitude)
    dither = ((random >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    whole += tl.where(magnitude - whole >= 1.0 - dither, 1.0, 0.0)
    point = tl.where(position < 0, -whole, whole).to(tl.int32)
    return tl.minimum(tl.maximum(point, LOW), HIGH)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "stream", "first_call"])
def _grid_kernel(
    codes, steps, lines, grads, exp_avg, exp_avg_sq, ranges, counts, scale_ptr, skip_ptr,
    seed_low, seed_high, step, stream, first_call, groups, groups_per_row,
    decay, move, beta2, rest1, rest2, eps,
    COAT: tl.constexpr, NATIVE: tl.constexpr, BITS: tl.constexpr, PER_BYTE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    skip = tl.load(skip_ptr)
    scale = tl.load(scale_ptr)
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = group < groups
    flips = tl.zeros((), tl.int32)
    saturated, broken = flips, flips
    if skip == 0.0:
        offsets = group.to(tl.int64)[:, None] * 128 + tl.arange(0, 128)[None, :]
        inside = known[:, None] & (offsets >= 0)
        grad = tl.load(grads + offsets, mask=inside, other=0).to(tl.float32) * scale
        m = tl.load(exp_avg + offsets, mask=inside, other=0)
        v = tl.load(exp_avg_sq + offsets, mask=inside, other=0)
        if COAT:
            of_m = tl.load(ranges + 2 * group, mask=known, other=states.UNITY)
            of_v = tl.load(ranges + 2 * group + 1, mask=known, other=states.UNITY)
            m = states.contract_pair(m, of_m, True, NATIVE)
            v = states.contract_pair(v, of_v, False, NATIVE)
        row = group // groups_per_row
        within = group - row * groups_per_row
        grid_step = tl.load(steps + row, mask=known, other=1.0)[:, None]
        line = tl.load(lines + row, mask=known, other=0)
        byte = tl.load(codes + offsets // PER_BYTE, mask=inside, other=0).to(tl.int32)
        shift = (offsets % PER_BYTE).to(tl.int32) * (8 // PER_BYTE)
        old = (byte >> shift) & ((1 << BITS) - 1)
        value = ((old ^ (1 << (BITS - 1))) - (1 << (BITS - 1))).to(tl.float32)

        m = m + (grad - m) * rest1
        v = v * beta2 + (grad * rest2) * grad
        weight = value * grid_step
        moved = (weight + tl.div_rn(m, tl.sqrt_rn(v) + eps) * move) * decay
        finite = tl.abs(moved) < float("inf")
        position = value + tl.div_rn(moved - weight, tl.zeros_like(moved) + grid_step)
        random = _random(seed_low, seed_high, step, stream, line, first_call + within * 32)
        point = _nearby_point(tl.where(finite, position, value), random, LOW, HIGH)
        code = point & ((1 << BITS) - 1)

        flips = tl.sum(tl.sum((inside & (code != old)).to(tl.int32), 1), 0)
        at_end = (point == LOW) | (point == HIGH)
        saturated = tl.sum(tl.sum((inside & at_end).to(tl.int32), 1), 0)
        broken = tl.sum(tl.sum((inside & (finite == 0)).to(tl.int32), 1), 0)
        if PER_BYTE == 1:
            tl.store(codes + offsets, code.to(tl.uint8), mask=inside)
        else:
            bytes_of_row: tl.constexpr = 128 // PER_BYTE
            packed = tl.sum(tl.reshape(code << shift, (ROWS, bytes_of_row, PER_BYTE)), 2)
            at = group.to(tl.int64)[:, None] * bytes_of_row + tl.arange(0, bytes_of_row)[None, :]
            tl.store(codes + at, packed.to(tl.uint8), mask=known[:, None] & (at >= 0))
        if COAT:
            largest, power = states.expansion(m)
            m = states.expand(m, largest, power, True, NATIVE)
            tl.store(ranges + 2 * group, states.join_pair(largest, power), mask=known)
            largest, power = states.expansion(v)
            v = states.expand(v, largest, power, False, NATIVE)
            tl.store(ranges + 2 * group + 1, states.join_pair(largest, power), mask=known)
        tl.store(exp_avg + offsets, m, mask=inside)
        tl.store(exp_avg_sq + offsets, v, mask=inside)
    programs = tl.num_programs(0)
    tl.store(counts + tl.program_id(0), flips)
    tl.store(counts + programs + tl.program_id(0), saturated)
    tl.store(counts + 2 * programs + tl.program_id(0), broken)


def fits(shape: Sequence[int], first_col: int) -> bool:
    """Whether a weight, or rows of one, of this shape can be moved here.

    Args:
        shape: [rows, cols].
        first_col: Place of its first column in the whole matrix.
    """
    return shape[1] % GROUP == 0 and first_col % 4 == 0


def grid_adamw(
    codes: Tensor,
    steps: Tensor,
    grid: Grid,
    grad: Tensor,
    moments: Mapping[str, Tensor],
    numbers: Sequence[float],
    draw: Draw,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """Take one Direct Quantized Training step [2412.04787, eq. 1 and 5] of one weight.

    Args:
        codes: uint8 [rows, cols / codes per byte], contiguous; overwritten.
        steps: FP32 [rows, 1], contiguous: distance of two grid points.
        grid: What the codes are.
        grad: FP32 or BF16, rows x cols elements, contiguous; only read.
        moments: By the names of one of :data:`FORMS`, contiguous; ``ranges`` is [groups of 128, 4].
            Overwritten.
        numbers: decay, move, beta2, rest1, rest2, eps, as ``megafp4.optim.dqt.GridNumbers`` defines
            them.
        draw: Random bits.
        scale: FP32 [1] on the device; multiplies the gradient.
        skip: FP32 [1] on the device; unless it is 0 nothing changes.

    Returns:
        int64 [3]: codes that changed, codes at an end of the grid, and weights whose new value was
        not finite, which kept their codes.

    Raises:
        ValueError: :func:`fits` is false, or a tensor is not as it says.
    """
    coat, cols = "ranges" in moments, codes.shape[1] * grid.per_byte
    _check_all(codes, steps, grid, grad, moments, draw)
    groups = codes.shape[0] * cols // GROUP
    programs = triton.cdiv(groups, _ROWS)
    if not programs:
        return torch.zeros(3, dtype=torch.int64, device=codes.device)
    counts = torch.empty(3, programs, dtype=torch.int32, device=codes.device)
    kept = [moments[kind] for kind in ("exp_avg", "exp_avg_sq")]
    with torch.cuda.device_of(codes):
        _grid_kernel[(programs,)](
            codes,
            steps,
            draw.lines,
            grad,
            *(one.view(torch.uint8) if coat else one for one in kept),
            moments["ranges"].view(torch.int64) if coat else counts,
            counts,
            torch.ones(1, device=codes.device) if scale is None else scale,
            torch.zeros(1, device=codes.device) if skip is None else skip,
            draw.seed & 0xFFFFFFFF,
            draw.seed >> 32 & 0xFFFFFFFF,
            draw.step,
            draw.stream,
            draw.first_col // 4,
            groups,
            cols // GROUP,
            *numbers,
            COAT=coat,
            NATIVE=has_fp8_conversions(codes.device),
            BITS=grid.bits,
            PER_BYTE=grid.per_byte,
            LOW=grid.low,
            HIGH=grid.high,
            ROWS=_ROWS,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # every product and sum is rounded, as specified
        )
    return counts.sum(1)


def _check_all(
    codes: Tensor,
    steps: Tensor,
    grid: Grid,
    grad: Tensor,
    moments: Mapping[str, Tensor],
    draw: Draw,
) -> None:
    rows, cols = codes.shape[0], codes.shape[1] * grid.per_byte
    if not fits((rows, cols), draw.first_col):
        raise ValueError(
            f"a grid weight has {cols} columns from column {draw.first_col} on: give a multiple of "
            f"{GROUP} columns that begins at a multiple of 4"
        )
    _check(codes, torch.uint8, codes.numel(), "codes")
    _check(steps, torch.float32, rows, "steps")
    _check(draw.lines, torch.int32, rows, "lines")
    wanted = grad.dtype if grad.dtype == torch.bfloat16 else torch.float32
    _check(grad, wanted, rows * cols, "a gradient")
    for kind, dtype in FORMS["coat" if "ranges" in moments else "fp32"].items():
        count = rows * cols // GROUP * 4 if kind == "ranges" else rows * cols
        _check(moments[kind], dtype, count, kind)


def _check(tensor: Tensor, dtype: torch.dtype, count: int, what: str) -> None:
    if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_contiguous():
        raise ValueError(
            f"{what} is {tensor.dtype} of shape {list(tensor.shape)} and strides "
            f"{list(tensor.stride())}: give a contiguous {dtype} tensor of {count} elements"
        )
