"""Forward and backward of one linear under every recipe, beside BF16 and other libraries' FP8.

All quantization is included. The weight is quantized once a step, so what a micro-batch costs
depends on how many a step has: both steps of one and of eight are timed as a whole, and forward
and backward alone with the weight quantized already ("cached") and anew ("at 1"). Inputs, outputs
and gradients are BF16, biases are left out, and so is the sum of dW over micro-batches, as in the
baseline, which is the three plain BF16 matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.ceilings import PRODUCTS, product_of
from benchmarks.gemm import LINEARS
from benchmarks.peers import LIMIT as PEER_LIMIT
from benchmarks.peers import Both, linear_peers, peer_error
from benchmarks.report import FAILED, Report
from benchmarks.session import Session
from benchmarks.timing import Time, Work, relative
from megafp4.backends import resolve_backend
from megafp4.backends.base import hollow
from megafp4.linear_op import LinearOp
from megafp4.models.factory import keep_input_as
from megafp4.numerics.grid import GridWeight
from megafp4.precision import Position, Precision
from megafp4.recipes import Recipe, get_recipe

_LIMIT = 5e-3
"""Relative difference to the reference backend, which multiplies in FP64 on a GPU."""
_COLUMNS = (
    "linear, recipe",
    "forward ms",
    "backward ms",
    "forward x at 1",
    "backward x at 1",
    "both x at 1",
    "forward x at 8",
    "backward x at 8",
    "both x at 8",
    "of roofline",
    "kept bytes",
)
_MEANS = ("forward x at 1", "backward x at 1", "both x at 1", "forward x at 8",
          "backward x at 8", "both x at 8", "of roofline")  # fmt: skip
RECIPES = ("mxfp4", "mxfp4-fp8", "fp8", "fp4-folded", "fp4", "nvfp4", "bitnet", "dqt8",
           "mxfp4-fp8@input", "mxfp4-fp8@packed", "mxfp4@operand", "mxfp4@packed")  # fmt: skip
"""What is timed by default; behind @ the form in which the input waits for wgrad."""
STEP = 8
"""Micro-batches of the longer step."""
Outputs = tuple[Tensor, Tensor, Tensor]


@dataclass
class Case:
    """One linear: its data and what was already found out about it."""

    name: str
    x: Tensor
    dy: Tensor
    w: Tensor
    expected: dict[str, Outputs] = field(default_factory=dict)
    """y, dx and dW of the reference backend for the latest recipe; its forms share them."""

    def baseline(self) -> dict[str, Work]:
        """The three plain products."""

        def forward() -> object:
            return self.x @ self.w.t()

        def backward() -> object:
            return self.dy @ self.w, self.dy.t() @ self.x

        def both() -> object:
            return forward(), backward()

        return {"base forward": forward, "base backward": backward, "base both": both}


def measure(
    session: Session,
    tokens: int,
    rounds: int,
    recipes: Sequence[str],
    shapes: Sequence[str],
    with_peers: bool,
    backend: str = "hopper",
) -> Report:
    """Time the recipes on some of GPT-6.7B's linears, and their geometric means.

    Args:
        session: Rows that are wanted, budget, timer.
        tokens: Tokens of a micro-batch.
        rounds: Samples of each piece.
        recipes: Names of recipes, each perhaps with ``@`` and ``input``, ``operand`` or ``packed``.
        shapes: Keys of :data:`benchmarks.gemm.LINEARS`.
        with_peers: Whether to time other libraries too.
        backend: Who computes.

    Raises:
        ValueError: An unknown shape.
        ConfigError: An unknown recipe, or a form that its formats do not have.
    """
    unknown = [shape for shape in shapes if shape not in LINEARS]
    if unknown:
        raise ValueError(f"unknown linear {unknown[0]!r}: choose from {', '.join(LINEARS)}")
    made = {name: _recipe(name) for name in recipes}
    report = session.report(f"Linears of GPT-6.7B, {tokens} tokens", _COLUMNS, "both x at 8")
    cases = {shape: _case(shape, tokens, session.device) for shape in shapes}
    peers = linear_peers(session.device) if with_peers else {}
    for name in _in_order(made, peers):
        for shape, case in cases.items():
            if not session.starts(report, f"{shape}, {name}"):
                continue
            if name in made:
                _measure_own(session, report, case, name, made[name], backend, rounds)
            else:
                _measure_peer(session, report, case, name, peers[name], rounds)
        _add_means(report, name, len(cases))
    return report


def _in_order(recipes: Mapping[str, Recipe], peers: Mapping[str, object]) -> Iterator[str]:
    """The first three recipes, then their peers, then the rest: time may run out."""
    names = list(recipes)
    yield from names[:3]
    yield from peers
    yield from names[3:]


def _recipe(name: str) -> Recipe:
    base, _, form = name.partition("@")
    return keep_input_as(get_recipe(base), form or "recipe")  # type: ignore[arg-type]


def _case(shape: str, tokens: int, device: str) -> Case:
    wide, out = LINEARS[shape]
    x = torch.randn(tokens, wide, device=device, dtype=torch.bfloat16)
    dy = torch.randn(tokens, out, device=device, dtype=torch.bfloat16) * 1e-4
    w = (torch.randn(out, wide, device=device) * 0.02).bfloat16()
    return Case(shape, x, dy, w)


@dataclass
class _Run:
    """The three GEMMs of a recipe on one linear."""

    case: Case
    op: LinearOp
    kept_bytes: float = math.nan
    """Bytes an element of the input that waits for backward."""

    @classmethod
    def of(cls, case: Case, recipe: Recipe, backend: str) -> _Run:
        """Make an operation of its own, with nothing quantized yet."""
        op = LinearOp(recipe, resolve_backend(backend), Precision(seed=1, step=2))
        if recipe.grid is not None:
            spec = recipe.grid
            op.grid = GridWeight.from_dense(case.w, spec.bits, spec.range, None, 0)
        return cls(case, op)

    def step(self, micro_batches: int) -> Work:
        """One step: the weight is quantized anew and shared by its micro-batches."""

        def run() -> object:
            self.op.forget_weights()
            for index in range(micro_batches):
                self.once(index)
            return None

        return run

    def once(self, index: int = 0) -> Outputs:
        """Forward and backward of one micro-batch."""
        at = Position(2, index * len(self.case.x))
        y, kept = self.op.fprop(self.case.x, self.case.w, at, out_dtype=torch.bfloat16)
        tensors, _ = hollow(kept)
        self.kept_bytes = sum(one.nbytes for one in tensors) / self.case.x.numel()
        return y, *self.op.backward(self.case.dy, kept, self.case.w, at)

    def parts(self) -> tuple[Work, Work]:
        """Forward and backward, each with the weight quantized before."""
        at = Position(2, 0)
        _, kept = self.op.fprop(self.case.x, self.case.w, at, out_dtype=torch.bfloat16)

        def forward() -> object:
            return self.op.fprop(self.case.x, self.case.w, at, out_dtype=torch.bfloat16)

        def backward() -> object:
            return self.op.backward(self.case.dy, kept, self.case.w, at)

        return forward, backward


def _afresh(run: _Run, part: int) -> Work:
    """Forward or backward of an operation that forgets its weight each time."""
    work = run.parts()[part]

    def anew() -> object:
        run.op.forget_weights()
        return work()

    return anew


def _measure_own(
    session: Session,
    report: Report,
    case: Case,
    name: str,
    recipe: Recipe,
    backend: str,
    rounds: int,
) -> None:
    row = f"{case.name}, {name}"
    checked = _Run.of(case, recipe, backend)

    def pieces() -> dict[str, Work]:
        forward, backward = _Run.of(case, recipe, backend).parts()
        return {
            **case.baseline(),
            "forward": forward,
            "backward": backward,
            "forward anew": _afresh(_Run.of(case, recipe, backend), 0),
            "backward anew": _afresh(_Run.of(case, recipe, backend), 1),
            "both": _Run.of(case, recipe, backend).step(1),
            "both of 8": _Run.of(case, recipe, backend).step(STEP),
        }

    def error() -> float:
        return _error(checked, case, recipe)

    found = session.checked(report, row, _LIMIT, error, pieces, rounds)
    if found is None:
        return
    difference, times = found
    ms = {key: time.median for key, time in times.items()}
    least = _least_ms(checked, case, report.ceilings)
    report.add(
        row,
        ms["forward"],
        ms["backward"],
        *_ratios(ms),
        least / ms["both"],
        checked.kept_bytes,
        error=difference,
        limit=_LIMIT,
        ms=_as_json(times),
    )


def _ratios(ms: Mapping[str, float]) -> list[float]:
    """How many times faster than BF16: forward, backward, both at 1, then at 8.

    Forward and backward of a micro-batch of eight carry an eighth of what quantizing the weight
    adds to them; both at 8 is the timed step of eight.
    """

    def at_eight(part: str) -> float:
        return ms[part] + (ms[f"{part} anew"] - ms[part]) / STEP

    base = ms["base forward"], ms["base backward"]
    return [
        base[0] / ms["forward anew"],
        base[1] / ms["backward anew"],
        ms["base both"] / ms["both"],
        base[0] / at_eight("forward"),
        base[1] / at_eight("backward"),
        STEP * ms["base both"] / ms["both of 8"],
    ]


def _least_ms(run: _Run, case: Case, ceilings: Mapping[str, float]) -> float:
    """Time of the GEMMs that ran, at the ceiling of the tensor cores they ran on."""
    flops = 2 * len(case.x) * case.w.numel() / 1e9
    total = 0.0
    for entry in run.op.precision.ledger.rows():
        total += int(entry["count"]) * flops / ceilings[PRODUCTS[product_of(entry)]]
    return total


def _error(run: _Run, case: Case, recipe: Recipe) -> float:
    """Largest relative difference of y, dx and dW to the reference backend's, on the same data."""
    if recipe.name not in case.expected:
        case.expected = {recipe.name: _Run.of(case, recipe, "reference").once()}
    found, expected = run.once(), case.expected[recipe.name]
    return max(relative(a, b) for a, b in zip(found, expected, strict=True))


def _measure_peer(
    session: Session,
    report: Report,
    case: Case,
    name: str,
    make: Callable[[Tensor, Tensor, Tensor], Both],
    rounds: int,
) -> None:
    row = f"{case.name}, {name}"
    x, dy, w = case.x, case.dy, case.w
    made: list[Both] = []

    def error() -> float:
        made.append(make(x, dy, w))
        return peer_error(made[0], x, dy, w)

    def pieces() -> dict[str, Work]:
        return {"base both": case.baseline()["base both"], "both": made[0]}

    found = session.checked(report, row, PEER_LIMIT, error, pieces, rounds, peer=True)
    if found is None:
        return
    difference, times = found
    # It quantizes the weight at every call, so a step of eight is eight times a step of one.
    ratio = times["base both"].median / times["both"].median
    report.add(
        row, "", "", "", "", ratio, "", "", ratio, "", "",
        error=difference, limit=PEER_LIMIT, ms=_as_json(times),
    )  # fmt: skip


def _as_json(times: Mapping[str, Time]) -> dict[str, dict[str, object]]:
    return {key: time.as_json() for key, time in times.items()}


def _add_means(report: Report, name: str, linears: int) -> None:
    """Geometric means over the linears, if all of them were measured."""
    rows = [row for row in report.rows if row["linear, recipe"].endswith(f", {name}")]
    if len(rows) < linears or any(FAILED in row.values() for row in rows):
        return
    means: dict[str, float | str] = dict.fromkeys(_COLUMNS[1:], "")
    for column in _MEANS:
        values = [row[column] for row in rows]
        if all(isinstance(value, float) for value in values):
            means[column] = math.prod(values) ** (1 / len(values))
    worst, limit = (max(row[key] for row in rows) for key in ("error", "limit"))
    report.add(f"geometric mean, {name}", *means.values(), error=worst, limit=limit)
