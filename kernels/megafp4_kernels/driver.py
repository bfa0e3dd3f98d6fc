"""Compile CUDA C++ with NVRTC and launch it on torch's current stream.

The sources lie in ``megafp4_kernels/cuda`` and are compiled for sm_90a when first used, in memory
and once per process and set of defines; neither nvcc nor the CUDA headers have to be installed.
Importing this module needs no GPU, no driver and no cuda-bindings (torch's CUDA wheels bring it).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import struct
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "cuda"
ARCHITECTURE = "sm_90a"

_DEFAULT_SHARED = 48 * 1024  # what a CTA may have without asking for more
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_MAP_BYTES = 128


class Int64(int):
    """A kernel argument of 64 bits; a plain int is passed as int32."""


class TensorMap(NamedTuple):
    """A TMA descriptor, passed by value: ``const __grid_constant__`` of 128 bytes, 64-aligned."""

    data: bytes


def _bindings(module: str) -> Any:
    """Import ``cuda.bindings.<module>``.

    Raises:
        RuntimeError: cuda-bindings is not installed.
    """
    try:
        return importlib.import_module(f"cuda.bindings.{module}")
    except ImportError as error:
        raise RuntimeError(
            "cuda-bindings is not installed, and the CUDA kernels are compiled through it: "
            "install torch's CUDA wheel or `pip install cuda-bindings`"
        ) from error


def _check(result: tuple[Any, ...], what: str) -> Any:
    """Unpack a driver call's (status, value...), raising RuntimeError if it failed."""
    if result[0].value:
        raise RuntimeError(f"{what} failed with {result[0].name}")
    return result[1] if len(result) == 2 else None


@functools.cache
def compile_cubin(source: str, defines: tuple[tuple[str, str | int], ...] = ()) -> bytes:
    """Compile one file of ``megafp4_kernels/cuda`` to machine code; needs no GPU.

    Args:
        source: File name, e.g. ``"gemm.cu"``; it may include the other files of the folder.
        defines: Preprocessor macros (name, value).

    Returns:
        The cubin for sm_90a.

    Raises:
        RuntimeError: cuda-bindings is missing, or NVRTC refuses the source (its log is shown).
    """
    nvrtc = _bindings("nvrtc")
    text = (SOURCES / source).read_bytes()
    program = _check(nvrtc.nvrtcCreateProgram(text, source.encode(), 0, [], []), "NVRTC")
    options = [f"--gpu-architecture={ARCHITECTURE}", "-std=c++17", f"--include-path={SOURCES}"]
    options += [f"-D{name}={value}" for name, value in defines]
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
        if status.value:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), "NVRTC's log")
            nvrtc.nvrtcGetProgramLog(program, log)
            shown = log.rstrip(b"\0 ").decode(errors="replace")
            raise RuntimeError(f"NVRTC could not compile {source} with {dict(defines)}:\n{shown}")
        cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program), "NVRTC")
        _check(nvrtc.nvrtcGetCUBIN(program, cubin), "NVRTC")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin


@functools.cache
def _primary_context(device: int) -> Any:
    """Retain the context that torch uses on ``device``."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            "no CUDA GPU is visible to torch, and this kernel runs on Hopper (sm_90) only: "
            "choose another backend or run on an H100 or H200"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        raise RuntimeError(
            f"cuda:{device} has compute capability {capability[0]}.{capability[1]}, and this "
            "kernel runs on 9.0 (H100, H200) only: choose another backend"
        )
    driver = _bindings("driver")
    torch.cuda.init()
    handle = _check(driver.cuDeviceGet(device), "cuDeviceGet")
    return _check(driver.cuDevicePrimaryCtxRetain(handle), "cuDevicePrimaryCtxRetain")


class Kernel:
    """One compiled ``__global__`` function on one device; made by :func:`load`."""

    def __init__(self, cubin: bytes, function: str, device: int) -> None:
        self._driver = _bindings("driver")
        self._context = _primary_context(device)
        self._device = device
        self._shared = _DEFAULT_SHARED
        self._layouts: dict[tuple[type, ...], _Layout] = {}
        with torch.cuda.device(device):
            self._make_current()
            self._module = _check(self._driver.cuModuleLoadData(cubin), "cuModuleLoadData")
            self._function = _check(
                self._driver.cuModuleGetFunction(self._module, function.encode()),
                f"finding the kernel {function}",
            )

    def launch(
        self, grid: tuple[int, int, int], threads: int, shared_bytes: int, *args: Any
    ) -> None:
        """Launch on torch's current stream of the kernel's device.

        Args:
            grid: Number of CTAs along x, y, z.
            threads: Threads of a CTA.
            shared_bytes: Dynamic shared memory of a CTA.
            args: In the order of the kernel's parameters: Tensor (its data pointer), int (int32),
                Int64, float (FP32), TensorMap (by value) or None (a null pointer).

        Raises:
            TypeError: An argument is none of these.
            RuntimeError: The driver refuses the launch.
        """
        if shared_bytes > self._shared:
            self._allow_shared(shared_bytes)
        layout = self._layouts.get(kinds := tuple(map(type, args)))
        if layout is None:
            layout = self._layouts[kinds] = _Layout(kinds)
        pointers = layout.fill(args)
        if torch.cuda.current_device() == self._device:
            self._launch(grid, threads, shared_bytes, pointers)
        else:
            with torch.cuda.device(self._device):
                self._launch(grid, threads, shared_bytes, pointers)

    def _launch(self, grid: tuple[int, int, int], threads: int, shared: int, args: int) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        launch = self._driver.cuLaunchKernel
        status = launch(self._function, *grid, threads, 1, 1, shared, stream, args, 0)[0]
        if status.value == _INVALID_CONTEXT:
            # A thread that has not called the CUDA runtime yet, such as one of autograd's.
            self._make_current()
            status = launch(self._function, *grid, threads, 1, 1, shared, stream, args, 0)[0]
        if status.value:
            raise RuntimeError(
                f"launching a kernel with grid {grid}, {threads} threads and {shared} bytes of "
                f"shared memory failed with {status.name}"
            )

    def max_ctas_per_sm(self, threads: int, shared_bytes: int) -> int:
        """Count the CTAs of this size that fit on one multiprocessor at a time."""
        if shared_bytes > self._shared:
            self._allow_shared(shared_bytes)
        with torch.cuda.device(self._device):
            self._make_current()
            count = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor
            return int(_check(count(self._function, threads, shared_bytes), "occupancy query"))

    def _allow_shared(self, shared_bytes: int) -> None:
        attribute = self._driver.CUfunction_attribute
        name = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with torch.cuda.device(self._device):
            self._make_current()
            _check(
                self._driver.cuFuncSetAttribute(self._function, name, shared_bytes),
                f"asking for {shared_bytes} bytes of shared memory",
            )
        self._shared = shared_bytes

    def _make_current(self) -> None:
        _check(self._driver.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")


@functools.cache
def load(
    source: str,
    function: str,
    defines: tuple[tuple[str, str | int], ...] = (),
    device: int = 0,
) -> Kernel:
    """Compile and load a kernel; the same arguments give the same object.

    Args:
        source: File name in ``megafp4_kernels/cuda``.
        function: Name of the ``extern "C" __global__`` function.
        defines: Preprocessor macros (name, value).
        device: CUDA device index.

    Raises:
        RuntimeError: No Hopper GPU, no cuda-bindings, or a source that does not compile.
    """
    _primary_context(device)  # a missing GPU is said before seconds of compiling
    return Kernel(compile_cubin(source, defines), function, device)


@functools.cache
def sm_count(device: int) -> int:
    """Number of multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tensor_map(t: Tensor, box: tuple[int, int], swizzle: int) -> TensorMap:
    """Describe a matrix to the tensor memory accelerator (TMA).

    Loads outside the matrix give zeros and stores outside it are dropped.

    Args:
        t: CUDA tensor [rows, columns] of 1, 2 or 4 byte elements, contiguous along the columns,
            16-byte aligned, its row stride a multiple of 16 bytes.
        box: Rows and columns of the tile that one copy moves, at most 256 each.
        swizzle: 0, 32, 64 or 128: bytes within which 16-byte chunks are permuted in shared memory.

    Raises:
        ValueError: The tensor or the box cannot be described.
    """
    size = t.element_size()
    if size not in _MAP_TYPES:
        raise ValueError(f"TMA moves elements of 1, 2 or 4 bytes, not {t.dtype}: view it as bytes")
    rows, columns = t.shape if t.ndim == 2 else (0, 0)
    stride = t.stride(0) * size if rows > 1 else -(-columns * size // 16) * 16
    if not rows * columns or t.stride(1) != 1 or stride % 16 or t.data_ptr() % 16:
        raise ValueError(
            f"a tensor of shape {list(t.shape)}, strides {t.stride()} and {size}-byte elements "
            "cannot be read by TMA: give a matrix of 16-byte aligned rows, contiguous along the "
            "columns"
        )
    return _encode_map(t.data_ptr(), rows, columns, stride, _MAP_TYPES[size], box, swizzle)


_MAP_TYPES = {1: "UINT8", 2: "BFLOAT16", 4: "FLOAT32"}


@functools.lru_cache(maxsize=8192)
def _encode_map(
    pointer: int,
    rows: int,
    columns: int,
    stride: int,
    kind: str,
    box: tuple[int, int],
    swizzle: int,
) -> TensorMap:
    driver = _bindings("driver")
    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    swizzles = driver.CUtensorMapSwizzle
    status, encoded = driver.cuTensorMapEncodeTiled(
        getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{kind}"),
        2,
        pointer,
        [wide(columns), wide(rows)],
        [wide(stride)],
        [narrow(box[1]), narrow(box[0])],
        [narrow(1), narrow(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(
            swizzles,
            f"CU_TENSOR_MAP_SWIZZLE_{swizzle}B" if swizzle else "CU_TENSOR_MAP_SWIZZLE_NONE",
        ),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status.value:
        raise ValueError(
            f"TMA refuses a box of {box[0]} x {box[1]} with swizzle {swizzle} on a matrix of "
            f"{rows} x {columns}: {status.name}"
        )
    return TensorMap(ctypes.string_at(encoded.getPtr(), _MAP_BYTES))


class _Layout(threading.local):
    """Memory for arguments of given types and the pointers to them, a copy in each thread.

    The driver copies arguments before a launch returns, so the next launch may write over them.
    """

    def __init__(self, kinds: tuple[type, ...]) -> None:
        codes, offsets, size = [], [], 0
        self._tensors: list[int] = []
        self._maps: list[int] = []
        self._nulls: list[int] = []
        for index, kind in enumerate(kinds):
            offsets.append(size)
            size += _MAP_BYTES if kind is TensorMap else 8
            if kind in _SCALARS:
                codes.append(_SCALARS[kind])
            elif kind is TensorMap:
                codes.append(f"{_MAP_BYTES}s")
                self._maps.append(index)
            elif kind is type(None) or issubclass(kind, Tensor):
                codes.append("Q")
                (self._nulls if kind is type(None) else self._tensors).append(index)
            else:
                raise TypeError(
                    f"kernel argument {index} is a {kind.__name__}: "
                    "give a Tensor, int, Int64, float, TensorMap or None"
                )
        self._pack = struct.Struct("<" + "".join(codes)).pack_into
        self._buffer = (ctypes.c_char * size)()
        base = ctypes.addressof(self._buffer)
        self._pointers = (ctypes.c_void_p * len(offsets))(*[base + offset for offset in offsets])
        self._address = ctypes.addressof(self._pointers)

    def fill(self, args: tuple[Any, ...]) -> int:
        """Store the arguments; returns the address of the array of pointers to them."""
        values = list(args)
        for index in self._tensors:
            values[index] = args[index].data_ptr()
        for index in self._maps:
            values[index] = args[index].data
        for index in self._nulls:
            values[index] = 0
        self._pack(self._buffer, 0, *values)
        return self._address


_SCALARS: dict[type, str] = {int: "i4x", Int64: "q", float: "f4x"}
