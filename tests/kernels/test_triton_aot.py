"""Kernels for slices compile for Hopper: the interpreter takes what the compiler does not."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from megafp4_kernels import casts, nvfp4, tails  # noqa: E402

POINTERS = {
    "x": "*bf16", "scale": "*fp32", "position": "*i64", "row_out": "*u8", "col_out": "*u8",
    "block_amax": "*fp32", "tensor_scale": "*fp32", "codes_out": "*u8", "scales_out": "*u8",
    "values_out": "*bf16", "sent": "*bf16", "out": "*fp32",
}  # fmt: skip
NUMBERS = dict.fromkeys(
    (
        *("rows", "cols", "lines", "length", "stream", "sign_stream", "sign_step"),
        *("tokens", "words", "width", "smallest", "largest"),
    ),
    "i32",
)
CAST = {
    "SCALE_AXIS": -1, "FORMAT": "int8", "ROUNDING": "stochastic", "PRESCALE": False,
    "HARDWARE": False, "ROW": True, "COL": False, "ROWS": 16, "COLS": 32,
}  # fmt: skip
NVFP4 = {
    "AXIS": 0, "HADAMARD": True, "HEIGHT": 1, "ROUNDING": "stochastic", "PRESCALE": False,
    "CODES": True, "VALUES": True, "LINES": 16, "K": 32,
}  # fmt: skip

TAILS = {
    "MAGNITUDE": False, "PAIRS": True, "FAST": True, "STEPS": 4, "WORDS": 512, "FEW": 64,
}  # fmt: skip
LIMITS = {"MAGNITUDE": False, "FINITE": True, "STEPS": 4, "WIDTH": 128}
WORDS = {"x": "*i32", "out": "*i16"}


def ptx_of(name: str, runs: tuple[str, ...], folder: str) -> str:
    """Compile a kernel for Hopper, with or without tables of runs."""
    kernel, given, pointers = {
        "cast": (casts._cast_kernel, CAST, POINTERS),
        "nvfp4": (nvfp4._encode_kernel, NVFP4, POINTERS),
        "tails": (tails._tails_kernel, TAILS, WORDS),
        "limits": (tails._limits_kernel, LIMITS, POINTERS),
    }[name]
    known = {**pointers, **NUMBERS, "prescale": "fp32", **dict.fromkeys(runs, "*i32")}
    signature = {argument: known.get(argument, "constexpr") for argument in kernel.arg_names}
    constants = {name: given.get(name) for name, kind in signature.items() if kind == "constexpr"}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    triton.knobs.cache.dir = folder
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    text: str = compiled.asm["ptx"]
    return text


RUNS = [(), ("row_runs",), ("col_runs",)]


@pytest.mark.parametrize(
    ("name", "runs"),
    [*((name, runs) for name in ("cast", "nvfp4") for runs in RUNS), ("tails", ()), ("limits", ())],
)
def test_kernels_compile(name: str, runs: tuple[str, ...], tmp_path: Path) -> None:
    # In a process of its own: the interpreter, once used, stays in Triton's language.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ptx = pool.apply(ptx_of, (name, runs, str(tmp_path)))
    assert ".target sm_90a" in ptx
