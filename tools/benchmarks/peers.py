"""Other libraries' FP8, where installed: torchao and Transformer Engine.

What they compute is checked against BF16, with a limit as wide as their formats.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.quantize_rows import Row
from benchmarks.timing import relative

LIMIT = 0.1
"""Largest relative difference of a result to BF16's: FP8 has two or three mantissa bits."""
_CAST_LIMIT = 0.05
"""The same of one operand."""

Both = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Forward and backward of a linear: y, dx and dW."""


def cast_peers(x: Tensor) -> Iterator[Row]:
    """Casts to FP8, the range included.

    Args:
        x: BF16 [tokens, width], on a GPU.
    """
    if not x.is_cuda:
        return
    if _installed("torchao"):
        yield _torchao_cast(x, "tensor-wise", None)
        yield _torchao_cast(x, "row-wise", -1)
    if _installed("transformer_engine"):
        yield from _engine_casts(x)


def linear_peers(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Both]]:
    """What makes forward and backward of a linear out of x, dy and the weight, by name."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Both]] = {}
    if device != "cuda":
        return found
    if _installed("torchao"):
        found["torchao tensor-wise"] = lambda x, dy, w: _torchao("tensorwise", x, dy, w)
        found["torchao row-wise"] = lambda x, dy, w: _torchao("rowwise", x, dy, w)
    if _installed("transformer_engine"):
        for name in ("delayed", "current", "block"):
            found[f"Transformer Engine {name}"] = lambda x, dy, w, name=name: _engine(
                name, x, dy, w
            )
    return found


def peer_error(both: Both, x: Tensor, dy: Tensor, w: Tensor) -> float:
    """Largest relative difference of y, dx and dW to BF16's."""
    expected = (x @ w.t(), dy @ w, dy.t() @ x)
    return max(relative(a, b) for a, b in zip(both(), expected, strict=True))


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _torchao_cast(x: Tensor, name: str, axis: int | None) -> Row:
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    granularity = ScalingGranularity.TENSORWISE if axis is None else ScalingGranularity.AXISWISE
    kind = torch.float8_e4m3fn

    @torch.compile(dynamic=False)
    def cast(given: Tensor) -> tuple[Tensor, Tensor]:
        scale = tensor_to_scale(given, kind, scaling_granularity=granularity, axiswise_dim=axis)
        return to_fp8_saturated(given.float() * scale, kind), scale

    def check() -> float:
        data, scale = cast(x)
        return relative(data.float() / scale, x)

    return Row(
        f"torchao {name} with amax, row", "other libraries", lambda: cast(x), check,
        _CAST_LIMIT, 2, 1, 3,
    )  # fmt: skip


def _engine_casts(x: Tensor) -> Iterator[Row]:
    import transformer_engine_torch as engine
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import (
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
    )

    kind = engine.DType.kFloat8E4M3
    scale = 448.0 / x.abs().max().float().view(1)
    made = {
        "delayed": Float8Quantizer(scale=scale, amax=torch.zeros_like(scale), fp8_dtype=kind),
        "current": Float8CurrentScalingQuantizer(fp8_dtype=kind, device=x.device),
        "block": Float8BlockQuantizer(fp8_dtype=kind, rowwise=True, columnwise=True),
    }
    for name, quantizer in made.items():
        quantizer.set_usage(rowwise=True, columnwise=True)
        yield Row(
            f"Transformer Engine {name}, row + col", "other libraries",
            lambda quantizer=quantizer: quantizer(x),
            lambda quantizer=quantizer: relative(quantizer(x).dequantize(), x),
            _CAST_LIMIT, 2, 2, 3,
        )  # fmt: skip


def _torchao(recipe: str, x: Tensor, dy: Tensor, w: Tensor) -> Both:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    module = nn.Sequential(_plain(w))
    convert_to_float8_training(module, config=Float8LinearConfig.from_recipe_name(recipe))
    return _both(torch.compile(module, dynamic=False), next(module.parameters()), x, dy)


def _engine(name: str, x: Tensor, dy: Tensor, w: Tensor) -> Both:
    from transformer_engine import pytorch as engine
    from transformer_engine.common import recipe as recipes

    kinds = {
        "delayed": recipes.DelayedScaling,
        "current": recipes.Float8CurrentScaling,
        "block": recipes.Float8BlockScaling,
    }
    recipe = kinds[name]()
    module = engine.Linear(
        w.shape[1], w.shape[0], bias=False, params_dtype=w.dtype, device=w.device
    )
    with torch.no_grad():
        module.weight.copy_(w)

    def forward(given: Tensor) -> Tensor:
        with engine.fp8_autocast(enabled=True, fp8_recipe=recipe):
            return module(given)

    both = _both(forward, module.weight, x, dy)
    for _ in range(2):  # until the delayed scales have seen the data
        both()
    return both


def _plain(w: Tensor) -> nn.Linear:
    plain = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(w)
    return plain


def _both(forward: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor, dy: Tensor) -> Both:
    leaf = x.detach().requires_grad_()

    def both() -> tuple[Tensor, Tensor, Tensor]:
        y = forward(leaf)
        dx, dw = torch.autograd.grad(y, (leaf, weight), dy)
        return y.detach(), dx, dw

    return both
