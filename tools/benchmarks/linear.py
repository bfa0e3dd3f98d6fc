"""Forward and backward of one linear under every recipe, beside BF16 and torchao's float8.

All quantization is included. The weight is quantized once a step: in full for one micro-batch a
step ("at 1"), an eighth of it for eight ("at 8"). Inputs, outputs and gradients are BF16, biases
are left out, as in the baseline, which is the three plain BF16 matrix products.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks.gemm import LINEARS
from benchmarks.report import FAILED, Report
from benchmarks.timing import Time, ceilings, graphed, interleaved, relative
from megafp4.backends import resolve_backend
from megafp4.linear import LinearOp
from megafp4.precision import Precision
from megafp4.recipes import get_recipe

_LIMIT = 5e-3
"""Relative difference to the reference backend, which multiplies in FP64 on a GPU."""
_TORCHAO_LIMIT = 0.1
"""Relative difference of torchao's results to BF16's: those of its formats."""
_COLUMNS = (
    "linear, recipe",
    "forward ms",
    "backward ms",
    "backward x at 8",
    "backward x at 1",
    "both x at 8",
    "both x at 1",
)


def measure(
    tokens: int, rounds: int, recipes: Sequence[str], shapes: Sequence[str], with_peers: bool
) -> Report:
    """Time the recipes on some of GPT-6.7B's linears, and their geometric means."""
    report = Report(f"Linears of GPT-6.7B, {tokens} tokens", _COLUMNS, "both x at 8", ceilings())
    peers = _torchao() if with_peers else {}
    for shape in shapes:
        _measure_shape(report, tokens, rounds, recipes, shape, peers)
    for recipe in (*recipes, *peers):
        rows = [row for row in report.rows if row["linear, recipe"].endswith(f", {recipe}")]
        if any(FAILED in row.values() for row in rows):
            continue
        means: list[float | str] = []
        for column in _COLUMNS[3:]:
            values = [row[column] for row in rows]
            known = all(isinstance(value, float) for value in values)
            means.append(math.prod(values) ** (1 / len(values)) if known else "")
        worst = max(row["error"] for row in rows)
        limit = max(row["limit"] for row in rows)
        report.add(f"geometric mean, {recipe}", "", "", *means, error=worst, limit=limit)
    return report


def _measure_shape(
    report: Report,
    tokens: int,
    rounds: int,
    recipes: Sequence[str],
    shape: str,
    peers: Mapping[str, str],
) -> None:
    wide, out = LINEARS[shape]
    x = torch.randn(tokens, wide, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(tokens, out, device="cuda", dtype=torch.bfloat16) * 1e-4
    w = (torch.randn(out, wide, device="cuda") * 0.02).bfloat16()
    work: dict[str, Callable[[], object]] = {
        "base forward": lambda: x @ w.t(),
        "base backward": lambda: (dy @ w, dy.t() @ x),
    }
    errors = {}
    for recipe in recipes:
        work |= _own(recipe, x, dy, w)
        errors[recipe] = _error(recipe, x, dy, w)
    for name in peers:
        both = _peer(peers[name], x, dy, w)
        work[f"{name} both"] = both
        errors[name] = _peer_error(both, x, dy, w)
    times = interleaved({name: graphed(one) for name, one in work.items()}, rounds)
    forward, backward = times["base forward"].median, times["base backward"].median
    whole = forward + backward
    for recipe in recipes:
        fp, bp, fw, bw = (times[f"{recipe} {part}"].median for part in _PARTS)
        at8, at1 = (fw - fp) / 8, fw - fp
        more8, more1 = (bw - bp) / 8, bw - bp
        report.add(
            f"{shape}, {recipe}",
            fp,
            bp,
            backward / (bp + more8),
            backward / (bp + more1),
            whole / (fp + bp + at8 + more8),
            whole / (fp + bp + at1 + more1),
            error=errors[recipe],
            limit=_LIMIT,
            quartiles_ms={part: _spread(times[f"{recipe} {part}"]) for part in _PARTS},
            baseline_ms=[forward, backward],
        )
    for name in peers:
        both_ms = whole / times[f"{name} both"].median
        values = ("", "", "", "", "", both_ms)
        report.add(f"{shape}, {name}", *values, error=errors[name], limit=_TORCHAO_LIMIT)


_PARTS = ("forward", "backward", "forward with weight", "backward with weight")


def _spread(time: Time) -> list[float]:
    return [time.low, time.high]


def _op(recipe: str, backend: str) -> LinearOp:
    return LinearOp(get_recipe(recipe), resolve_backend(backend), Precision(seed=1, step=2))


def _own(recipe: str, x: Tensor, dy: Tensor, w: Tensor) -> dict[str, Callable[[], object]]:
    op = _op(recipe, "hopper")
    at = op.precision.position
    _, kept = op.fprop(x, w, at, out_dtype=torch.bfloat16)

    def forward() -> object:
        return op.fprop(x, w, at, out_dtype=torch.bfloat16)

    def backward() -> object:
        return op.backward(dy, kept, w, at)

    def afresh(part: Callable[[], object]) -> Callable[[], object]:
        fresh = _op(recipe, "hopper")

        def run() -> object:
            fresh.forget_weights()
            if part is forward:
                return fresh.fprop(x, w, at, out_dtype=torch.bfloat16)
            return fresh.backward(dy, kept, w, at)

        return run

    parts = (forward, backward, afresh(forward), afresh(backward))
    return {f"{recipe} {name}": part for name, part in zip(_PARTS, parts, strict=True)}


def _error(recipe: str, x: Tensor, dy: Tensor, w: Tensor) -> float:
    """Largest relative difference of y, dx and dW to the reference backend's, on the same data."""
    results = []
    for backend in ("hopper", "reference"):
        op = _op(recipe, backend)
        y, kept = op.fprop(x, w, op.precision.position, out_dtype=torch.bfloat16)
        results.append((y, *op.backward(dy, kept, w, op.precision.position)))
        del op, kept
    return max(relative(found, expected) for found, expected in zip(*results, strict=True))


def _torchao() -> dict[str, str]:
    """Rows of torchao by name, and its recipes; none where it is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    return {"torchao tensor-wise": "tensorwise", "torchao row-wise": "rowwise"}


def _peer(recipe: str, x: Tensor, dy: Tensor, w: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    plain = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(w)
    module = nn.Sequential(plain)
    config = Float8LinearConfig.from_recipe_name(recipe)
    convert_to_float8_training(module, config=config)
    compiled = torch.compile(module)
    weight = next(module.parameters())
    leaf = x.detach().requires_grad_()

    def both() -> tuple[Tensor, ...]:
        y = compiled(leaf)
        return y.detach(), *torch.autograd.grad(y, (leaf, weight), dy)

    return both


def _peer_error(both: Callable[[], tuple[Tensor, ...]], x: Tensor, dy: Tensor, w: Tensor) -> float:
    found, expected = both(), (x @ w.t(), dy @ w, dy.t() @ x)
    return max(relative(a, b) for a, b in zip(found, expected, strict=True))
