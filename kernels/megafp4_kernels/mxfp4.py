"""MXFP4 on Hopper: signs, Hadamard transform, scales, rounding and folding into FP8 in one kernel.

The kernel is ``cuda/mxfp4.cu``; it equals ``megafp4.numerics`` bit for bit, except that with a
Hadamard transform of BF16 input the tensor core sums in another order, so that a code may differ
where a value lies within FP32 rounding of a threshold.

Folding: E2M1 times 2^(e - base), e the block's exponent, is exact in E5M2 for e - base from -15 to
13, and the tensor's single scale 2^base goes to the GEMM's epilogue. The base is kept from call to
call in a *window*, an int32 [8] CUDA tensor, zero to begin with and owned by one operand:

=====  ==========================================================================
field  meaning
=====  ==========================================================================
0      1 once the base has been chosen
1      base
2      1 between the two launches if the base has just moved; else 0
3, 4   the running launch's largest E8M0 byte + 1 and its count of finished CTAs
5      blocks *raised* so far: e < base - 15, encoded with the exponent base - 15
6      how often the base was moved
7      the running launch's raised blocks
=====  ==========================================================================

A base is the largest exponent - 10, at least -126. It moves when the largest exponent leaves
[base + 4, base + 13]; a second launch then quantizes again and otherwise returns at once. Nothing
waits for the GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megafp4_kernels.driver import load, sm_count, tensor_map
from megafp4_kernels.mxfp4_variants import OUTPUTS, ROUNDINGS, THREADS, TILE, config

BLOCK = 32
WINDOW = 8
RAISED, MOVED = 5, 6  # fields of a window

_GRANULES = TILE // 16  # entries of runs for the lines of a tile
_HADAMARD = (0, 16, 32, 64, 128)
_SOURCES = (torch.bfloat16, torch.float32)


class Plan(NamedTuple):
    """How one output is quantized.

    Attributes:
        hadamard: Block of the random Hadamard transform: 0 (none), 16, 32, 64 or 128.
        rounding: "stochastic", "nearest-even" or "nearest-away".
        prescale: Factor after the scale is taken, 0 < prescale <= 1.
        stream: Word 3 of the dither's Philox counter.
        sign_stream: Word 3 of the signs' Philox counter.
        sign_step: Step of the signs; -1: the position's.
        output: "folded" or "packed".
        window: State of a folded operand, int32 [8]; None: a fresh one, so that both launches run.
    """

    hadamard: int = 0
    rounding: str = "nearest-even"
    prescale: float = 1.0
    stream: int = 0
    sign_stream: int = 0
    sign_step: int = -1
    output: str = "folded"
    window: Tensor | None = None


class Folded(NamedTuple):
    """data: float8_e5m2 [lines, K] (float8_e4m3fn of an E4M3Plan); scale: FP32 [1]."""

    data: Tensor
    scale: Tensor


class Packed(NamedTuple):
    """codes: uint8 [lines, K / 2], even index in the low nibble; scales: uint8 [lines, K / 32]."""

    codes: Tensor
    scales: Tensor


class E4M3Plan(NamedTuple):
    """Row output in E4M3: the codes of x * (1 / scale), saturating; scale is FP32 [1]."""

    scale: Tensor


def quantize(
    x: Tensor,
    position: Tensor,
    row: Plan | E4M3Plan | None,
    col: Plan | None,
    *,
    row_runs: Tensor | None = None,
    col_runs: Tensor | None = None,
    col_from_e4m3: Tensor | None = None,
    col_sums: Tensor | None = None,
) -> tuple[Folded | Packed | None, Folded | Packed | None]:
    """Quantize a matrix along its rows, its columns or both, in one pass over it.

    Args:
        x: BF16 or FP32 [rows, cols], contiguous along the columns, its rows 16-byte aligned.
        position: int64 CUDA [4]: seed (as signed 64 bits), optimizer step, first row, first column
            in the whole of which x may be a slice; what is contracted begins at a multiple of 16.
        row: For the output of lines = rows, contracted over the columns.
        col: For the output of lines = columns, contracted over the rows (the transpose).
        row_runs: Where the rows lie in the whole, see :mod:`megafp4_kernels.philox`; None if they
            are contiguous there.
        col_runs: Where the columns lie.
        col_from_e4m3: FP32 [1]: the col output quantizes the value of x's E4M3 code at this scale
            instead of x.
        col_sums: FP32 [cols], becomes the sums of x itself over its rows, always added in the same
            order; for BF16 x whose col plan has a Hadamard transform, without col_from_e4m3.

    Returns:
        The row and the col output: Folded or Packed, None where there is no plan.

    Raises:
        ValueError: A plan, shape, dtype or device that the kernel cannot serve.
        RuntimeError: No Hopper GPU or no cuda-bindings.
    """
    first, second = _arguments(row, x), _arguments(col, x)
    operator = torch.ops.megafp4.mxfp4_quantize.default
    out = operator(x, position, *first, *second, row_runs, col_runs, col_from_e4m3, col_sums)
    return _result(row, out[0], out[1]), _result(col, out[2], out[3])


def unpack(packed: Packed, window: Tensor | None = None) -> Folded:
    """Fold packed MXFP4; the base comes from the largest scale.

    Args:
        packed: Contiguous CUDA codes and scales.
        window: int32 [8], whose count of raised blocks grows by the blocks more than 25 octaves
            below the largest, whose values are rounded to E5M2.

    Raises:
        ValueError: Shapes or dtypes that do not belong together.
        RuntimeError: No Hopper GPU or no cuda-bindings.
    """
    return Folded(*torch.ops.megafp4.mxfp4_unpack.default(*packed, window))


class _Side(NamedTuple):
    """A plan in the order of the operator's schema."""

    output: str
    hadamard: int
    rounding: str
    prescale: float
    streams: list[int]
    window: Tensor | None
    scale: Tensor | None


_SIDE = (
    "str {0}_output, int {0}_hadamard, str {0}_rounding, float {0}_prescale, int[] {0}_streams, "
    "Tensor({1}!)? {0}_window, Tensor? {0}_scale"
)
_SCHEMA = (
    f"(Tensor x, Tensor position, {_SIDE.format('row', 'a')}, {_SIDE.format('col', 'b')}, "
    "Tensor? row_runs, Tensor? col_runs, Tensor? e4m3_scale, Tensor(c!)? col_sums) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_FIELDS = len(_Side._fields)


def _arguments(plan: Plan | E4M3Plan | None, x: Tensor) -> _Side:
    if plan is None or isinstance(plan, E4M3Plan):
        output, scale = ("e4m3", plan.scale) if plan else ("", None)
        return _Side(output, 0, "nearest-even", 1.0, [0, 0, -1], None, scale)
    window = plan.window
    if plan.output == "folded" and window is None:
        window = torch.zeros(WINDOW, dtype=torch.int32, device=x.device)
    return _Side(
        plan.output,
        plan.hadamard,
        plan.rounding,
        float(plan.prescale),
        [plan.stream, plan.sign_stream, plan.sign_step],
        window if plan.output == "folded" else None,
        None,
    )


def _result(plan: Plan | E4M3Plan | None, data: Tensor, scale: Tensor) -> Folded | Packed | None:
    if plan is None:
        return None
    if isinstance(plan, E4M3Plan):
        return Folded(data, plan.scale)
    return Folded(data, scale) if plan.output == "folded" else Packed(data, scale)


class _Rest(NamedTuple):
    """The operator's arguments after both sides."""

    row_runs: Tensor | None
    col_runs: Tensor | None
    e4m3_scale: Tensor | None
    sums: Tensor | None


def _split(arguments: tuple[Any, ...]) -> tuple[_Side, _Side, _Rest]:
    row, col = _Side(*arguments[:_FIELDS]), _Side(*arguments[_FIELDS : 2 * _FIELDS])
    return row, col, _Rest(*arguments[2 * _FIELDS :])


def _fake_quantize(x: Tensor, position: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    row, col, (row_runs, col_runs, e4m3_scale, sums) = _split(arguments)
    if x.ndim != 2 or x.dtype not in _SOURCES or (x.numel() and x.stride(1) != 1):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} with strides {x.stride()}: give a bfloat16 or float32 "
            "matrix that is contiguous along its columns"
        )
    rows, cols = x.shape
    if cols * x.element_size() % 16 or x.stride(0) * x.element_size() % 16:
        raise ValueError(
            f"a row of x has {cols} elements of {x.dtype} at a stride of {x.stride(0)}: make both "
            f"multiples of {16 // x.element_size()}, so that rows are 16-byte aligned"
        )
    _check_tensor("position", position, x, torch.int64, 4)
    for name, runs, count in (("row_runs", row_runs, rows), ("col_runs", col_runs, cols)):
        if runs is not None:
            _check_tensor(name, runs, x, torch.int32, _GRANULES * -(-count // TILE))
    if e4m3_scale is not None:
        _check_tensor("col_from_e4m3", e4m3_scale, x, torch.float32, 1)
    if sums is not None:
        _check_tensor("col_sums", sums, x, torch.float32, cols)
        if not col.hadamard or x.dtype != torch.bfloat16 or e4m3_scale is not None:
            what = f"{x.dtype} x and a Hadamard transform of {col.hadamard} over its rows"
            raise ValueError(f"col_sums with {what}: give bfloat16, one, and no col_from_e4m3")
    _check_side("row", row, x, cols)
    _check_side("col", col, x, rows)
    return *_empty(row, x, rows, cols), *_empty(col, x, cols, rows)


def _empty(side: _Side, x: Tensor, lines: int, length: int) -> tuple[Tensor, Tensor]:
    """The output's two tensors; empty ones where there is nothing to return."""
    if side.output == "folded":
        data = x.new_empty((lines, length), dtype=torch.float8_e5m2)
        return data, x.new_empty((1,), dtype=torch.float32)
    if side.output == "packed":
        codes = x.new_empty((lines, length // 2), dtype=torch.uint8)
        return codes, x.new_empty((lines, length // BLOCK), dtype=torch.uint8)
    if side.output == "e4m3":
        data = x.new_empty((lines, length), dtype=torch.float8_e4m3fn)
        return data, x.new_empty((0,), dtype=torch.float32)
    return x.new_empty((0,), dtype=torch.uint8), x.new_empty((0,), dtype=torch.uint8)


def _check_tensor(name: str, t: Tensor, x: Tensor, dtype: torch.dtype, length: int) -> None:
    if t.dtype != dtype or t.shape != (length,) or t.device != x.device:
        raise ValueError(
            f"{name} is {t.dtype} {list(t.shape)} on {t.device}: give {dtype} [{length}] on "
            f"{x.device}, where x is"
        )


def _check_side(name: str, side: _Side, x: Tensor, length: int) -> None:
    """Raise ValueError, in one sentence, for a plan that the kernel cannot serve."""
    for field, value, allowed in (
        ("output", side.output, OUTPUTS),
        ("hadamard", side.hadamard, _HADAMARD),
        ("rounding", side.rounding, ROUNDINGS),
    ):
        if value not in allowed:
            choices = ", ".join(str(choice) for choice in allowed if choice != "")
            raise ValueError(f"{field} of the {name} plan is {value!r}: choose one of {choices}")
    if not 0.0 < side.prescale <= 1.0:
        raise ValueError(f"prescale of the {name} plan is {side.prescale}: give a number in (0, 1]")
    if not side.output:
        return
    unit = 16 if side.output == "e4m3" else max(BLOCK, side.hadamard)
    if length % unit:
        raise ValueError(
            f"the {name} output contracts over {length} elements: pad x to a multiple of {unit}"
        )
    if side.scale is not None:
        _check_tensor("the E4M3 scale", side.scale, x, torch.float32, 1)
    if side.window is not None:
        _check_tensor(f"window of the {name} plan", side.window, x, torch.int32, WINDOW)


def _quantize(x: Tensor, position: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    outputs = _fake_quantize(x, position, *arguments)
    row, col, (row_runs, col_runs, e4m3_scale, sums) = _split(arguments)
    rows, cols = x.shape
    if not (row.output or col.output):
        return outputs
    if not rows * cols:
        for side, scale in ((row, outputs[1]), (col, outputs[3])):
            if side.output == "folded":
                scale.fill_(1.0)
        if sums is not None:
            sums.zero_()
        return outputs
    kinds = [(s.output, s.hadamard, s.rounding, s.prescale > 0.75) for s in (row, col)]
    fp32, from_e4m3 = x.dtype == torch.float32, e4m3_scale is not None
    with_runs = row_runs is not None, col_runs is not None
    flags = from_e4m3, sums is not None, with_runs
    kernel, ctas, shared = config(fp32, *kinds, *flags, x.device.index)
    source = tensor_map(x, (TILE, 128 // x.element_size()), 128)
    tiles_y = -(-rows // TILE)
    partial = None if sums is None else x.new_empty((tiles_y, cols), dtype=torch.float32)
    arguments = (
        *(source, rows, cols, position, row_runs, col_runs, e4m3_scale),
        *_side_arguments(row, outputs[0], outputs[1]),
        *_side_arguments(col, outputs[2], outputs[3]),
        *(partial, sums),
    )
    grid = (min(tiles_y * -(-cols // TILE), ctas), 1, 1)
    kernel.launch(grid, THREADS, shared, *arguments, 0)
    if "folded" in (row.output, col.output) or sums is not None:
        # Adds up col_sums, and returns at once unless a window's base has moved.
        kernel.launch(grid, THREADS, shared, *arguments, 1)
    for changed in (row.window, col.window, sums):
        if changed is not None:
            torch.autograd.graph.increment_version(changed)
    return outputs


def _side_arguments(side: _Side, data: Tensor, scale: Tensor) -> tuple[Any, ...]:
    if not side.output:
        return (None, None, None, None, 1.0, 0, 0, -1)
    return (
        data,
        scale if side.output == "packed" else None,
        side.scale if side.output == "e4m3" else scale,
        side.window,
        side.prescale,
        *((word + 2**31) % 2**32 - 2**31 for word in side.streams),  # as int32
    )


def _fake_unpack(codes: Tensor, scales: Tensor, window: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (codes.shape[0], codes.shape[1] * 2 // BLOCK) if codes.ndim == 2 else None
    for n, t in (("codes", codes), ("scales", scales)):
        if t.dtype != torch.uint8 or not t.is_contiguous():
            raise ValueError(f"{n} is {t.dtype} with strides {t.stride()}: give contiguous uint8")
    if shape is None or codes.shape[1] * 2 % BLOCK or scales.shape != shape:
        raise ValueError(
            f"codes are {list(codes.shape)} and scales {list(scales.shape)}: give [lines, K / 2] "
            "and [lines, K / 32], K a multiple of 32"
        )
    if window is not None:
        _check_tensor("window", window, codes, torch.int32, WINDOW)
    data = codes.new_empty((shape[0], codes.shape[1] * 2), dtype=torch.float8_e5m2)
    return data, codes.new_empty((1,), dtype=torch.float32)


def _unpack(codes: Tensor, scales: Tensor, window: Tensor | None) -> tuple[Tensor, Tensor]:
    data, scale = _fake_unpack(codes, scales, window)
    if not (blocks := scales.numel()):
        return data, scale.fill_(1.0)
    device = codes.device.index
    state = torch.zeros(1, dtype=torch.int32, device=codes.device)
    most = min(ctas := -(-blocks // THREADS), 8 * sm_count(device))
    find, fold = (load("mxfp4_unpack.cu", name, (), device) for name in ("largest", "unpack"))
    find.launch((most, 1, 1), THREADS, 0, scales, blocks, state)
    fold.launch((ctas, 1, 1), THREADS, 0, codes, scales, blocks, state, data, scale, window)
    if window is not None:
        torch.autograd.graph.increment_version(window)
    return data, scale


# Defined without torch.library.custom_op, whose call takes tens of microseconds more.
for _name, _signature, _run, _fake in (
    ("mxfp4_quantize", _SCHEMA, _quantize, _fake_quantize),
    (
        "mxfp4_unpack",
        "(Tensor codes, Tensor scales, Tensor(a!)? window) -> (Tensor, Tensor)",
        _unpack,
        _fake_unpack,
    ),
):
    torch.library.define(f"megafp4::{_name}", _signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"megafp4::{_name}", "CompositeExplicitAutograd", _run)
    torch.library.register_fake(f"megafp4::{_name}", _fake)
