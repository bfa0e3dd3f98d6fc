"""MXFP4 times MXFP4 on Blackwell's block-scaled tensor cores (sm_100), in Triton.

``tl.dot_scaled`` becomes ``tcgen05.mma ... kind::mxf4.block_scale.scale_vec::2X``: codes stay
packed, scales go to tensor memory, the sum is FP32. On other GPUs Triton decodes to BF16 in the
kernel and multiplies that, which shows that the addressing is right and is no faster than BF16.

Codes are loaded by TMA as bytes; scales in the order of :mod:`megafp4_kernels.swizzle`, 512
contiguous bytes for 128 lines by 4 blocks. Alpha, bias, accumulation: one FP32 epilogue.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megafp4_kernels.swizzle import swizzled_length

BLOCK = 32
# Rows, columns and contracted elements of a tile, and stages of its pipeline.
TILE = {"M": 128, "N": 256, "K": 256}
STAGES = 4
WARPS = 4
# Where codes are decoded in the kernel, BF16 operands and the sum must fit beside them.
_SMALL_TILE = {"M": 128, "N": 128, "K": 128}
E2M1 = tl.constexpr("e2m1")
_GROUP = 8  # tiles along M that are walked before the next along N


@triton.jit
def mxfp4_kernel(
    a,
    b,
    scales_a,
    scales_b,
    bias,
    out,
    rows,
    columns,
    alpha,
    DEPTH: tl.constexpr,
    BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of the result; a, b: descriptors of [lines, DEPTH / 2] bytes."""
    WIDE: tl.constexpr = (DEPTH + 127) // 128  # tiles of scales along the contraction axis
    STEP: tl.constexpr = K // 128  # and of one iteration
    tiles_m = tl.cdiv(rows, M)
    tiles_n = tl.cdiv(columns, N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (tl.program_id(0) % (GROUP * tiles_n)) % height
    tile_n = tl.program_id(0) % (GROUP * tiles_n) // height
    # Rows of scale tiles; beyond the last there are none to read.
    high_a = tile_m * (M // 128) + tl.arange(0, M // 128)
    high_b = tile_n * (N // 128) + tl.arange(0, N // 128)
    some_a = (high_a < tl.cdiv(rows, 128))[:, None]
    some_b = (high_b < tl.cdiv(columns, 128))[:, None]
    index = tl.arange(0, STEP * 512)
    from_a = scales_a + high_a.to(tl.int64)[:, None] * (WIDE * 512) + index[None, :]
    from_b = scales_b + high_b.to(tl.int64)[:, None] * (WIDE * 512) + index[None, :]
    total = tl.zeros((M, N), tl.float32)
    for step in range(0, (DEPTH + K - 1) // K):
        left = ((WIDE - step * STEP) * 512 > index)[None, :]
        factor_a = tl.load(from_a + step * STEP * 512, mask=some_a & left, other=0)
        factor_b = tl.load(from_b + step * STEP * 512, mask=some_b & left, other=0)
        factor_a = factor_a.reshape(M // 128, STEP, 32, 4, 4).trans(0, 3, 2, 1, 4)
        factor_b = factor_b.reshape(N // 128, STEP, 32, 4, 4).trans(0, 3, 2, 1, 4)
        total = tl.dot_scaled(
            a.load([tile_m * M, step * (K // 2)]),
            factor_a.reshape(M, K // 32),
            E2M1,
            b.load([tile_n * N, step * (K // 2)]).T,
            factor_b.reshape(N, K // 32),
            E2M1,
            total,
        )
    m = tile_m * M + tl.arange(0, M)
    n = tile_n * N + tl.arange(0, N)
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    result = total * alpha
    if BIAS:
        result += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    offsets = m.to(tl.int64)[:, None] * columns + n[None, :]
    if ACCUMULATE:
        result += tl.load(out + offsets, mask=mask, other=0.0)
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)


def gemm_mxfp4(
    a: Tensor,
    b: Tensor,
    *,
    scales_a: Tensor,
    scales_b: Tensor,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Compute alpha * (a b^T) + bias of two MXFP4 matrices in FP32, rounded once.

    Args:
        a: uint8 [M, K / 2], two E2M1 codes a byte, even index in the low nibble; K is a multiple
            of 32.
        b: uint8 [N, K / 2], likewise.
        scales_a: E8M0 bytes of a [M, K / 32] as :func:`megafp4_kernels.swizzle.swizzle` orders
            them, uint8 or float8_e8m0fnu.
        scales_b: Those of b.
        alpha: Factor of the product.
        bias: FP32 or BF16 [N].
        out_dtype: bfloat16 or float32, where ``out`` is not given.
        out: Contiguous [M, N] to write to.
        accumulate: Add to ``out``, which must be FP32.

    Returns:
        [M, N]: ``out``, or a new tensor.

    Raises:
        ValueError: Shapes, dtypes, strides or devices do not fit together.
    """
    operands = (a, b, scales_a.view(torch.uint8), scales_b.view(torch.uint8), float(alpha), bias)
    if out is None:
        if accumulate:
            raise ValueError("accumulate adds to out, and no out was given: pass an FP32 tensor")
        return _multiply(*operands, out_dtype)
    _multiply_out(*operands, out, accumulate)
    return out


_SCHEMA = "Tensor a, Tensor b, Tensor scales_a, Tensor scales_b, float alpha, Tensor? bias"


@torch.library.custom_op(
    "megafp4::gemm_mxfp4", mutates_args=(), schema=f"({_SCHEMA}, ScalarType out_dtype) -> Tensor"
)
def _multiply(*arguments: Any) -> Tensor:
    out = _fake_multiply(*arguments)
    _launch(*arguments[:-1], out, accumulate=False)
    return out


@_multiply.register_fake
def _fake_multiply(*arguments: Any) -> Tensor:
    a, b = arguments[:2]
    out = a.new_empty(a.shape[0], b.shape[0], dtype=arguments[-1])
    _check(*arguments[:-1], out, accumulate=False)
    return out


@torch.library.custom_op(
    "megafp4::gemm_mxfp4_out",
    mutates_args=("out",),
    schema=f"({_SCHEMA}, Tensor(a!) out, bool accumulate) -> ()",
)
def _multiply_out(*arguments: Any) -> None:
    _check(*arguments)
    _launch(*arguments)


@_multiply_out.register_fake
def _fake_multiply_out(*arguments: Any) -> None:
    _check(*arguments)


def _check(
    a: Tensor,
    b: Tensor,
    scales_a: Tensor,
    scales_b: Tensor,
    alpha: float,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
) -> None:
    """Raise ValueError, in one sentence, for what the kernel cannot do."""
    for name, codes in (("a", a), ("b", b)):
        if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] % (BLOCK // 2):
            raise ValueError(
                f"{name} is {codes.dtype} {list(codes.shape)}: give uint8 [lines, K / 2] with K a "
                f"multiple of {BLOCK}"
            )
    if a.shape[1] != b.shape[1] or not a.shape[1]:
        raise ValueError(
            f"K is {2 * a.shape[1]} in a and {2 * b.shape[1]} in b: give one positive length"
        )
    for name, codes, scales in (("a", a, scales_a), ("b", b, scales_b)):
        length = swizzled_length(codes.shape[0], 2 * codes.shape[1] // BLOCK)
        if scales.shape != (length,):
            raise ValueError(
                f"scales_{name} has shape {list(scales.shape)}: give the [{length}] bytes that "
                "swizzle() makes"
            )
    if bias is not None and (
        bias.shape != (b.shape[0],) or bias.dtype not in (torch.float32, torch.bfloat16)
    ):
        raise ValueError(
            f"bias is {bias.dtype} {list(bias.shape)}: give float32 or bfloat16 [{b.shape[0]}]"
        )
    kinds = (torch.float32,) if accumulate else (torch.float32, torch.bfloat16)
    if out.shape != (a.shape[0], b.shape[0]) or out.dtype not in kinds:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}: give {' or '.join(map(str, kinds))} "
            f"[{a.shape[0]}, {b.shape[0]}]"
        )
    for name, tensor in zip(
        ("a", "b", "scales_a", "scales_b", "bias", "out"),
        (a, b, scales_a, scales_b, bias, out),
        strict=True,
    ):
        if tensor is not None and (tensor.device != a.device or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} is on {tensor.device} with strides {list(tensor.stride())}: give a "
                f"contiguous tensor on {a.device}"
            )


def _launch(
    a: Tensor,
    b: Tensor,
    scales_a: Tensor,
    scales_b: Tensor,
    alpha: float,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
) -> None:
    if out.numel() == 0:
        return
    rows, columns = out.shape
    native = a.is_cuda and torch.cuda.get_device_capability(a.device)[0] == 10
    tile = TILE if native else _SMALL_TILE
    m, n, k = tile.values()
    mxfp4_kernel[(triton.cdiv(rows, m) * triton.cdiv(columns, n),)](
        TensorDescriptor.from_tensor(a, [m, k // 2]),
        TensorDescriptor.from_tensor(b, [n, k // 2]),
        scales_a,
        scales_b,
        bias,
        out,
        rows,
        columns,
        alpha,
        DEPTH=2 * a.shape[1],
        BIAS=bias is not None,
        ACCUMULATE=accumulate,
        GROUP=_GROUP,
        num_warps=WARPS,
        num_stages=STAGES if native else 2,
        **tile,
    )
