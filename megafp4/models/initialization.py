"""Initial weights as a function of (seed, parameter name), and of nothing else.

Recipes, backends and the order of construction must not change where training starts, or a
comparison of recipes would compare luck. So every parameter has its own generator.
"""

import hashlib
import math
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from megafp4.config import ModelConfig
from megafp4.errors import ConfigError

_MOST_THREADS = 32
_RESIDUAL_OUTPUTS = ("attention.out.weight", "mlp.down.weight")


def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of ``model`` in place with its initial value.

    Weights that live on a grid (DQT) must be put there afterwards.

    Raises:
        ConfigError: A parameter that no rule covers.
    """
    # Each generator is serial, but they are independent and run outside the interpreter's lock:
    # one thread a core draws 6.7 B weights in seconds. Only a few values wait at a time.
    workers = max(1, min(os.cpu_count() or 1, _MOST_THREADS))
    waiting: deque[tuple[nn.Parameter, Future[Tensor]]] = deque()
    with torch.no_grad(), ThreadPoolExecutor(workers) as pool:
        for name, parameter in model.named_parameters():
            value = pool.submit(initial_value, name, parameter.shape, config, seed)
            waiting.append((parameter, value))
            if len(waiting) > workers:
                _fill(*waiting.popleft())
        while waiting:
            _fill(*waiting.popleft())


def _fill(parameter: nn.Parameter, value: Future[Tensor]) -> None:
    parameter.copy_(value.result())


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """Return the FP32 initial value of one parameter, on the CPU.

    Norm weights are 1 and biases 0; matrices are normal with ``init_std``, those that write to the
    residual stream with ``init_std / sqrt(2 layers)`` [GPT-2, section 2.3; Megatron-LM].

    Args:
        name: Name in the model, e.g. ``blocks.3.attention.qkv.weight``.
        shape: Full (unsharded) shape.
        config: Gives ``init_std`` and the number of layers.
        seed: Seed of the run.

    Raises:
        ConfigError: A parameter that no rule covers.
    """
    if name.endswith("norm.weight"):
        return torch.ones(*shape, device="cpu")
    if name.endswith(".bias"):
        return torch.zeros(*shape, device="cpu")
    if len(shape) != 2:
        raise ConfigError(
            f"parameter {name!r} of shape {tuple(shape)} has no initialisation rule: "
            "only matrices, biases and norm weights have one"
        )
    std = config.init_std
    if name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * config.layers)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # The sign bit is dropped: manual_seed takes 63 bits on every platform.
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    # Drawn in FP64, whose code path, unlike FP32's, is the same on CPUs with and without AVX2.
    drawn = torch.empty(*shape, dtype=torch.float64, device="cpu")
    return drawn.normal_(0.0, std, generator=generator).float()
