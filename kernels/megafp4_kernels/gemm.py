"""FP8 GEMM on Hopper's tensor cores: both operands K-major, any pairing of E4M3 and E5M2.

The kernel is ``cuda/gemm.cu``. cuBLASLt refuses E5M2 x E5M2, which MXFP4's folded operands need.
Products are summed in the tensor core's FP32 accumulator, with fewer bits than FP32 has.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megafp4_kernels.driver import Kernel, load, sm_count, tensor_map
from megafp4_kernels.gemm_arguments import (
    FP8,
    SCHEMA,
    Operands,
    Slope,
    check_operands,
    check_result,
    gather,
)

_TYPES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_FLOATS = {torch.float32: "FP32", torch.bfloat16: "BF16"}
_TILE_M = _TILE_K = 128  # as in gemm.cu; FP8, so one element is one byte
_THREADS = 384
_COLUMN_BYTES = 128 * 4  # what one warpgroup keeps of scale_b and bias
_STAGING_BYTES = 2 * 64 * 128  # what one warpgroup keeps of the result
_GROUP = 8  # 4 and 16 measure the same within 1 %, 32 is slower


def gemm(
    a: Tensor,
    b: Tensor,
    *,
    scale_a: Tensor,
    scale_b: Tensor,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    accumulate: bool = False,
    slope: Slope | None = None,
    squares: Tensor | None = None,
    chunk: int = 0,
) -> Tensor:
    """Compute (alpha * scale_a * scale_b * (a b^T) + bias) * slope in FP32, rounded once.

    Nothing waits for the GPU; scales are read from device memory.

    Args:
        a: [M, K], float8_e4m3fn or float8_e5m2, contiguous along K; K is a multiple of 16.
        b: [N, K], likewise; the pairing is free.
        scale_a: FP32 [1] or [M].
        scale_b: FP32 [1] or [N].
        alpha: Factor of the product.
        bias: FP32 or BF16 [N].
        out_dtype: bfloat16 or float32, where ``out`` is not given.
        out: Contiguous [M, N] to write to.
        accumulate: Add to ``out``, which must be FP32.
        slope: The DGE derivative to multiply by, at M x N weights.
        squares: FP64, of :func:`~megafp4_kernels.gemm_arguments.squares_shape`, for the sums of
            squares of the blocks of an FP32 result, as they are stored. The same call always finds
            the same bits; squares beyond FP32's range are no exception.
        chunk: Multiple of 128, or 0. The tensor core keeps 14 bits or so of the products that it
            adds, so that the error of a sum grows with K. With K above ``chunk``, sums of so many
            products are added in FP32.

    Returns:
        [M, N]: ``out``, or a new tensor.

    Raises:
        ValueError: Shapes, dtypes, strides or devices do not fit together.
        RuntimeError: No Hopper GPU or no cuda-bindings.
    """
    operands = gather(a, b, scale_a, scale_b, alpha, bias, slope)
    if out is None:
        if accumulate:
            raise ValueError("accumulate adds to out, and no out was given: pass an FP32 tensor")
        if squares is None:
            return torch.ops.megafp4.gemm.default(*operands, chunk, out_dtype)
        out = a.new_empty(operands.shape, dtype=out_dtype)
    torch.ops.megafp4.gemm_out.default(*operands, chunk, out, accumulate, squares)
    return out


def _gemm(*arguments: Any) -> Tensor:
    out = _new_result(*arguments)
    _launch(Operands(*arguments[:-2]), arguments[-2], out)
    return out


def _new_result(*arguments: Any) -> Tensor:
    o = Operands(*arguments[:-2])
    _check(o, arguments[-2])
    out = o.a.new_empty(o.shape, dtype=arguments[-1])
    check_result(o, out)
    return out


def _gemm_out(*arguments: Any) -> None:
    _check_all(*arguments)
    *operands, chunk, out, accumulate, squares = arguments
    _launch(Operands(*operands), chunk, out, accumulate, squares)
    torch.autograd.graph.increment_version([out] if squares is None else [out, squares])


def _check_all(*arguments: Any) -> None:
    *operands, chunk, out, accumulate, squares = arguments
    o = Operands(*operands)
    _check(o, chunk)
    check_result(o, out, accumulate, squares)


def _check(o: Operands, chunk: int) -> None:
    check_operands(o, FP8, rows_apart=True)
    if not o.a.is_cuda:
        raise ValueError(f"a is on {o.a.device}: put all arguments on one CUDA device")
    if chunk < 0 or chunk % _TILE_K:
        raise ValueError(f"chunk is {chunk}: give a multiple of {_TILE_K}, or 0 for none")


# Defined without torch.library.custom_op, which takes 90 microseconds a call to this one's 6.
for _name, _signature, _implementation, _fake in (
    ("gemm", f"({SCHEMA}, int chunk, ScalarType out_dtype) -> Tensor", _gemm, _new_result),
    (
        "gemm_out",
        f"({SCHEMA}, int chunk, Tensor(a!) out, bool accumulate, Tensor(b!)? squares) -> ()",
        _gemm_out,
        _check_all,
    ),
):
    torch.library.define(f"megafp4::{_name}", _signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"megafp4::{_name}", "CompositeExplicitAutograd", _implementation)
    torch.library.register_fake(f"megafp4::{_name}", _fake)


class _Plan(NamedTuple):
    """A compiled kernel and how to launch it."""

    kernel: Kernel
    grid: tuple[int, int, int]
    shared_bytes: int
    box_b: tuple[int, int]


def _tile(rows: int, columns: int, sms: int) -> tuple[int, int]:
    """Choose (columns of a tile, CTAs of a cluster).

    Two CTAs share b's tile where there are rows for both. A tile of 128 columns takes a little
    more than half the time of one of 256 and pays where it needs fewer rounds over the GPU.
    """
    cluster = 2 if rows > _TILE_M else 1

    def rounds(tile_n: int) -> int:
        tiles = -(-rows // (_TILE_M * cluster)) * -(-columns // tile_n)
        return -(-tiles // (sms // cluster))

    return (128 if 1.15 * rounds(128) < 2 * rounds(256) else 256), cluster


@functools.lru_cache(maxsize=4096)
def _plan(
    rows: int,
    columns: int,
    a_type: torch.dtype,
    b_type: torch.dtype,
    out: str,
    direct: bool,
    scale_b_rows: bool,
    bias: torch.dtype | None,
    slope: torch.dtype | None,
    squares: bool,
    chunk: int,
    device: int,
) -> _Plan:
    sms = sm_count(device)
    tile_n, cluster = _tile(rows, columns, sms)
    stages = 4 if tile_n == 256 else 6
    defines = (
        ("A_TYPE", _TYPES[a_type]),
        ("B_TYPE", _TYPES[b_type]),
        ("TILE_N", tile_n),
        ("STAGES", stages),
        ("CLUSTER", cluster),
        ("GROUP", _GROUP),
        ("OUT", out),
        ("DIRECT", int(direct)),
        ("SCALE_B_ROWS", int(scale_b_rows)),
        ("BIAS", _FLOATS[bias] if bias else 0),
        ("SLOPE", _FLOATS[slope] if slope else 0),
        ("SQUARES", int(squares)),
        ("CHUNK", chunk // _TILE_K),
    )
    ring = stages * (_TILE_M + tile_n) * _TILE_K
    tiles = -(-rows // (_TILE_M * cluster)) * -(-columns // tile_n)
    return _Plan(
        load("gemm.cu", "gemm", defines, device),
        (min(tiles, sms // cluster) * cluster, 1, 1),
        ring + 2 * (_STAGING_BYTES + _COLUMN_BYTES) + 2 * 8 * stages,
        (tile_n // cluster, _TILE_K),
    )


def _launch(
    o: Operands,
    chunk: int,
    out: Tensor,
    accumulate: bool = False,
    squares: Tensor | None = None,
) -> None:
    (rows, columns), depth = o.shape, o.a.shape[1]
    if rows * columns == 0:
        return
    size = out.element_size()
    direct = columns * size % 16 != 0 or out.data_ptr() % 16 != 0
    if o.weight is not None:
        direct = direct or o.weight.data_ptr() % 8 != 0  # the slope reads its weights in pairs
    plan = _plan(
        rows,
        columns,
        o.a.dtype,
        o.b.dtype,
        "OUT_ADD" if accumulate else "OUT_BF16" if size == 2 else "OUT_FP32",
        direct,
        o.scale_b.shape[0] > 1,
        o.bias.dtype if o.bias is not None else None,
        o.weight.dtype if o.weight is not None else None,
        squares is not None,
        chunk if chunk < depth else 0,
        o.a.device.index,
    )
    map_a = tensor_map(o.a, (_TILE_M, _TILE_K), 128)
    plan.kernel.launch(
        plan.grid,
        _THREADS,
        plan.shared_bytes,
        map_a,
        tensor_map(o.b, plan.box_b, 128),
        map_a if direct else tensor_map(out, (64, 128 // size), 128),
        rows,
        columns,
        depth,
        o.alpha,
        o.scale_a,
        int(o.scale_a.shape[0] > 1),
        o.scale_b,
        o.bias,
        o.weight,
        o.weight_scale,
        int(o.weight_scale is not None and o.weight_scale.shape[0] > 1),
        1.0 / o.k - 1.0,
        1.0 / o.k,
        o.cap,
        squares,
        out,
    )
