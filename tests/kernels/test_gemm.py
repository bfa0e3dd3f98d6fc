"""The FP8 GEMM against float64 products of the decoded operands."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megafp4.numerics.estimators import dge_multiplier
from megafp4_kernels import driver
from megafp4_kernels.gemm import gemm
from megafp4_kernels.gemm_arguments import Slope, squares_shape
from tests.kernels.test_driver import gpu, needs_gpu, needs_nvrtc

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP32, BF16 = torch.float32, torch.bfloat16
# The tensor core keeps fewer bits than FP32 while it sums: 1.1e-3 on these operands.
SUM = 1.5e-3
ROUNDED = 2.5e-3  # and after rounding to BF16

VARIANTS = {
    "plain": {},
    "small-tile": {"TILE_N": 128, "STAGES": 6, "CLUSTER": 1},
    "fp32": {"OUT": "OUT_FP32", "SCALE_B_ROWS": 1, "BIAS": "FP32"},
    "add-slope": {"OUT": "OUT_ADD", "SLOPE": "FP32"},
    "direct": {"DIRECT": 1, "SCALE_B_ROWS": 1, "BIAS": "BF16"},
    "squares": {"OUT": "OUT_FP32", "SQUARES": 1, "TILE_N": 128, "STAGES": 6},
    "add-squares": {"OUT": "OUT_ADD", "SQUARES": 1, "SLOPE": "BF16"},
    "chunk": {"CHUNK": 32},
}


@needs_nvrtc
@pytest.mark.parametrize("name", VARIANTS)
def test_the_kernel_compiles(name: str) -> None:
    options: dict[str, str | int] = {
        "A_TYPE": "e4m3", "B_TYPE": "e5m2", "TILE_N": 256, "STAGES": 4, "CLUSTER": 2, "GROUP": 8,
        "OUT": "OUT_BF16", "DIRECT": 0, "SCALE_B_ROWS": 0, "BIAS": 0, "SLOPE": 0, "SQUARES": 0,
        "CHUNK": 0,
    }  # fmt: skip
    cubin = driver.compile_cubin("gemm.cu", tuple((options | VARIANTS[name]).items()))
    assert cubin[:4] == b"\x7fELF"


def fake(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


@pytest.fixture
def operands() -> Any:
    """Legal arguments without memory, as torch.compile sees them."""
    with FakeTensorMode():
        yield {
            "a": fake(64, 96, dtype=E4M3),
            "b": fake(40, 96, dtype=E5M2),
            "scale_a": fake(1),
            "scale_b": fake(40),
        }


def test_shapes_and_dtypes_are_known_without_a_gpu(operands: dict[str, Tensor]) -> None:
    out = gemm(**operands)
    assert (out.shape, out.dtype, out.device.type) == ((64, 40), BF16, "cuda")
    assert gemm(**operands, out_dtype=FP32).dtype == FP32
    out = fake(64, 40)
    assert gemm(**operands, out=out, accumulate=True) is out
    squares = fake(*squares_shape(64, 40), dtype=torch.float64)
    assert gemm(**operands, out=out, accumulate=True, squares=squares, chunk=128) is out
    assert gemm(**operands, out_dtype=FP32, squares=squares).shape == (64, 40)
    operands["a"] = fake(96, 1, dtype=E4M3).as_strided((1, 96), (1, 1))  # one row has no stride
    assert gemm(**operands).shape == (1, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": lambda: fake(64, 96)}, "a is torch.float32"),
        ({"b": lambda: fake(40, 80, dtype=E5M2)}, "K is 96 in a and 80 in b"),
        ({"a": lambda: fake(96, 64, dtype=E4M3).T}, "a has strides"),
        ({"a": lambda: fake(64, 8, dtype=E4M3)}, "a has strides"),
        (
            {"a": lambda: fake(1, 24, dtype=E4M3).as_strided((1, 24), (32, 1)),
             "b": lambda: fake(1, 24, dtype=E4M3).as_strided((1, 24), (32, 1))},
            "multiple of 16",
        ),
        ({"scale_a": lambda: fake(40)}, r"scale_a is .*give contiguous float32 \[1\] or \[64\]"),
        ({"scale_b": lambda: fake(1, dtype=BF16)}, "scale_b is torch.bfloat16"),
        ({"bias": lambda: fake(64)}, "bias is"),
        ({"scale_b": lambda: torch.empty(1)}, "a is on cuda:0 and scale_b on cpu"),
        ({"out_dtype": lambda: torch.float16}, "contiguous float32 or bfloat16"),
        ({"out": lambda: fake(40, 64).T}, "contiguous float32 or bfloat16"),
        ({"accumulate": lambda: True}, "no out was given"),
        ({"accumulate": lambda: True, "out": lambda: fake(64, 40, dtype=BF16)}, "adds in FP32"),
        ({"slope": lambda: Slope(fake(40, 64), fake(1))}, "the slope's weight"),
        ({"slope": lambda: Slope(fake(64, 40), fake(40))}, "the slope's scale"),
        ({"slope": lambda: Slope(fake(64, 40), fake(1), k=0.0)}, "the slope's k"),
        ({"chunk": lambda: 64}, "chunk is 64: give a multiple of 128"),
        ({"chunk": lambda: -128}, "chunk is -128"),
        ({"squares": lambda: fake(4, 1, dtype=torch.float64)}, "squares are of an FP32 result"),
        (
            {"squares": lambda: fake(4, 1), "out_dtype": lambda: FP32},
            r"squares is .*give contiguous float64 \[4, 1\]",
        ),
        (
            {"squares": lambda: fake(4, 2, dtype=torch.float64), "out": lambda: fake(64, 40)},
            r"give contiguous float64 \[4, 1\]",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    operands: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gemm(**operands | {name: make() for name, make in change.items()})


def test_a_cpu_tensor_is_refused() -> None:
    one = torch.ones(1)
    x = torch.zeros(16, 16).to(E4M3)
    with pytest.raises(ValueError, match="one CUDA device"):
        gemm(x, x, scale_a=one, scale_b=one)


def random_codes(lines: int, k: int, dtype: torch.dtype) -> Tensor:
    spread = torch.logspace(-2, 2, lines, device="cuda")[:, None]
    return (torch.randn(lines, k, device="cuda") * spread.clamp(max=40.0)).to(dtype)


def scale_of(lines: int, rows: bool) -> Tensor:
    return torch.rand(lines if rows else 1, device="cuda") + 0.5


def exact(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> tuple[Tensor, Tensor]:
    """The product in float64, and the same of the magnitudes, which bounds each sum's error."""
    scales = scale_a.double()[:, None] * scale_b.double()[None]
    a, b = a.double(), b.double()
    return (a @ b.T) * scales, (a.abs() @ b.abs().T) * scales


def assert_near(found: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Check the error of the whole and, against each sum's own magnitude, of every element."""
    assert found.isfinite().all()
    error = (found.double() - expected).abs()
    rounded = found.dtype == BF16
    assert error.norm() / expected.norm() < (ROUNDED if rounded else SUM)
    assert (error <= magnitude * 2**-10 + expected.abs() * (2**-8 if rounded else 2**-20)).all()


@gpu
@needs_gpu
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("a_type", "b_type"), list(itertools.product((E4M3, E5M2), repeat=2)))
def test_every_pairing_bias_and_result(
    a_type: torch.dtype, b_type: torch.dtype, rows: bool
) -> None:
    m, n, k = 300, 264, 1072
    a, b = random_codes(m, k, a_type), random_codes(n, k, b_type)
    scales = {"scale_a": scale_of(m, rows), "scale_b": scale_of(n, rows)}
    product, magnitude = exact(a, b, **scales)
    for bias in (None, torch.randn(n, device="cuda") * 300, torch.randn(n, device="cuda").to(BF16)):
        expected = -0.75 * product + (0.0 if bias is None else bias.double())
        given = scales | {"alpha": -0.75, "bias": bias}
        assert_near(gemm(a, b, **given), expected, magnitude)
        found = gemm(a, b, **given, out_dtype=FP32)
        assert_near(found, expected, magnitude)
        out = torch.full_like(found, torch.nan)
        assert torch.equal(gemm(a, b, **given, out=out), found)
        before = torch.randn_like(found) * 1000
        added = before.clone()
        assert gemm(a, b, **given, out=added, accumulate=True) is added
        assert torch.equal(added, before + found)


@gpu
@needs_gpu
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 1, 16), (7, 8, 32), (128, 256, 128), (129, 257, 48), (33, 77, 4128), (255, 100, 240),
        (4096, 2056, 160), (2500, 4097, 144),
    ],
)  # fmt: skip
def test_every_edge_of_a_tile(m: int, n: int, k: int) -> None:
    a, b = random_codes(m, k, E5M2), random_codes(n, k, E4M3)
    scales = {"scale_a": scale_of(m, True), "scale_b": scale_of(n, True)}
    bias = torch.randn(n, device="cuda")
    product, magnitude = exact(a, b, **scales)
    expected = product + bias.double()
    assert_near(gemm(a, b, **scales, bias=bias), expected, magnitude)
    # A result inside guard rows shows a store past its end.
    guarded = torch.full((m + 2, n), 5.0, device="cuda")
    gemm(a, b, **scales, bias=bias, out=guarded[1:-1])
    assert_near(guarded[1:-1], expected, magnitude)
    gemm(a, b, **scales, bias=bias, out=guarded[1:-1], accumulate=True)
    assert_near(guarded[1:-1], 2 * expected, 2 * magnitude)
    assert torch.equal(guarded[[0, -1]], torch.full_like(guarded[[0, -1]], 5.0))


@gpu
@needs_gpu
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("n", [264, 263, 1])
def test_the_slope_multiplies_the_gradient(n: int, dtype: torch.dtype, rows: bool) -> None:
    m, k = 300, 256
    a, b = random_codes(m, k, E5M2), random_codes(n, k, E4M3)
    one = torch.ones(1, device="cuda")
    weight = (torch.randn(m, n, device="cuda") * 2).to(dtype)
    # Row 0 has scale 1: grid points, thresholds and what lies outside.
    special = [torch.nan, 0, 0.25, 0.5, 1, 1.75, -2, -2.5, 4, 5, 6, 7]
    weight[0, :12] = torch.tensor(special[:n], device="cuda")
    scale = torch.rand(m if rows else 1, device="cuda") + 0.5
    scale[0] = 1.0
    plain = gemm(a, b, scale_a=one, scale_b=one, out_dtype=FP32)
    for sharpness, cap in ((5.0, 3.0), (2.0, 3.0), (5.0, 1000.0)):
        slopes = dge_multiplier(weight.float() * (1.0 / scale[:, None]), sharpness, cap)
        expected = plain * slopes
        slope = Slope(weight, scale, sharpness, cap)
        found = torch.zeros_like(plain)
        gemm(a, b, scale_a=one, scale_b=one, slope=slope, out=found, accumulate=True)
        assert expected.isnan().sum() == 1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, equal_nan=True)
    expected = (plain * slopes).nan_to_num()
    rounded = gemm(a, b, scale_a=one, scale_b=one, slope=slope).nan_to_num()
    torch.testing.assert_close(rounded.float(), expected, rtol=2**-8, atol=0)


def block_sums(result: Tensor) -> Tensor:
    """Sums of squares of the blocks of 16 x 128."""
    rows, columns = squares_shape(*result.shape)
    padded = torch.zeros(rows * 16, columns * 128, dtype=torch.float64, device="cuda")
    padded[: result.shape[0], : result.shape[1]] = result.double().square()
    return padded.view(rows, 16, columns, 128).sum((1, 3))


@gpu
@needs_gpu
@pytest.mark.parametrize(
    ("m", "n"), [(1, 1), (300, 264), (129, 257), (17, 129), (64, 4), (2500, 4097), (2048, 4096)]
)
def test_squares_are_those_of_the_result(m: int, n: int) -> None:
    a, b = random_codes(m, 288, E5M2), random_codes(n, 288, E4M3)
    options: dict[str, Any] = {"scale_a": scale_of(m, True), "scale_b": scale_of(n, False)}
    plain = gemm(a, b, **options, out_dtype=FP32)
    slope = Slope(torch.randn(m, n, device="cuda"), torch.ones(1, device="cuda"))
    before = torch.randn_like(plain) * plain.abs().mean()
    for accumulate, extra in itertools.product((False, True), ({}, {"slope": slope})):
        expected, out = (before.clone() if accumulate else torch.zeros_like(plain) for _ in "ab")
        gemm(a, b, **options, **extra, out=expected, accumulate=accumulate)
        found = []
        for _ in range(2):
            out.copy_(before)
            squares = torch.full(squares_shape(m, n), torch.nan, dtype=torch.float64, device="cuda")
            gemm(a, b, **options, **extra, out=out, accumulate=accumulate, squares=squares)
            assert torch.equal(out, expected)
            found.append(squares)
        torch.testing.assert_close(found[0], block_sums(out), rtol=1e-6, atol=0)
        assert torch.equal(*found)


@gpu
@needs_gpu
@pytest.mark.parametrize("alpha", [1e30, 1e-30, 0.0, torch.inf])
def test_squares_do_not_leave_their_range(alpha: float) -> None:
    a, b = (torch.randn(lines, 256, device="cuda").to(E4M3) for lines in (200, 136))
    one, squares = torch.ones(1, device="cuda"), torch.empty(13, 2, device="cuda").double()
    out = gemm(a, b, scale_a=one, scale_b=one, alpha=alpha, out_dtype=FP32, squares=squares)
    torch.testing.assert_close(squares, block_sums(out), rtol=1e-6, atol=0, equal_nan=True)
    assert bool(squares.isfinite().all()) == (alpha < torch.inf)


@gpu
@needs_gpu
@pytest.mark.parametrize("n", [257, 256])
def test_a_bias_beyond_the_edge_is_not_measured(n: int) -> None:
    a, b = random_codes(70, 64, E5M2), random_codes(n, 64, E5M2)
    one, bias = torch.ones(1, device="cuda"), torch.randn(n, device="cuda")
    squares = torch.empty(squares_shape(70, n), dtype=torch.float64, device="cuda")
    out = gemm(a, b, scale_a=one, scale_b=one, bias=bias, out_dtype=FP32, squares=squares)
    torch.testing.assert_close(squares, block_sums(out), rtol=1e-6, atol=0)


@gpu
@needs_gpu
def test_chunks_make_a_long_sum_exact() -> None:
    m, n, k = 1024, 512, 16384 + 32
    a, b = (torch.randn(lines, k, device="cuda").to(E5M2) for lines in (m, n))
    options: dict[str, Any] = {"scale_a": scale_of(m, True), "scale_b": scale_of(n, True)}
    product, _ = exact(a, b, **options)
    errors = []
    for chunk in (0, 4096, 128, 1 << 20):
        out = gemm(a, b, **options, out_dtype=FP32, chunk=chunk)
        errors.append(float((out - product).norm() / product.norm()))
    assert errors[3] == errors[0]
    assert errors[1] < min(SUM, 0.6 * errors[0])
    assert errors[2] < 0.5 * errors[1]
    added = torch.ones(m, n, device="cuda")
    squares = torch.empty(squares_shape(m, n), dtype=torch.float64, device="cuda")
    gemm(a, b, **options, out=added, accumulate=True, chunk=4096, squares=squares)
    assert float((added - 1 - product).norm() / product.norm()) < min(SUM, 0.6 * errors[0])
    torch.testing.assert_close(squares, block_sums(added), rtol=1e-6, atol=0)
    rounded = gemm(a, b, **options, chunk=4096, bias=torch.randn(n, device="cuda"))
    assert rounded.isfinite().all()


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_nan_and_infinity_are_not_hidden(dtype: torch.dtype) -> None:
    a, b = random_codes(200, 144, dtype), random_codes(96, 144, E5M2)
    one = torch.ones(1, device="cuda")
    a.view(torch.uint8)[130, 143] = 0x7F  # NaN in both formats
    b.view(torch.uint8)[17, 3] = 0xFC  # -Inf
    found = gemm(a, b, scale_a=one, scale_b=one)
    broken = torch.zeros(200, 96, dtype=torch.bool, device="cuda")
    broken[130] = True
    broken[:, 17] = True
    assert found[130].isnan().all()
    assert torch.equal(~found.isfinite(), broken)


@gpu
@needs_gpu
def test_the_same_call_gives_the_same_bits() -> None:
    a, b = random_codes(2048, 2048, E5M2), random_codes(4096, 2048, E5M2)
    one = torch.ones(1, device="cuda")
    first, second = (gemm(a, b, scale_a=one, scale_b=one, out_dtype=FP32) for _ in range(2))
    assert torch.equal(first, second)


@gpu
@needs_gpu
def test_a_graph_reads_the_scales_of_its_replay() -> None:
    a, b = random_codes(256, 256, E4M3), random_codes(256, 256, E4M3)
    scale = torch.ones(1, device="cuda")
    before = gemm(a, b, scale_a=scale, scale_b=scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gemm(a, b, scale_a=scale, scale_b=scale)
    scale.fill_(2.0)
    graph.replay()
    assert torch.equal(out, 4 * before)


@gpu
@needs_gpu
def test_the_operators_keep_torchs_contracts() -> None:
    a, b = random_codes(64, 64, E4M3), random_codes(48, 64, E5M2)
    one, bias = torch.ones(1, device="cuda"), torch.randn(48, device="cuda")
    shared = (a, b, one, one, 1.0, bias, None, None, 1.0, 1.0, 0)
    # Not test_schema: it compares arguments with allclose, which knows no FP8.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.megafp4.gemm.default, (*shared, BF16), test_utils=checks)
    out = torch.zeros(64, 48, device="cuda")
    torch.library.opcheck(
        torch.ops.megafp4.gemm_out.default, (*shared, out, True, None), test_utils=checks
    )
    out.zero_()
    compiled = torch.compile(gemm, fullgraph=True, backend="aot_eager")
    options = {"scale_a": one, "scale_b": one, "bias": bias}
    assert torch.equal(compiled(a, b, **options), gemm(a, b, **options))
    version = out._version
    compiled(a, b, **options, out=out, accumulate=True)
    assert torch.equal(out, gemm(a, b, **options, out_dtype=FP32))
    assert out._version > version
