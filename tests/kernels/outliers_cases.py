"""Comparisons of the OCC and recast kernels with the specification, on a GPU or interpreted."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from megafp4 import numerics
from megafp4.numerics import QTensor
from megafp4_kernels.outliers import Clamped, occ
from megafp4_kernels.recast import recast
from megafp4_kernels.tails import limits, ranks, tails

SHAPES = ((5, 100), (3, 96), (8, 128), (2, 1000))


def activations(tokens: int, features: int, dtype: torch.dtype) -> Tensor:
    """Heavy tails, many ties, tokens of very different size, zeros of both signs."""
    g = torch.Generator().manual_seed(tokens * features)
    x = torch.randn(tokens, features, generator=g)
    x = (x * x.abs().exp()).bfloat16().to(dtype) * torch.logspace(-20, 20, tokens)[:, None]
    x[1] = torch.relu(x[1])
    x[1, ::3] = -0.0
    x[0, ::7] *= 30
    if tokens > 4:
        x[2] = 0.0
        x[4] = x[4, 0]
    return x.to(dtype)


def expected(x: Tensor, alpha: float, mode: str, residual: str) -> tuple[QTensor, Tensor, Tensor]:
    """Operand, residual and value of the specification."""
    clamped, rest = numerics.clamp_outliers(x.float(), alpha, mode)  # type: ignore[arg-type]
    operand = numerics.quantize(clamped, "fp4-vector", 1, "nearest-up")
    if residual == "folded":
        operand = numerics.fold_outliers(operand, x.float(), clamped)
    value = operand.dequantize()
    return operand, rest, value + rest if residual == "exact" else value


def as_e4m3(operand: QTensor) -> Tensor:
    """Bytes of the operand's code values."""
    if operand.format.name == "fp8-e4m3":
        return operand.codes
    return numerics.encode(
        operand.values(), "fp8-e4m3", torch.ones(1, 1, device=operand.codes.device)
    ).codes


def check_occ(x: Tensor, alpha: float, mode: str, residual: str) -> Clamped:
    """Assert that the kernel's bits are the specification's; x holds no NaN."""
    operand, rest, value = expected(x, alpha, mode, residual)
    found = occ(x, alpha, mode=mode, residual=residual)
    assert torch.equal(found.scale, operand.scales[:, 0])
    assert torch.equal(found.data.view(torch.uint8), as_e4m3(operand))
    assert torch.equal(found.peak, value.abs().amax(1))
    if residual == "exact":
        assert found.residual is not None
        assert torch.equal(found.residual, rest.bfloat16())
    else:
        assert found.residual is None
    return found


def check_recast(x: Tensor, found: Clamped, residual: str, alpha: float, mode: str) -> None:
    """Assert that both outputs are the specification's, with and without a known peak."""
    _, _, value = expected(x, alpha, mode, residual)
    want = numerics.quantize(value, "fp8-e4m3", 0)
    exact = residual == "exact"
    extra = {"x": x, "limits": found.limits} if exact else {}
    for peak in (found.peak,) if exact else (found.peak, None):
        row, col, scale = recast(found.data, found.scale, peak=peak, row=True, col=True, **extra)
        assert row is not None
        assert col is not None
        assert torch.equal(scale, want.scales.view(1))
        assert torch.equal(row.view(torch.uint8), want.codes)
        assert torch.equal(col.view(torch.uint8), want.codes.t())
        none, alone, scale = recast(found.data, found.scale, peak=peak, col=True, **extra)
        assert none is None
        assert alone is not None
        assert torch.equal(scale, want.scales.view(1))
        assert torch.equal(alone.view(torch.uint8), want.codes.t())


def check_all(device: str) -> None:
    """Run every combination."""
    for tokens, features in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            x = activations(tokens, features, dtype).to(device)
            for mode in ("signed", "magnitude"):
                for residual in ("exact", "folded", "none"):
                    for alpha in (0.99, 0.8):
                        found = check_occ(x, alpha, mode, residual)
                        check_recast(x, found, residual, alpha, mode)


def check_saturation(device: str) -> None:
    """A folded outlier beyond 448 scales saturates and is counted; infinity makes NaN.

    A token that is not finite makes every code of the recast operand 0, as the specification does.
    """
    x = torch.linspace(-1, 1, 128, device=device).bfloat16().repeat(4, 1)
    x[1, 5], x[1, 90], x[2, 7] = 300.0, -200.0, torch.inf
    x[3, 3] = torch.nan
    for dtype in (torch.bfloat16, torch.float32):
        found = occ(x.to(dtype), 0.95, residual="folded")
        assert found.saturated.item() == 2
        assert found.data[1, [5, 90]].float().tolist() == [448.0, -448.0]
        assert found.scale.isnan().tolist() == [False, False, True, True]
        assert found.peak.isnan().tolist() == [False, False, True, True]
        assert (found.data[2:].view(torch.uint8) == 0).all()
        for row in (False, True):  # with and without the rows: different kernels
            _, col, scale = recast(found.data, found.scale, peak=found.peak, row=row)
            assert scale.isnan().all()
            assert col is not None
            assert (col.view(torch.uint8) == 0).all()
        exact = occ(x.to(dtype), 0.95)
        assert exact.scale.isnan().tolist() == [False, False, False, True]
        assert exact.residual is not None
        assert exact.residual[2, 7].isinf()
        assert exact.residual[3].isnan().all()
        assert exact.peak[2].isinf()


def check_slices(x: Tensor, size: int, alpha: float, mode: str, residual: str) -> None:
    """Assert that slices of the features get the codes that the whole tokens get."""
    whole = occ(x, alpha, mode=mode, residual=residual)
    smallest, largest = ranks(x.shape[1], alpha, mode)
    parts = [part.contiguous() for part in x.chunk(size, 1)]
    sent = torch.cat([tails(part, smallest, largest) for part in parts], 1)
    few = min(smallest + largest, parts[0].shape[1])
    assert sent.shape == (x.shape[0], size * few)
    found = limits(sent, smallest, largest, finite=residual == "folded")
    same = {"equal_nan": True, "rtol": 0, "atol": 0}
    torch.testing.assert_close(found, whole.limits, **same)
    made = [occ(part, alpha, mode=mode, residual=residual, limits=found) for part in parts]
    data = torch.cat([one.data.view(torch.uint8) for one in made], 1)
    assert torch.equal(data, whole.data.view(torch.uint8))
    peak = torch.stack([one.peak for one in made]).amax(0)
    torch.testing.assert_close(peak, whole.peak, **same)
    for one in made:
        torch.testing.assert_close(one.scale, whole.scale, **same)
    if whole.residual is not None:
        rest = torch.cat([one.residual for one in made if one.residual is not None], 1)
        assert torch.equal(rest.view(torch.int16), whole.residual.view(torch.int16))


def check_all_slices(device: str) -> None:
    """Ties, tokens that are not finite, ranks that hold no outlier or nothing else."""
    for mode, residual, alpha, dtype in (
        ("signed", "exact", 0.95, torch.bfloat16),
        ("signed", "folded", 0.6, torch.bfloat16),  # every feature is sent
        ("magnitude", "none", 0.95, torch.float32),
    ):
        x = activations(4, 96, dtype)
        x[0] = x[0].sort().values  # all the smallest are one rank's, as are the largest
        x[1, 11], x[3, 7] = -torch.inf, torch.nan
        check_slices(x.to(device), 2, alpha, mode, residual)


if __name__ == "__main__":
    check_all(sys.argv[1])
    check_all_slices(sys.argv[1])
    check_saturation(sys.argv[1])
    print("same bits")
