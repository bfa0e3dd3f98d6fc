"""Measure kernels, linear layers and training steps on one GPU, each beside its baseline.

    python tools/bench.py quantize|gemm|linear|step [--out docs/results/NAME] [options]

Every row is checked against the specification before it is timed; a row that fails shows no speed
and the command ends with exit status 1. See docs/performance.md for how to read the tables.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro
from benchmarks import gemm, linear, quantize, step
from benchmarks.report import Report

Out = Annotated[str, tyro.conf.arg(help="Folder for results.json, table.md and plot.png.")]


def run_quantize(out: Out = "", tokens: int = 16384, width: int = 4096, rounds: int = 20) -> int:
    """Quantizers and casts on one BF16 matrix: microseconds and TB/s."""
    return _finish(quantize.measure(tokens, width, rounds), out)


def run_gemm(out: Out = "", tokens: int = 16384, rounds: int = 10) -> int:
    """FP8 GEMMs of the GPT-6.7B linears: TFLOP/s and error against float64."""
    return _finish(gemm.measure(tokens, rounds), out)


def run_linear(
    out: Out = "",
    tokens: int = 16384,
    rounds: int = 10,
    recipes: str = "mxfp4,mxfp4-fp8,fp4-folded,fp8",
    shapes: str = "qkv,out,up,down",
    peers: bool = True,
) -> int:
    """Forward and backward of the GPT-6.7B linears, against BF16 and, with peers, torchao."""
    found = linear.measure(tokens, rounds, recipes.split(","), shapes.split(","), peers)
    return _finish(found, out)


def run_step(
    out: Out = "",
    preset: str = "gpt-6.7b",
    recipes: str = "bf16,mxfp4-fp8",
    layers: int = 0,
    micro_batch: int = 4,
    micro_batches: int = 1,
    steps: int = 6,
    graph: bool = True,
) -> int:
    """Whole training steps of a preset, optimizer included, on random tokens: tokens/s."""
    shape = layers, micro_batch, micro_batches
    return _finish(step.measure(preset, recipes.split(","), *shape, steps, graph), out)


def _finish(report: Report, out: str) -> int:
    report.show()
    if out:
        report.write(Path(out), ["python", *sys.argv])
    return int(report.failed)


COMMANDS = {"quantize": run_quantize, "gemm": run_gemm, "linear": run_linear, "step": run_step}


def main(arguments: list[str]) -> int:
    """Run one benchmark; 1 if a row failed its check, 2 if it cannot run."""
    try:
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA GPU is visible to torch: run this on an H100 or H200")
        code: int = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
