"""Gradients on the wire: the kernels equal the specification, bit for bit."""

import pytest
import torch
from torch import Tensor

from megafp4.parallel import blocks
from tests.kernels.triton_device import DEVICE, INTERPRETING, adversarial, gpu_only, same_bits

from megafp4_kernels import fp8_reduce as module  # isort: skip

DTYPES = [torch.bfloat16, torch.float32]


def gradients(ranks: int, count: int, dtype: torch.dtype) -> Tensor:
    """Adversarial rows; whole blocks of zeros, of subnormals and of the largest numbers."""
    x = adversarial(ranks, count, dtype).cpu()
    x[0, : blocks.BLOCK] = 0.0
    x[0, blocks.BLOCK : 2 * blocks.BLOCK] = 1e-39
    x[-1, -blocks.BLOCK :] = 3.3e38
    x[-1, :2] = torch.tensor([448.0, -448.5])
    return x.to(DEVICE)


def messages(x: Tensor) -> Tensor:
    """Specified messages of the rows, on the device."""
    out = torch.zeros(x.shape[0], blocks.message_bytes(x.shape[1]), dtype=torch.uint8)
    blocks.cast_blocks(x.cpu(), out)
    return out.to(DEVICE)


def test_the_constants_are_the_specification_s() -> None:
    assert (module.BLOCK, module.GRANULE, module.MIN_SCALE_BYTE) == (
        blocks.BLOCK,
        blocks.GRANULE,
        blocks.MIN_SCALE_BYTE,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2048), (3, 4096)])
def test_cast_and_decode(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = gradients(*shape, dtype)
    # Columns of a wider matrix, as a chunk of every rank's shard is.
    wide = torch.cat([x, torch.full_like(x, 7.0)], dim=1)[:, : shape[1]]
    found = torch.full_like(messages(x), 77)
    module.cast_blocks(wide, found)
    assert torch.equal(found, messages(x))
    for kind in DTYPES:
        expected = torch.empty(shape, dtype=kind)
        blocks.decode_blocks(found.cpu(), expected)
        back = torch.zeros(shape[0], 2 * shape[1], dtype=kind, device=DEVICE)
        module.decode_blocks(found, back[:, : shape[1]])
        assert same_bits(back[:, : shape[1]].float().cpu().contiguous(), expected.float())
        assert not back[:, shape[1] :].any()


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("kind", ["coded", torch.bfloat16, torch.float32])
def test_sum(kind: str | torch.dtype, ranks: int) -> None:
    x = gradients(ranks, 4096, torch.float32 if kind == "coded" else kind)
    if INTERPRETING and kind == torch.bfloat16:
        x[x.abs() < 2.0**-126] = 0.0  # Triton's interpreter reads BF16's subnormals wrongly
    rows = messages(x) if kind == "coded" else x
    for factor in (1.0, 1 / 3):
        for accumulate in (False, True):
            start = torch.randn(4096)
            expected, found = start.clone(), start.to(DEVICE)
            blocks.sum_rows(rows.cpu(), expected, factor, accumulate)
            module.sum_rows(rows, found, factor, accumulate)
            assert same_bits(found.cpu(), expected)
        expected = torch.zeros(blocks.message_bytes(4096), dtype=torch.uint8)
        found = torch.zeros_like(expected, device=DEVICE)
        blocks.sum_rows(rows.cpu(), expected, factor)
        module.sum_rows(rows, found, factor)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.gpu
@gpu_only
def test_large() -> None:
    x = torch.randn(4, 1 << 22, device=DEVICE).bfloat16()
    x[2, 12345] = torch.nan
    found = torch.empty(4, blocks.message_bytes(1 << 22), dtype=torch.uint8, device=DEVICE)
    module.cast_blocks(x, found)
    assert torch.equal(found, messages(x))
    total = torch.empty(1 << 22, device=DEVICE)
    module.sum_rows(found, total)
    expected = torch.empty(1 << 22)
    blocks.sum_rows(found.cpu(), expected)
    assert same_bits(total.cpu(), expected)


def test_refusals() -> None:
    x = torch.zeros(2, 2048, device=DEVICE)
    out = messages(x)
    with pytest.raises(ValueError, match="multiple of 2048"):
        module.cast_blocks(x[:, :2047], out)
    with pytest.raises(ValueError, match="give one for each row"):
        module.cast_blocks(x, out[:1])
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        module.cast_blocks(x.double(), out)
    with pytest.raises(ValueError, match="contiguous rows"):
        module.decode_blocks(out[:, :2048], x)
    with pytest.raises(ValueError, match="accumulate into a message"):
        module.sum_rows(out, out[0], accumulate=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "slot"), [(2, 0), (2, 1), (5, 3)])
def test_cast_to_peers(ranks: int, slot: int, dtype: torch.dtype) -> None:
    """Row r goes to the memory of rank r, into the sender's slot, and nothing else is written."""
    count = 4096
    x = gradients(ranks, count, dtype)
    wide = torch.cat([x, torch.full_like(x, 7.0)], dim=1)[:, :count]
    width = blocks.message_bytes(count)
    memory = [torch.full((ranks, width), 77, dtype=torch.uint8, device=DEVICE) for _ in x]
    peers = torch.tensor([one.data_ptr() for one in memory], device=DEVICE)
    module.cast_blocks_to_peers(wide, peers, slot)
    expected = messages(x)
    for rank, one in enumerate(memory):
        assert torch.equal(one[slot], expected[rank])
        others = [other for other in range(ranks) if other != slot]
        assert (one[others] == 77).all()


def test_peers_must_fit_the_rows() -> None:
    x = torch.zeros(2, 2048, device=DEVICE)
    for peers, slot in (
        (torch.zeros(2), 0),
        (torch.zeros(3).long(), 0),
        (torch.zeros(2).long(), 2),
    ):
        with pytest.raises(ValueError, match="one int64 address and one slot for each row"):
            module.cast_blocks_to_peers(x, peers.to(DEVICE), slot)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_factor(dtype: torch.dtype) -> None:
    x = gradients(1, 4096, dtype)[0]
    if INTERPRETING and dtype == torch.bfloat16:
        x[x.abs() < 2.0**-126] = 0.0  # Triton's interpreter reads BF16's subnormals wrongly
    factor = torch.tensor([0.75])
    found = torch.empty(4096, dtype=torch.uint8, device=DEVICE)
    module.cast_shared(x, factor.to(DEVICE), found)
    codes = blocks.cast_shared(x.cpu(), factor)
    assert torch.equal(found.cpu(), codes.view(torch.uint8))
    assert (codes.float().abs() == 448.0).any()
    for accumulate in (False, True):
        expected = torch.linspace(-1, 1, 4096)
        out = expected.to(DEVICE, copy=True)
        count = module.decode_shared(found, factor.to(DEVICE), out, accumulate)
        assert int(count) == int(blocks.decode_shared(codes, factor, expected, accumulate))
        assert same_bits(out.cpu(), expected)
