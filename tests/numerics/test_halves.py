"""The same rows in two halves give the same codes, in every format and scaling."""

from itertools import product

import pytest
import torch

from megafp4 import numerics

KEY = (7, 11, 13, "dgrad", "a")
BY_ROW = [
    (name, scaling)
    for name, scaling in product(numerics.formats(), ("block", "vector"))
    if scaling in numerics.get_format(name).scalings and name != "nvfp4"
]
SHARED = [
    (name, scaling)
    for name, scaling in product(numerics.formats(), ("block", "tile", "tensor"))
    if scaling in numerics.get_format(name).scalings and name != "mxfp4"
]


@pytest.mark.parametrize(("name", "scaling"), BY_ROW)
@pytest.mark.parametrize("rounding", ["nearest-even", "stochastic"])
@pytest.mark.parametrize("cut", [1, 37, 64])
def test_rows_with_scales_of_their_own(
    name: str,
    scaling: numerics.Scaling,
    rounding: numerics.Rounding,
    cut: int,
    generator: torch.Generator,
) -> None:
    x = torch.randn(96, 128, generator=generator)
    whole = numerics.quantize(x, name, -1, rounding, KEY, scaling=scaling)
    halves = [
        numerics.quantize(part, name, -1, rounding, KEY, scaling=scaling, origin=(first, 0))
        for first, part in ((0, x[:cut]), (cut, x[cut:]))
    ]
    assert torch.equal(torch.cat([half.codes for half in halves]), whole.codes)
    assert torch.equal(torch.cat([half.scales for half in halves]), whole.scales)
    decoded = torch.cat([half.dequantize() for half in halves])
    assert torch.equal(decoded, whole.dequantize())


@pytest.mark.parametrize(("name", "scaling"), SHARED)
@pytest.mark.parametrize("rounding", ["nearest-even", "stochastic"])
def test_scales_of_the_whole_tensor_are_reduced_first(
    name: str, scaling: numerics.Scaling, rounding: numerics.Rounding, generator: torch.Generator
) -> None:
    x = torch.randn(96, 128, generator=generator)
    whole = numerics.quantize(x, name, -1, rounding, KEY, scaling=scaling)
    parts = (x[:32], x[32:])
    stats = [numerics.amax(part, name, scaling=scaling) for part in parts]
    if scaling == "tensor":
        stats = [torch.maximum(*stats)] * 2
    codes = []
    for first, part, stat in zip((0, 32), parts, stats, strict=True):
        scales, tensor_scale = numerics.scales_from_amax(stat, name, x.abs().amax())
        q = numerics.encode(
            part, name, scales, -1, rounding, KEY, scaling=scaling, tensor_scale=tensor_scale,
            origin=(first, 0),
        )  # fmt: skip
        codes.append(q.codes)
    assert torch.equal(torch.cat(codes), whole.codes)
