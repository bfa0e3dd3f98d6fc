"""How meshes are written on the command line: ``dp2``, ``tp2xdp2:sequence``, ``dp4:zero2+bf16``."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_AXIS = re.compile(r"(pp|dp|cp|tp)([1-9][0-9]*)")
_NUMBERED = re.compile(r"(zero|chunks|nodes)([1-9][0-9]*)")
_OPTIONS: dict[str, dict[str, Any]] = {
    "sequence": {"sequence": True},
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {"schedule": "1f1b"},
    "interleaved": {"schedule": "interleaved", "chunks": 2},
    "zero-bubble": {"schedule": "zero-bubble"},
    "ring": {"attention": "ring"},
    "all-gather": {"attention": "all-gather"},
    "fp8": {"wire": "fp8"},
    "fp8-peers": {"wire": "fp8-peers"},
    "bf16": {"wire": "bf16"},
    "fp32": {"wire": "fp32"},
    "fp8-lm": {"wire": "fp8-lm"},
    "deepspeed": {"engine": "deepspeed"},
}
_GRAPH, _OFFLOAD = "graph", "offload"


class Layout(NamedTuple):
    """One way to use some GPUs."""

    name: str
    """As it was written."""
    ranks: int
    """GPUs."""
    parallel: dict[str, Any]
    """Fields of the configuration's ``parallel``."""
    graph: bool = False
    """Whether CUDA graphs are replayed."""
    offload: bool = False
    """Whether optimizer state lies in host memory."""


def parse(text: str) -> Layout:
    """Read one mesh.

    Axes (pp, dp, cp, tp) with their sizes are joined by ``x``; ``1`` is one GPU. Behind a colon
    stand options joined by ``+``: ``sequence``, ``zero1`` to ``zero3``, a schedule (``interleaved``
    has two chunks, or as many as ``chunksN`` says), ``ring``, a wire (``fp8``, ``fp8-peers``,
    ``bf16``, ``fp32``, ``fp8-lm``), ``nodesN``, ``deepspeed``; ``graph`` replays CUDA graphs,
    ``offload`` keeps optimizer state in host memory.

    Raises:
        ValueError: It is not written like that.
    """
    axes, _, options = text.partition(":")
    sizes: dict[str, int] = {}
    for part in axes.split("x") if axes != "1" else ():
        match = _AXIS.fullmatch(part)
        if match is None or match[1] in sizes:
            raise ValueError(
                f"mesh {text!r} has {part!r} for an axis: write pp, dp, cp or tp with a number, "
                "each once, joined by x, or 1 for one GPU"
            )
        sizes[match[1]] = int(match[2])
    parallel: dict[str, Any] = {axis: size for axis, size in sizes.items() if axis != "dp"}
    wanted = options.split("+") if options else []
    for option in wanted:
        if option in (_GRAPH, _OFFLOAD):
            continue
        numbered = _NUMBERED.fullmatch(option)
        if numbered is None and option not in _OPTIONS:
            known = ", ".join((*_OPTIONS, "zero1 to zero3", "chunksN", "nodesN", _GRAPH, _OFFLOAD))
            raise ValueError(f"mesh {text!r} has the unknown option {option!r}: choose of {known}")
        parallel |= _OPTIONS[option] if numbered is None else {numbered[1]: int(numbered[2])}
    ranks = 1
    for size in sizes.values():
        ranks *= size
    return Layout(text, ranks, parallel, _GRAPH in wanted, _OFFLOAD in wanted)
