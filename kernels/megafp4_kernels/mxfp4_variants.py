"""Which variant of ``cuda/mxfp4.cu`` serves a call of the MXFP4 quantizer."""

from __future__ import annotations

import functools
from typing import TypeAlias

from megafp4_kernels.driver import Kernel, load, sm_count

TILE, THREADS = 128, 256
ROUNDINGS = {"stochastic": 0, "nearest-even": 1, "nearest-away": 2}
OUTPUTS = {"": 0, "folded": 1, "packed": 2, "e4m3": 3}
Kind: TypeAlias = tuple[str, int, str, bool]
"""A side: (output, hadamard, rounding, whether it can exceed 6)."""

_FOUR_BITS = {"folded", "packed"}


@functools.lru_cache(maxsize=256)
def config(
    fp32: bool,
    row: Kind,
    col: Kind,
    from_e4m3: bool,
    sums: bool,
    runs: tuple[bool, bool],
    device: int,
) -> tuple[Kernel, int, int]:
    """The kernel, how many CTAs fill the GPU, and their bytes of shared memory."""
    defines = kernel_defines(fp32, row, col, from_e4m3, sums, runs)
    options = dict(defines)
    shared = options["STAGES"] * TILE * TILE * (4 if fp32 else 2) + 1024  # 1024: room to align
    ctas = sm_count(device) * options["CTAS"]
    return load("mxfp4.cu", "quantize", defines, device), ctas, shared


def kernel_defines(
    fp32: bool,
    row: Kind,
    col: Kind,
    from_e4m3: bool,
    sums: bool,
    runs: tuple[bool, bool] = (False, False),
) -> tuple[tuple[str, int], ...]:
    """Macros of ``cuda/mxfp4.cu``; a side is (output, hadamard, rounding, can exceed 6)."""
    # What keeps the most warps busy without spilling registers. Of FP32 input one tile is all that
    # fits; the other CTAs work while one waits for its next.
    long = 128 in (row[1], col[1])
    few = long or not (fp32 or _FOUR_BITS.issuperset((row[0], col[0])))
    flags = {"FP32_INPUT": fp32, "COL_FROM_E4M3": from_e4m3, "COL_SUMS": sums}
    flags |= {"ROW_RUNS": runs[0], "COL_RUNS": runs[1]}
    defines = {"STAGES": 1 if fp32 else 3 if long else 2, "CTAS": 2 if few else 3, **flags}
    for name, (output, g, rounding, clips) in (("ROW", row), ("COL", col)):
        defines |= {name: OUTPUTS[output], f"{name}_G": g, f"{name}_CLIP": clips}
        defines[f"{name}_ROUNDING"] = ROUNDINGS[rounding]
    return tuple((name, int(value)) for name, value in defines.items())
