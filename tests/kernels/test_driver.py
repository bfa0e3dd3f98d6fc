"""Compiling, argument passing and launching, apart from any kernel of the package."""

import ctypes
import importlib
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megafp4_kernels import driver
from megafp4_kernels.driver import Int64, TensorMap

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def nvrtc_missing() -> str:
    """Say why nothing can be compiled here; empty where it can."""
    try:
        importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except ImportError:
        return "cuda-bindings is not installed"
    except RuntimeError as error:
        return f"NVRTC cannot be loaded: {error}"
    return ""


needs_nvrtc = pytest.mark.skipif(bool(nvrtc_missing()), reason=nvrtc_missing() or "-")

ECHO = """
extern "C" __global__ void echo(double* out, const float* x, int i, long long wide, float f,
                                const float* null) {
    extern __shared__ float scratch[];
    scratch[WORDS - 1 - threadIdx.x] = x[threadIdx.x] * f;
    __syncthreads();
    out[threadIdx.x] = scratch[WORDS - 1 - threadIdx.x] + i + double(wide) + (null ? 0.5 : 0.0);
}
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of CUDA sources in place of the package's, with caches of its own."""
    monkeypatch.setattr(driver, "SOURCES", tmp_path)
    monkeypatch.setattr(driver, "compile_cubin", driver.compile_cubin.__wrapped__)
    monkeypatch.setattr(driver, "load", driver.load.__wrapped__)
    return tmp_path


def arguments_at(address: int, sizes: list[int]) -> list[bytes]:
    """Read arguments back as the driver would: through the array of pointers to them."""
    pointers = (ctypes.c_void_p * len(sizes)).from_address(address)
    return [
        ctypes.string_at(int(pointer), size) for pointer, size in zip(pointers, sizes, strict=True)
    ]


def test_arguments_have_the_types_that_the_kernel_reads() -> None:
    x = torch.zeros(3)
    map_bytes = bytes(range(128))
    args = (7, TensorMap(map_bytes), x, None, 0.25, Int64(-(2**40)), torch.nn.Parameter(x))
    layout = driver._Layout(tuple(map(type, args)))
    for _ in range(2):  # the memory is written over by the next launch
        seven, tensor_map, pointer, null, quarter, wide, parameter = arguments_at(
            layout.fill(args), [4, 128, 8, 8, 4, 8, 8]
        )
        assert struct.unpack("<i", seven) == (7,)
        assert tensor_map == map_bytes
        assert struct.unpack("<Q", pointer) == struct.unpack("<Q", parameter) == (x.data_ptr(),)
        assert null == bytes(8)
        assert struct.unpack("<f", quarter) == (0.25,)
        assert struct.unpack("<q", wide) == (-(2**40),)


def test_threads_do_not_share_argument_memory() -> None:
    layout = driver._Layout((int,))
    address = layout.fill((1,))
    other: list[int] = []
    thread = threading.Thread(target=lambda: other.append(layout.fill((2,))))
    thread.start()
    thread.join()
    assert other[0] != address
    assert struct.unpack("<i", arguments_at(address, [4])[0]) == (1,)


@pytest.mark.parametrize("bad", ["text", True, [1]])
def test_other_argument_types_are_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match="kernel argument 1 is a"):
        driver._Layout((int, type(bad)))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(4, 3), "16-byte aligned rows"),
        (torch.zeros(4, 8)[:, 1:5], "16-byte aligned rows"),
        (torch.zeros(8, 4).T, "16-byte aligned rows"),
        (torch.zeros(4, 4, 4), "16-byte aligned rows"),
        (torch.zeros(0, 16), "16-byte aligned rows"),
        (torch.zeros(4, 8, dtype=torch.float64), "1, 2 or 4 bytes"),
    ],
)
def test_tma_refuses_what_it_cannot_address(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        driver.tensor_map(tensor, (4, 4), 0)


def test_a_missing_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    driver._primary_context.cache_clear()
    with pytest.raises(RuntimeError, match="no CUDA GPU is visible"):
        driver.load("never-read.cu", "f")


def test_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    driver._primary_context.cache_clear()
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0"):
        driver.load("never-read.cu", "f")


def test_missing_bindings_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(RuntimeError, match="cuda-bindings is not installed"):
        driver.compile_cubin("never-read.cu")


@needs_nvrtc
def test_compiling_gives_machine_code_for_the_defines(sources: Path) -> None:
    (sources / "echo.cu").write_text('#include "body.cuh"\n')
    (sources / "body.cuh").write_text(ECHO)
    small, large = (driver.compile_cubin("echo.cu", (("WORDS", n),)) for n in (32, 4096))
    assert small[:4] == large[:4] == b"\x7fELF"
    assert small != large


@needs_nvrtc
def test_a_compiler_error_is_shown(sources: Path) -> None:
    (sources / "broken.cu").write_text("__global__ void f() { missing_name(); }")
    with pytest.raises(RuntimeError, match=r'(?s)broken\.cu.*"missing_name" is undefined'):
        driver.compile_cubin("broken.cu")


@gpu
@needs_gpu
@pytest.mark.parametrize("words", [128, 20 * 1024])  # 20 Ki words: more than 48 KiB
def test_a_kernel_gets_its_arguments(sources: Path, words: int) -> None:
    (sources / "echo.cu").write_text(ECHO)
    kernel = driver.load("echo.cu", "echo", (("WORDS", words),))
    x, out = torch.randn(64, device="cuda"), torch.zeros(64, dtype=torch.float64, device="cuda")
    kernel.launch((1, 1, 1), 64, words * 4, out, x, 3, Int64(2**40), 2.0, None)
    assert torch.equal(out, (x * 2.0).double() + 3 + 2**40)
    assert kernel.max_ctas_per_sm(64, words * 4) >= 1


@gpu
@needs_gpu
def test_a_kernel_runs_from_a_new_thread_on_its_stream_and_in_a_graph(sources: Path) -> None:
    (sources / "echo.cu").write_text(ECHO)
    kernel = driver.load("echo.cu", "echo", (("WORDS", 64),))
    x, out = torch.ones(64, device="cuda"), torch.zeros(64, dtype=torch.float64, device="cuda")

    def launch(value: int) -> None:
        kernel.launch((1, 1, 1), 64, 256, out, x, value, Int64(0), 1.0, None)

    thread = threading.Thread(target=launch, args=(5,))
    thread.start()
    thread.join()
    assert out.unique().tolist() == [6.0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch(6)
        stream.synchronize()
    assert out.unique().tolist() == [7.0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(7)
    x.fill_(2.0)
    graph.replay()
    assert out.unique().tolist() == [9.0]
