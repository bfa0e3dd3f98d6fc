"""FP8 GEMM on Hopper's tensor cores: both operands K-major, any pairing of E4M3 and E5M2.

The kernel is ``cuda/gemm.cu``. cuBLASLt refuses E5M2 x E5M2, which MXFP4's folded operands need.
Products are summed in the tensor core's FP32 accumulator.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megafp4_kernels.driver import Kernel, load, sm_count, tensor_map

_TYPES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_FLOATS = {torch.float32: "FP32", torch.bfloat16: "BF16"}
_TILE_M = _TILE_K = 128  # as in gemm.cu; FP8, so one element is one byte
_THREADS = 384
_COLUMN_BYTES = 128 * 4  # what one warpgroup keeps of scale_b and bias
_STAGING_BYTES = 2 * 64 * 128  # what one warpgroup keeps of the result
_GROUP = 8  # 4 and 16 measure the same within 1 %, 32 is slower


class Slope(NamedTuple):
    """Multiply the result by the DGE curve's derivative [arXiv 2501.17116, eq. 8].

    Attributes:
        weight: [M, N], FP32 or BF16, contiguous.
        scale: FP32 [1] or [M]; the derivative is taken at weight * (1 / scale).
        k: Sharpness of the curve.
        cap: Largest derivative.
    """

    weight: Tensor
    scale: Tensor
    k: float = 5.0
    cap: float = 3.0


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

    Returns:
        [M, N]: ``out``, or a new tensor.

    Raises:
        ValueError: Shapes, dtypes, strides or devices do not fit together.
        RuntimeError: No Hopper GPU or no cuda-bindings.
    """
    weight, weight_scale, k, cap = slope or (None, None, 1.0, 1.0)
    operands = _Operands(
        a, b, scale_a, scale_b, float(alpha), bias, weight, weight_scale, float(k), float(cap)
    )
    if out is None:
        if accumulate:
            raise ValueError("accumulate adds to out, and no out was given: pass an FP32 tensor")
        return torch.ops.megafp4.gemm.default(*operands, out_dtype)
    torch.ops.megafp4.gemm_out.default(*operands, out, accumulate)
    return out


class _Operands(NamedTuple):
    """The arguments that both custom operators share, in the order of their schema."""

    a: Tensor
    b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    alpha: float
    bias: Tensor | None
    weight: Tensor | None
    weight_scale: Tensor | None
    k: float
    cap: float


_SCHEMA = (
    "Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, float alpha, Tensor? bias, "
    "Tensor? weight, Tensor? weight_scale, float k, float cap"
)


def _gemm(*arguments: Any) -> Tensor:
    out = _new_result(*arguments)
    _launch(_Operands(*arguments[:-1]), out, accumulate=False)
    return out


def _new_result(*arguments: Any) -> Tensor:
    o = _Operands(*arguments[:-1])
    _check_operands(o)
    out = o.a.new_empty((o.a.shape[0], o.b.shape[0]), dtype=arguments[-1])
    _check_result(o, out, accumulate=False)
    return out


def _gemm_out(*arguments: Any) -> None:
    _check_all(*arguments)
    _launch(_Operands(*arguments[:-2]), arguments[-2], arguments[-1])
    torch.autograd.graph.increment_version(arguments[-2])


def _check_all(*arguments: Any) -> None:
    o = _Operands(*arguments[:-2])
    _check_operands(o)
    _check_result(o, arguments[-2], arguments[-1])


# Defined without torch.library.custom_op, which takes 90 microseconds a call to this one's 6.
for _name, _signature, _run, _fake in (
    ("gemm", f"({_SCHEMA}, ScalarType out_dtype) -> Tensor", _gemm, _new_result),
    ("gemm_out", f"({_SCHEMA}, Tensor(a!) out, bool accumulate) -> ()", _gemm_out, _check_all),
):
    torch.library.define(f"megafp4::{_name}", _signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"megafp4::{_name}", "CompositeExplicitAutograd", _run)
    torch.library.register_fake(f"megafp4::{_name}", _fake)


def _check_operands(o: _Operands) -> None:
    """Raise ValueError, in one sentence, for operands that the kernel cannot multiply."""
    for name, operand in (("a", o.a), ("b", o.b)):
        if operand.dtype not in _TYPES or operand.ndim != 2:
            raise ValueError(
                f"{name} is {operand.dtype} {list(operand.shape)}: give a matrix of float8_e4m3fn "
                "or float8_e5m2"
            )
        if operand.stride(1) != 1 or (operand.shape[0] > 1 and operand.stride(0) % 16):
            raise ValueError(
                f"{name} has strides {operand.stride()}: make it contiguous along K, with rows "
                "that are a multiple of 16 bytes apart"
            )
    rows, k = o.a.shape
    columns, k_b = o.b.shape
    if k_b != k or k % 16 or not k:
        raise ValueError(
            f"K is {k} in a and {k_b} in b: give one contraction length that is a positive "
            "multiple of 16"
        )
    _check_vector("scale_a", o.scale_a, (1, rows), (torch.float32,))
    _check_vector("scale_b", o.scale_b, (1, columns), (torch.float32,))
    if o.bias is not None:
        _check_vector("bias", o.bias, (columns,), tuple(_FLOATS))
    for tensor in o:
        if isinstance(tensor, Tensor) and (tensor.device != o.a.device or not tensor.is_cuda):
            raise ValueError(
                f"a is on {o.a.device} and another argument on {tensor.device}: put all of them "
                "on one CUDA device"
            )


def _check_result(o: _Operands, out: Tensor, accumulate: bool) -> None:
    shape = (o.a.shape[0], o.b.shape[0])
    if out.dtype not in _FLOATS or out.shape != shape or not out.is_contiguous():
        raise ValueError(
            f"the result is {out.dtype} {list(out.shape)} with strides {out.stride()}: give "
            f"contiguous float32 or bfloat16 of shape {list(shape)}"
        )
    if out.device != o.a.device:
        raise ValueError(f"a is on {o.a.device} and out on {out.device}: put both on one device")
    if accumulate and out.dtype != torch.float32:
        raise ValueError(f"accumulate adds in FP32 and out is {out.dtype}: give a float32 out")
    if o.weight is None or o.weight_scale is None:
        return
    if o.k <= 0:
        raise ValueError(f"the slope's k is {o.k}: give a positive sharpness")
    weight = o.weight
    if weight.dtype not in _FLOATS or weight.shape != shape or not weight.is_contiguous():
        raise ValueError(
            f"the slope's weight is {weight.dtype} {list(weight.shape)}: give contiguous float32 "
            f"or bfloat16 of the result's shape {list(shape)}"
        )
    _check_vector("the slope's scale", o.weight_scale, (1, shape[0]), (torch.float32,))


def _check_vector(
    name: str, vector: Tensor, lengths: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if (
        vector.dtype not in dtypes
        or vector.ndim != 1
        or vector.shape[0] not in lengths
        or not vector.is_contiguous()
    ):
        allowed = " or ".join(str([length]) for length in dict.fromkeys(lengths))
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} is {vector.dtype} {list(vector.shape)}: give contiguous {kinds} {allowed}"
        )


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
    )
    ring = stages * (_TILE_M + tile_n) * _TILE_K
    tiles = -(-rows // (_TILE_M * cluster)) * -(-columns // tile_n)
    return _Plan(
        load("gemm.cu", "gemm", defines, device),
        (min(tiles, sms // cluster) * cluster, 1, 1),
        ring + 2 * (_STAGING_BYTES + _COLUMN_BYTES) + 2 * 8 * stages,
        (tile_n // cluster, _TILE_K),
    )


def _launch(o: _Operands, out: Tensor, accumulate: bool) -> None:
    (rows, depth), columns = o.a.shape, o.b.shape[0]
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
        out,
    )
