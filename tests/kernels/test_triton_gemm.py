"""The Triton GEMMs against FP64 products of the decoded operands."""

import pytest
import torch

from megafp4.numerics import dge_multiplier
from tests.kernels.triton_device import DEVICE, INTERPRETING, gpu_only

from megafp4_kernels import gemm_triton as module  # isort: skip
from megafp4_kernels.gemm_arguments import Slope  # isort: skip
from megafp4_kernels.gemm_int8 import gemm_int8  # isort: skip

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
SMALL = (70, 88, 208)
# The interpreter cuts FP32 off where a GPU rounds it to BF16.
BF16 = 6e-3 if INTERPRETING else 2.5e-3


def operands(
    m: int, n: int, k: int, a_type: torch.dtype, b_type: torch.dtype, line: bool
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Return a, b, their scales and the exact scaled product in FP64."""
    a = torch.randn(m, k, device=DEVICE).to(a_type)
    b = torch.randn(n, k, device=DEVICE).to(b_type)
    scale_a = torch.rand(m if line else 1, device=DEVICE) + 0.1
    scale_b = torch.rand(n if line else 1, device=DEVICE) + 0.1
    factors = scale_a.double()[:, None] * scale_b.double()[None, :]
    exact = factors * (a.to(torch.float64) @ b.to(torch.float64).T)
    return a, b, {"scale_a": scale_a, "scale_b": scale_b}, exact


def assert_close(found: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert (found.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("line", [False, True])
@pytest.mark.parametrize("b_type", FP8)
@pytest.mark.parametrize("a_type", FP8)
def test_every_pairing(a_type: torch.dtype, b_type: torch.dtype, line: bool) -> None:
    a, b, scales, exact = operands(*SMALL, a_type, b_type, line)
    bias = torch.randn(SMALL[1], device=DEVICE)
    fp32 = module.gemm_triton(a, b, alpha=0.5, bias=bias, out_dtype=torch.float32, **scales)
    # Hopper's FP8 tensor cores keep fewer bits of a product than FP32 has.
    assert_close(fp32, 0.5 * exact + bias, 1e-3)
    bf16 = module.gemm_triton(a, b, alpha=0.5, bias=bias.bfloat16(), **scales)
    assert_close(bf16, 0.5 * exact + bias.bfloat16(), BF16)


@pytest.mark.parametrize("k", [16, 48, 128, 272])
@pytest.mark.parametrize("tma", [False, True])
def test_every_depth(k: int, tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not tma:
        monkeypatch.setattr(module, "has_tma", lambda device: False)
    a, b, scales, exact = operands(33, 80, k, *FP8, True)
    out = torch.empty(33, 80, device=DEVICE)
    assert module.gemm_triton(a, b, out=out, **scales) is out
    assert_close(out, exact, 1e-3)


def test_long_sums_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 256)
    a, b, scales, exact = operands(33, 80, 256 * 2 + 48, *FP8, True)
    bias = torch.randn(80, device=DEVICE)
    out = module.gemm_triton(a, b, bias=bias, out_dtype=torch.float32, **scales)
    assert_close(out, exact + bias, 1e-3)


@pytest.mark.parametrize("line", [False, True])
def test_slope_and_accumulation(line: bool) -> None:
    a, b, scales, exact = operands(*SMALL, *FP8, line)
    weight = torch.randn(SMALL[:2], device=DEVICE)
    weight[0, :3] = torch.tensor([0.0, 0.25, -6.0])
    scale = weight.abs().amax(1) / 6 if line else weight.abs().amax().view(1) / 6
    out = torch.ones(SMALL[:2], device=DEVICE)
    module.gemm_triton(a, b, out=out, accumulate=True, slope=Slope(weight, scale), **scales)
    multiplier = dge_multiplier(weight * (1.0 / scale).view(-1, 1))
    assert_close(out - 1, exact * multiplier, 1e-3)


# The interpreter reads E4M3's NaN as 480.
@pytest.mark.parametrize("a_type", FP8[1:] if INTERPRETING else FP8)
def test_nan_reaches_its_row_alone(a_type: torch.dtype) -> None:
    a, b, scales, _ = operands(*SMALL, a_type, FP8[1], False)
    a.view(torch.uint8)[3, 5] = 0x7F
    rows = module.gemm_triton(a, b, **scales).isnan().sum(1)
    assert rows[3] == SMALL[1]
    assert rows.sum() == SMALL[1]


@pytest.mark.parametrize("line", [False, True])
def test_int8_sums_are_exact(line: bool) -> None:
    m, n, k = SMALL
    a, b = torch.randint(-128, 128, (m + n, k), dtype=torch.int8, device=DEVICE).split([m, n])
    one = torch.ones(1, device=DEVICE)
    sums = a.cpu().long() @ b.cpu().long().T
    found = gemm_int8(a, b, scale_a=one, scale_b=one, out_dtype=torch.float32)
    assert torch.equal(found.cpu().long(), sums)
    scale_a, scale_b = torch.rand(m, device=DEVICE) if line else one, one * 0.3
    bias = torch.randn(n, device=DEVICE)
    found = gemm_int8(
        a, b, scale_a=scale_a, scale_b=scale_b, alpha=2.0, bias=bias, out_dtype=torch.float32
    )
    exact = sums.to(DEVICE) * scale_a.double().view(-1, 1) * (2.0 * scale_b.double()) + bias
    assert_close(found, exact, 1e-6)


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("shape", [(1024, 4096, 4096), (1000, 776, 4128), (4096, 1024, 16384)])
def test_large(shape: tuple[int, int, int]) -> None:
    a, b, scales, exact = operands(*shape, torch.float8_e5m2, torch.float8_e5m2, True)
    first = module.gemm_triton(a, b, **scales)
    # Summed in one go, the third loses more than the rounding to BF16 does: 2.7e-3.
    assert_close(first, exact, 2.2e-3)
    assert torch.equal(first, module.gemm_triton(a, b, **scales))


def test_operators_are_well_defined() -> None:
    # INT8, because the check multiplies by zero, which PyTorch cannot do in FP8.
    a, b = (torch.ones(n, 32, dtype=torch.int8, device=DEVICE) for n in (33, 48))
    scales = {"scale_a": torch.ones(1, device=DEVICE), "scale_b": torch.ones(1, device=DEVICE)}
    common = (a, b, *scales.values(), 1.0, None, None, None, 1.0, 1.0)
    torch.library.opcheck(torch.ops.megafp4.matmul.default, (*common, torch.bfloat16))
    out = torch.zeros(33, 48, device=DEVICE)
    torch.library.opcheck(torch.ops.megafp4.matmul_out.default, (*common, out, True))


def test_refusals() -> None:
    a, b, scales, _ = operands(33, 48, 32, *FP8, False)
    multiply = module.gemm_triton
    with pytest.raises(ValueError, match="multiple of 16"):
        multiply(a[:, :24].contiguous(), b[:, :24].contiguous(), **scales)
    with pytest.raises(ValueError, match="contiguous matrix"):
        multiply(a[:, :16], b[:, :16].contiguous(), **scales)
    with pytest.raises(ValueError, match="float8_e4m3fn or float8_e5m2"):
        multiply(a.bfloat16(), b, **scales)
    with pytest.raises(ValueError, match="no out was given"):
        multiply(a, b, accumulate=True, **scales)
    with pytest.raises(ValueError, match="give a float32 out"):
        multiply(a, b, out=torch.zeros(33, 48, dtype=torch.bfloat16, device=DEVICE),
                 accumulate=True, **scales)  # fmt: skip
    with pytest.raises(ValueError, match="bias is"):
        multiply(a, b, bias=torch.zeros(33, device=DEVICE), **scales)
    with pytest.raises(ValueError, match="give int8"):
        gemm_int8(a, b, **scales)
