"""The specification gives the same bits on a GPU; the BF16 backend multiplies there."""

import pytest
import torch

from megafp4 import Linear, Precision, formats, numerics
from megafp4.backends import ReferenceBackend
from megafp4.numerics import Key, QTensor
from megafp4.recipes import get_recipe, recipe_names
from megafp4.recipes.cast import cast
from tests import tolerances

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KEY = Key(7, 3, 5, "dgrad", "a")


def assert_same(cpu: QTensor, gpu: QTensor) -> None:
    assert torch.equal(cpu.codes, gpu.codes.cpu())
    assert torch.equal(cpu.scales.view(torch.uint8), gpu.scales.cpu().view(torch.uint8))
    assert torch.equal(cpu.dequantize().nan_to_num(), gpu.dequantize().cpu().nan_to_num())


@pytest.mark.parametrize("rounding", ["nearest-even", "nearest-away", "nearest-up", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", formats())
def test_codes_and_scales_equal_the_cpus(fmt: str, dtype: torch.dtype, rounding: str) -> None:
    x = torch.randn(160, 192, dtype=dtype) * torch.logspace(-30, 30, 160, dtype=dtype)[:, None]
    x[3, 7], x[64:96] = torch.inf, 0.0
    for axis in (0, 1):
        options = {"axis": axis, "rounding": rounding, "key": KEY, "origin": (5, 33)}
        assert_same(
            numerics.quantize(x, fmt, **options), numerics.quantize(x.cuda(), fmt, **options)
        )


@pytest.mark.parametrize("g", [16, 64, 256])
def test_hadamard_equals_the_cpus(g: int) -> None:
    x = torch.randn(256, 512)
    signs = numerics.hadamard_signs(KEY, g)
    for axis in (0, 1):
        cpu = numerics.hadamard(x, g, axis, signs)
        assert torch.equal(cpu, numerics.hadamard(x.cuda(), g, axis, signs).cpu())


def test_signs_are_drawn_on_the_gpu_without_waiting_for_it() -> None:
    expected = numerics.hadamard_signs(KEY, 256)
    x = torch.randn(64, 64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")  # a copy from or to ordinary memory would wait
    try:
        signs = numerics.hadamard_signs(KEY, 256, "cuda")
        cast(x, get_recipe("mxfp4").dgrad, "a", 1, KEY)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(signs.cpu(), expected)


def test_the_reference_never_uses_tf32() -> None:
    a, b = torch.randn(2, 256, 256, device="cuda")
    exact = (a.double() @ b.double().T).float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = ReferenceBackend().gemm(a, b, (1, 1))
        assert not torch.equal(a @ b.T, exact)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recipe", recipe_names())
def test_linear_agrees_with_the_cpu_reference(recipe: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 256, generator=generator)
    dy = torch.randn(128, 192, generator=generator)
    results = []
    for device, backend in (("cpu", "reference"), ("cuda", "bf16")):
        layer = Linear(256, 192, recipe=recipe, backend=backend, precision=Precision(seed=1))
        with torch.no_grad():
            weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(2))
            layer.weight.copy_(weight)
            layer.bias.zero_()
        if layer.recipe.grid is not None:
            layer.to_grid()
        layer.to(device)
        leaf = x.clone().to(device).requires_grad_()
        out = layer(leaf)
        out.backward(dy.to(device))
        results.append((out.detach(), leaf.grad, layer.weight.grad))
    for cpu, gpu in zip(*results, strict=True):
        error = (gpu.cpu() - cpu).norm() / cpu.norm()
        assert error < tolerances.BF16_GEMM
