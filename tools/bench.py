"""Measure kernels, linear layers and training on one GPU or several, each beside its baseline.

    python tools/bench.py quantize|gemm|linear|step|optim|fit [--out docs/results/NAME] [options]
    python tools/bench.py reduce|parallel [--out docs/results/NAME] [options]
    python tools/bench.py compare BEFORE AFTER
    python tools/bench.py roofline RESULTS ... --out roofline.png

Every row is checked against the specification before it is timed; a row that fails shows no speed
and the command ends with exit status 1. See docs/performance.md for how to read the tables.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from benchmarks import compare, fit, gemm, linear, meshes, optim, parallel, quantize, reduce, step
from benchmarks.ceilings import measure_ceilings
from benchmarks.environment import refuse_dirty_tree
from benchmarks.plots import draw_roofline
from benchmarks.reduce_run import Setup as Sums
from benchmarks.report import Report
from benchmarks.session import Session
from benchmarks.step_run import Setup
from benchmarks.train_run import Job


@dataclass(frozen=True)
class Common:
    """What all measuring commands take."""

    out: str = ""
    """Folder for results.json, which is kept up to date while it runs, and table and plots."""
    rows: str = "*"
    """Only rows whose name matches one of these globs, separated by semicolons."""
    allow_dirty: bool = False
    """Measure although the working tree differs from every commit."""

    def session(self, budget: float, gpus: int = 1, *, ceilings: bool = True) -> Session:
        """Begin.

        Args:
            budget: Seconds.
            gpus: How many are needed.
            ceilings: Whether rows are compared with what one GPU reaches.

        Raises:
            RuntimeError: There are too few GPUs, or the tree is dirty.
        """
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA GPU is visible to torch: run this on an H100 or H200")
        if torch.cuda.device_count() < gpus:
            raise RuntimeError(
                f"{gpus} GPUs were asked for and torch sees {torch.cuda.device_count()}: ask for "
                "fewer"
            )
        if not self.allow_dirty:
            refuse_dirty_tree()
        folder = Path(self.out) if self.out else None
        command = ("python", *sys.argv)
        measured = measure_ceilings if ceilings else dict
        return Session(self.rows, budget, folder, command, ceilings=measured)


Shared = tyro.conf.OmitArgPrefixes[Common]
Budget = Annotated[float, tyro.conf.arg(help="Seconds after which no further row is started.")]
_COMMON = Common()


def run_quantize(
    common: Shared = _COMMON,
    budget: Budget = 60.0,
    tokens: int = 16384,
    width: int = 4096,
    rounds: int = 20,
) -> int:
    """Quantizers and casts on one matrix: microseconds, TB/s and fraction of the roofline."""
    return _finish(quantize.measure(common.session(budget), tokens, width, rounds))


def run_gemm(
    common: Shared = _COMMON, budget: Budget = 60.0, tokens: int = 16384, rounds: int = 10
) -> int:
    """8-bit GEMMs of the GPT-6.7B linears: TFLOP/s and error against float64."""
    return _finish(gemm.measure(common.session(budget), tokens, rounds))


def run_linear(
    common: Shared = _COMMON,
    budget: Budget = 120.0,
    tokens: int = 16384,
    rounds: int = 8,
    recipes: str = ",".join(linear.RECIPES),
    shapes: str = "qkv,out,up,down",
    peers: bool = True,
) -> int:
    """Forward and backward of the GPT-6.7B linears, against BF16 and other libraries' FP8."""
    session = common.session(budget)
    chosen = recipes.split(","), shapes.split(",")
    return _finish(linear.measure(session, tokens, rounds, *chosen, peers))


def run_step(
    common: Shared = _COMMON,
    budget: Budget = 100.0,
    preset: str = "gpt-6.7b",
    recipes: str = "mxfp4-fp8",
    layers: int = 0,
    micro_batch: int = 4,
    micro_batches: int = 1,
    steps: int = 20,
    graph: bool = True,
    recompute: Literal["none", "selective", "full"] = "none",
    saved_as: Literal["recipe", "input", "operand", "packed"] = "recipe",
    optim_states: str = "",
    band: float = 0.05,
) -> int:
    """Whole training steps of a preset, optimizer included: tokens/s, MFU and losses.

    BF16 runs first, each recipe in a process of its own. The mean loss of the last quarter of the
    steps must lie within the band, a relative difference, around BF16's.
    """
    setup = Setup(
        preset=preset,
        recipe="bf16",
        steps=steps,
        layers=layers,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        graph=graph,
        recompute=recompute,
        saved_as=saved_as,
        optim_states=optim_states,
    )
    return _finish(step.measure(common.session(budget), setup, recipes.split(","), band))


def run_optim(
    common: Shared = _COMMON,
    budget: Budget = 45.0,
    parameters: int = 1 << 28,
    rounds: int = 20,
) -> int:
    """The optimizer's step with every way to keep states: fraction of the copy rate, memory."""
    return _finish(optim.measure(common.session(budget), parameters, rounds))


def run_fit(
    common: Shared = _COMMON,
    budget: Budget = 180.0,
    preset: str = "gpt-13b",
    recipe: str = "mxfp4-fp8",
    states: str = "fp8lm",
    grad_dtype: Literal["float32", "bfloat16"] = "bfloat16",
    recompute: Literal["none", "selective", "full"] = "full",
    layers: int = 0,
    micro_batch: int = 4,
    micro_batches: int = 1,
    steps: int = 20,
    data: tuple[str, ...] = (),
    tokenizer: str = "bytes",
    vocab_size: int = 0,
    lr: float = 1e-4,
) -> int:
    """Real training steps of what hardly fits on one GPU: losses, and memory by kind.

    Without token files it trains on the text of this Python, as bytes. The vocabulary is the
    preset's unless `--vocab-size` gives another, which fits the tokenizer. States are separated by
    commas; `fp8lm:offload` puts those of a row in host memory.
    """
    job = Job(
        preset=preset,
        recipe=recipe,
        folder="",
        cache="",
        steps=steps - 3,
        layers=layers,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        data=data,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        grad_dtype=grad_dtype,
        recompute=recompute,
        dtype="bfloat16",
        lr=lr,
    )
    session = common.session(budget, ceilings=False)
    return _finish(fit.measure(session, job, states.split(",")))


def run_reduce(
    common: Shared = _COMMON,
    budget: Budget = 60.0,
    gpus: int = 2,
    elements: int = 1 << 28,
    rounds: int = 20,
    chunks: tuple[int, ...] = (1, 2, 4, 8),
) -> int:
    """Sums of gradients over GPUs: NCCL's, and those in FP8 with FP32 additions."""
    setup = Sums(elements=elements, rounds=rounds, chunks=chunks)
    session = common.session(budget, gpus, ceilings=False)
    return _finish(reduce.measure(session, setup, gpus))


def run_parallel(
    common: Shared = _COMMON,
    budget: Budget = 300.0,
    meshes_: Annotated[str, tyro.conf.arg(name="meshes")] = "1 dp2",
    recipes: str = "bf16,mxfp4-fp8",
    preset: str = "gpt-6.7b",
    layers: int = 0,
    micro_batch: int = 4,
    micro_batches: int = 1,
    steps: int = 8,
    recompute: Literal["none", "selective", "full"] = "none",
    saved_as: Literal["recipe", "input", "operand", "packed"] = "recipe",
    optim_states: str = "",
    data: tuple[str, ...] = (),
    tokenizer: str = "bytes",
    vocab_size: int = 0,
    band: float = 0.02,
    single: str = "",
) -> int:
    """Training steps on several GPUs, recipes on meshes: tokens/s per GPU, memory, traffic.

    Meshes are separated by spaces: `dp2`, `tp2:sequence`, `tp2xdp2:zero2+bf16`, `1` for one GPU.
    Every GPU takes the same number of sequences a step, whatever the mesh. The last loss must lie
    within the band around that of the recipe's first mesh of as many GPUs. `--single` names results
    that hold the rows of one GPU.
    """
    layouts = [meshes.parse(one) for one in meshes_.split()]
    job = Job(
        preset=preset,
        recipe="",
        folder="",
        cache="",
        steps=steps,
        layers=layers,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        data=data,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        states=optim_states,
        recompute=recompute,
        dtype="bfloat16",
        saved_as=saved_as,
    )
    session = common.session(budget, max(one.ranks for one in layouts), ceilings=False)
    before = compare.load(Path(single)) if single else None
    return _finish(parallel.measure(session, job, layouts, recipes.split(","), band, before))


def run_compare(before: tyro.conf.Positional[str], after: tyro.conf.Positional[str]) -> int:
    """Print two results of one command side by side; each is a results.json or its folder."""
    compare.show(compare.load(Path(before)), compare.load(Path(after)))
    return 0


def run_roofline(results: tyro.conf.Positional[tuple[str, ...]], out: str = "roofline.png") -> int:
    """Draw the roofline of one or several results, such as those of quantize and gemm."""
    found = [compare.load(Path(one)) for one in results]
    gpu = next((one["environment"].get("gpu", "") for one in found), "")
    draw_roofline(Path(out), f"Measured roofline, {gpu}".rstrip(", "), found)
    return 0


def _finish(report: Report) -> int:
    report.finish()
    report.show()
    return int(report.failed)


COMMANDS = {
    "quantize": run_quantize,
    "gemm": run_gemm,
    "linear": run_linear,
    "step": run_step,
    "optim": run_optim,
    "fit": run_fit,
    "reduce": run_reduce,
    "parallel": run_parallel,
    "compare": run_compare,
    "roofline": run_roofline,
}


def main(arguments: list[str]) -> int:
    """Run one command; 1 if a row failed its check, 2 if it cannot run."""
    try:
        code: int = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
