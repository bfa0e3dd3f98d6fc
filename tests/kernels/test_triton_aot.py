"""Kernels that draw compile for Hopper: the interpreter takes what the compiler does not."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from megafp4_kernels import casts, nvfp4  # noqa: E402

POINTERS = {
    "x": "*bf16", "scale": "*fp32", "position": "*i64", "row_out": "*u8", "col_out": "*u8",
    "block_amax": "*fp32", "tensor_scale": "*fp32", "codes_out": "*u8", "scales_out": "*u8",
    "values_out": "*bf16",
}  # fmt: skip
NUMBERS = dict.fromkeys(
    ("rows", "cols", "lines", "length", "stream", "sign_stream", "sign_step"), "i32"
)
CAST = {
    "SCALE_AXIS": -1, "FORMAT": "int8", "ROUNDING": "stochastic", "PRESCALE": False,
    "HARDWARE": False, "ROW": True, "COL": False, "ROWS": 16, "COLS": 32,
}  # fmt: skip
NVFP4 = {
    "AXIS": 0, "HADAMARD": True, "HEIGHT": 1, "ROUNDING": "stochastic", "PRESCALE": False,
    "CODES": True, "VALUES": True, "LINES": 16, "K": 32,
}  # fmt: skip


def ptx_of(name: str, runs: tuple[str, ...], folder: str) -> str:
    """Compile a kernel for Hopper, with or without tables of runs."""
    kernel, given = {
        "cast": (casts._cast_kernel, CAST),
        "nvfp4": (nvfp4._encode_kernel, NVFP4),
    }[name]
    known = {**POINTERS, **NUMBERS, "prescale": "fp32", **dict.fromkeys(runs, "*i32")}
    signature = {argument: known.get(argument, "constexpr") for argument in kernel.arg_names}
    constants = {name: given.get(name) for name, kind in signature.items() if kind == "constexpr"}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    triton.knobs.cache.dir = folder
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    text: str = compiled.asm["ptx"]
    return text


@pytest.mark.parametrize("runs", [(), ("row_runs",), ("col_runs",)])
@pytest.mark.parametrize("name", ["cast", "nvfp4"])
def test_with_and_without_runs(name: str, runs: tuple[str, ...], tmp_path: Path) -> None:
    # In a process of its own: the interpreter, once used, stays in Triton's language.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ptx = pool.apply(ptx_of, (name, runs, str(tmp_path)))
    assert ".target sm_90a" in ptx
