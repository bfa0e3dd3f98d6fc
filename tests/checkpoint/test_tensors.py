"""Every kind of tensor that a model keeps comes back as it was."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megafp4 import checkpoint
from megafp4.errors import CheckpointError


def round_trip(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    checkpoint.save(folder, 1, {"model": tensors}, {})
    return checkpoint.load(folder).tensors["model"]


def file_size(folder: Path) -> int:
    return (folder / "step_00000001" / "model.safetensors").stat().st_size


def assert_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.bool,
    ],
)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 5) * 3).to(dtype)
    assert_bits(round_trip(tmp_path, {"x": x})["x"], x)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)])
def test_every_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    loaded = round_trip(tmp_path, {"x": x, "y": x.clone()})
    assert loaded["x"].shape == shape
    assert torch.equal(loaded["x"], x)
    assert torch.equal(loaded["y"], x)


def test_nan_bits_and_negative_zero(tmp_path: Path) -> None:
    x = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 1], dtype=torch.int32)
    x = x.view(torch.float32)
    assert_bits(round_trip(tmp_path, {"x": x})["x"], x)


def test_tied_tensors_are_stored_once_and_loaded_as_one(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    loaded = round_trip(tmp_path, {"embedding": weight, "head": weight, "copy": weight.clone()})
    assert loaded["head"] is loaded["embedding"]
    assert loaded["copy"] is not loaded["embedding"]
    assert all(torch.equal(tensor, weight) for tensor in loaded.values())
    assert file_size(tmp_path) < 2 * 64 * 64 * 4 + 1000


def test_expanded_tensors_stay_small_on_disk_and_in_memory(tmp_path: Path) -> None:
    placeholder = torch.full((), 3.5).expand(1000, 1000)
    rows = torch.arange(10.0)[:, None].expand(10, 1000)
    loaded = round_trip(tmp_path, {"placeholder": placeholder, "rows": rows})
    assert torch.equal(loaded["placeholder"], placeholder)
    assert torch.equal(loaded["rows"], rows)
    assert loaded["placeholder"].stride() == (0, 0)
    assert loaded["rows"].stride(1) == 0
    assert file_size(tmp_path) < 2000


def test_views_of_one_buffer_come_back_apart(tmp_path: Path) -> None:
    buffer = torch.arange(12.0)
    views = {
        "whole": buffer,
        "table": buffer.view(3, 4),
        "transposed": buffer.view(3, 4).t(),
        "tail": buffer[5:],
        "overlap": buffer[3:9],
        "strided": buffer[::2],
    }
    loaded = round_trip(tmp_path, views)
    for name, view in views.items():
        assert torch.equal(loaded[name], view)
    loaded["whole"].zero_()
    assert torch.equal(loaded["overlap"], buffer[3:9])


def test_packed_codes_come_back_bit_for_bit(tmp_path: Path) -> None:
    codes = torch.randint(0, 256, (33, 17), dtype=torch.uint8)
    loaded = round_trip(tmp_path, {"weight_codes": codes})["weight_codes"]
    assert loaded.dtype == torch.uint8
    assert torch.equal(loaded, codes)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "'x' cannot be saved, it is a int"),
        (torch.ones(2).to_sparse(), "'x' cannot be saved"),
        (torch.ones(2, device="meta"), "'x' cannot be saved"),
    ],
)
def test_what_is_not_a_plain_tensor(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path, 1, {"model": {"x": value}}, {})


@pytest.fixture
def gpu_state(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A GPU whose generator is a tensor, by the name of the device that was asked for."""
    states = {"cuda:1": torch.arange(16, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[str(device)].clone())
    monkeypatch.setattr(
        torch.cuda,
        "set_rng_state",
        lambda state, device: states.__setitem__(str(device), state.clone()),
    )
    return states


def test_the_generator_of_the_runs_gpu_is_saved_and_restored(
    tmp_path: Path, gpu_state: dict[str, Tensor]
) -> None:
    device = torch.device("cuda:1")
    saved = gpu_state["cuda:1"].clone()
    checkpoint.save(tmp_path, 1, {"rng": checkpoint.capture_rng(device)}, {})
    expected = torch.rand(5)
    gpu_state["cuda:1"] = torch.zeros(16, dtype=torch.uint8)
    checkpoint.restore_rng(checkpoint.load(tmp_path).tensors["rng"], device)
    assert torch.equal(gpu_state["cuda:1"], saved)
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("of_gpu", [None, torch.zeros(3, dtype=torch.uint8)])
def test_a_checkpoint_without_the_gpus_generator_changes_nothing(
    gpu_state: dict[str, Tensor], of_gpu: Tensor | None
) -> None:
    state = checkpoint.capture_rng() | ({} if of_gpu is None else {"torch_cuda": of_gpu})
    torch.rand(3)
    before, of_cpu = gpu_state["cuda:1"].clone(), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=r"'torch_cuda' is .*, expected torch.uint8 \[16\]"):
        checkpoint.restore_rng(state, torch.device("cuda:1"))
    assert torch.equal(gpu_state["cuda:1"], before)
    assert torch.equal(torch.get_rng_state(), of_cpu)


def test_random_generator_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(1)
    torch.rand(7)
    checkpoint.save(tmp_path, 1, {"rng": checkpoint.capture_rng()}, {})
    expected = torch.rand(5)
    torch.manual_seed(2)
    checkpoint.restore_rng(checkpoint.load(tmp_path).tensors["rng"])
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize(
    "state", [{}, {"torch_cpu": torch.zeros(3, dtype=torch.uint8)}, {"torch_cpu": torch.zeros(9)}]
)
def test_a_foreign_generator_state_is_refused(state: dict[str, Tensor]) -> None:
    before = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=r"'torch_cpu' is .*, expected torch.uint8"):
        checkpoint.restore_rng(state)
    assert torch.equal(torch.get_rng_state(), before)
