"""NVFP4: two-level scales in one and two dimensions, against FP32 numpy and torchao."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchao.prototype.mx_formats import nvfp4_tensor as torchao

from megafp4 import numerics
from tests.numerics import oracle

SCALES = (1.0, 1e-4, 1e-8, 1e4)


def wide(scale: float, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Gaussian data whose blocks span 2^14: all block scales are normal E4M3 numbers."""
    x = torch.randn(1024, 256, generator=generator) * scale
    octave = torch.randint(-12, 3, (1024, 16), generator=generator).float()
    return (x * torch.exp2(octave).repeat_interleave(16, dim=1)).to(dtype)


@pytest.mark.parametrize("scaling", ["block", "tile"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_against_numpy(
    scaling: numerics.Scaling, scale: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = wide(scale, dtype, generator)
    q = numerics.quantize(x, "nvfp4", scaling=scaling)
    shape = (1, 16) if scaling == "block" else (16, 16)
    codes, scales, tensor_scale = oracle.nvfp4(x.float().numpy(), shape)
    assert q.tensor_scale is not None
    assert q.tensor_scale.item() == tensor_scale
    np.testing.assert_array_equal(q.scales.numpy(), scales)
    np.testing.assert_array_equal(q.codes.numpy(), codes)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_torchao(scale: float, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = wide(scale, dtype, generator)
    tensor_scale = torchao.per_tensor_amax_to_scale(x.abs().amax())
    scales, packed = torchao.nvfp4_quantize(x, 16, tensor_scale)
    q = numerics.quantize(x, "nvfp4")
    assert q.tensor_scale is not None
    assert q.tensor_scale.item() == tensor_scale.item()
    ours, theirs = q.scales, scales.view(torch.uint8).view(q.scales.shape)
    # torchao never goes below 2^-6, the smallest normal E4M3 number; NVIDIA and megafp4 do.
    assert torch.equal(ours.clamp(min=8), theirs)
    # torchao forms (1 / s) / scale where NVIDIA and megafp4 form 1 / (scale * s): the last bit
    # differs, which shows only where BF16 data meets an exact tie.
    codes = numerics.unpack(packed.view(torch.uint8).view(x.shape[0], -1), "nvfp4")
    same_scale = (ours == theirs).repeat_interleave(16, dim=1)
    differ = (codes != q.codes) & same_scale
    assert differ.float().mean().item() <= (0.0 if dtype == torch.float32 else 3e-3)
    assert ((codes[differ].int() - q.codes[differ].int()).abs() == 1).all()


def test_tiles_do_not_see_a_transpose(generator: torch.Generator) -> None:
    w = torch.randn(48, 80, generator=generator)
    q = numerics.quantize(w, "nvfp4", scaling="tile")
    assert q.scales.shape == (3, 5)
    transposed = numerics.quantize(w.T, "nvfp4", scaling="tile")
    assert torch.equal(transposed.dequantize(), q.dequantize().T)
    along_rows = numerics.quantize(w, "nvfp4", axis=0, scaling="tile")
    assert torch.equal(along_rows.codes, q.codes)
    assert torch.equal(along_rows.scales, q.scales)
    assert along_rows.axis == 0


def test_blocks_do_see_a_transpose(generator: torch.Generator) -> None:
    w = torch.randn(48, 80, generator=generator)
    rows = numerics.quantize(w, "nvfp4").dequantize()
    columns = numerics.quantize(w, "nvfp4", axis=0).dequantize()
    assert not torch.equal(rows, columns)


def test_a_slice_with_the_tensors_amax_equals_the_slice(generator: torch.Generator) -> None:
    # Tensor parallelism: block amaxes are local, the tensor's amax is reduced over ranks.
    x = torch.randn(32, 128, generator=generator)
    x[3, 70] = 50.0
    whole = numerics.quantize(x, "nvfp4")
    shards = []
    for shard in x.chunk(2, dim=1):
        local = numerics.amax(shard, "nvfp4")
        scales, tensor_scale = numerics.scales_from_amax(local, "nvfp4", x.abs().amax())
        shards.append(numerics.encode(shard, "nvfp4", scales, tensor_scale=tensor_scale))
    assert torch.equal(torch.cat([s.codes for s in shards], dim=1), whole.codes)
    assert torch.equal(torch.cat([s.scales for s in shards], dim=1), whole.scales)


def test_nan_anywhere_shows(generator: torch.Generator) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(16, 32, generator=generator)
        x[2, 20] = bad
        for scaling in ("block", "tile"):
            q = numerics.quantize(x, "nvfp4", scaling=scaling)
            assert q.dequantize().isnan().all()  # the tensor scale is shared by all blocks
            assert (q.scales == 0x7F).all()


def test_zero_tensor_and_blocks_that_vanish() -> None:
    zero = numerics.quantize(torch.zeros(4, 32), "nvfp4")
    assert not zero.codes.any()
    assert torch.equal(zero.dequantize(), torch.zeros(4, 32))
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16:] = 1.0, 1e-7  # 1e-7 / 6 / (1 / 2688) is far below E4M3's least, 2^-9
    q = numerics.quantize(x, "nvfp4")
    assert q.scales.tolist() == [[0x7E, 0]]
    assert torch.equal(q.dequantize()[0, 16:], torch.zeros(16))


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32)
)
def test_any_finite_tensor_matches_the_oracle_and_its_error_bound(values: list[float]) -> None:
    x = np.array(values, dtype=np.float32).reshape(2, 16)
    check_against_oracle_and_bound(x)


@pytest.mark.parametrize("exponent", [-149, -140, -130, -120, -110, -100, 100, 120, 127])
def test_the_ends_of_the_exponent_range(exponent: int) -> None:
    source = np.random.default_rng(exponent + 200)
    spread = np.ldexp(source.uniform(-0.99, 0.99, (64, 16)), source.integers(-14, 1, (64, 1)))
    check_against_oracle_and_bound(np.ldexp(spread, exponent + 1).astype(np.float32))


def check_against_oracle_and_bound(x: np.ndarray) -> None:
    """Equal to the FP32 oracle, and no further from x than nearest rounding may be."""
    q = numerics.quantize(torch.from_numpy(x), "nvfp4")
    codes, scales, _ = oracle.nvfp4(x, (1, 16))
    np.testing.assert_array_equal(q.scales.numpy(), scales)
    np.testing.assert_array_equal(q.codes.numpy(), codes)
    assert q.tensor_scale is not None
    scale = q.scale_values().double().numpy()
    alive = scale[:, 0] > 0
    scaled = x[alive].astype(np.float64) / scale[alive]
    error = np.abs(q.dequantize().double().numpy()[alive] / scale[alive] - scaled)
    # 1e-5: FP32 rounding of the scale and, for subnormals, of the decoded value.
    slack = 1e-5 + 2.0**-149 / scale[alive]
    assert (error <= oracle.half_step_bound(6.0, scaled, oracle.E2M1) + slack).all()
    assert (np.abs(x[~alive]) <= 6 * q.tensor_scale.item() * 2.0**-10 * 1.00001).all()
