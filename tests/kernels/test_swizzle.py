"""Block scales in tiles of 128 lines by 4 blocks, against the formula and against torchao."""

import pytest
import torch

triton = pytest.importorskip("triton")

from torchao.prototype.mx_formats.utils import to_blocked  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from megafp4_kernels import swizzle as module  # noqa: E402
from megafp4_kernels.swizzle import (  # noqa: E402
    launch_swizzle,
    swizzle,
    swizzle_reference,
    swizzled_length,
    unswizzle,
)

SHAPES = [(128, 4), (1, 1), (256, 8), (130, 5), (32, 64), (300, 20), (384, 3)]
BYTES = [torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn]


def some(lines: int, blocks: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(lines * 1000 + blocks)
    return torch.randint(1, 256, (lines, blocks), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("lines", "blocks"), SHAPES)
def test_every_scale_lies_where_the_manual_says(lines: int, blocks: int) -> None:
    """cuBLAS: byte (l % 32) * 16 + (l // 32) * 4 + k of tile (L // 128, B // 4), tiles by rows."""
    scales = some(lines, blocks)
    expected = torch.zeros(swizzled_length(lines, blocks), dtype=torch.uint8)
    tiles = -(-blocks // 4)
    for line in range(lines):
        for block in range(blocks):
            tile = line // 128 * tiles + block // 4
            inside = line % 32 * 16 + line % 128 // 32 * 4 + block % 4
            expected[tile * 512 + inside] = scales[line, block]
    assert torch.equal(swizzle(scales), expected)


@pytest.mark.parametrize("dtype", BYTES, ids=str)
@pytest.mark.parametrize(("lines", "blocks"), SHAPES)
def test_torchao_makes_the_same_bytes(lines: int, blocks: int, dtype: torch.dtype) -> None:
    scales = some(lines, blocks).view(dtype)
    ours = swizzle(scales)
    assert ours.dtype == dtype
    assert torch.equal(ours.view(torch.uint8), to_blocked(scales.view(torch.uint8)))


@pytest.mark.parametrize(("lines", "blocks"), SHAPES)
def test_unswizzle_is_the_inverse(lines: int, blocks: int) -> None:
    scales = some(lines, blocks)
    assert torch.equal(unswizzle(swizzle(scales), lines, blocks), scales)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("lines", "blocks"), SHAPES)
def test_the_kernel_writes_the_same_bytes(
    lines: int, blocks: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_swizzle_kernel", InterpretedFunction(module._swizzle_kernel.fn))
    scales = some(blocks, lines).t() if transposed else some(lines, blocks)
    out = torch.full((swizzled_length(lines, blocks),), 255, dtype=torch.uint8)
    launch_swizzle(scales, out)
    assert torch.equal(out, swizzle_reference(scales))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("lines", "blocks"), [*SHAPES, (4096, 128)])
def test_the_kernel_on_a_gpu(lines: int, blocks: int) -> None:
    scales = some(lines, blocks)
    assert torch.equal(swizzle(scales.cuda()).cpu(), swizzle_reference(scales))
    assert torch.equal(swizzle(scales.cuda().t()).cpu(), swizzle_reference(scales.t()))


def test_compiled_code_may_hold_it() -> None:
    torch.library.opcheck(torch.ops.megafp4.swizzle.default, (some(130, 5),))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"scales are torch.float32 \[4, 4\]: give a matrix of"):
        swizzle(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="100 swizzled scales do not make 4 lines of 4 blocks"):
        unswizzle(torch.zeros(100, dtype=torch.uint8), 4, 4)
