"""One optimizer for both kinds of parameter: dense ones and those that live on a grid.

* A dense parameter (embedding, norm, bias, head, and every linear outside the DQT recipes) is its
  own FP32 master and takes an AdamW step.
  On a GPU all of them move in one pass over memory (:func:`~megafp4.optim.adamw.fused_adamw_step`).
* A parameter with a ``.grid`` owns no memory; its :class:`~megafp4.numerics.grid.GridWeight` takes
  a Direct Quantized Training step.

Both keep two FP32 moments. Weight decay applies to tensors of two or more dims (matrices and
embeddings) and never to biases and norm gains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megafp4.config import OptimConfig
from megafp4.errors import CheckpointError, ConfigError, DivergenceError
from megafp4.numerics.grid import GridWeight, StoreStatistics
from megafp4.numerics.philox import Key
from megafp4.optim.adamw import AdamHyper, adamw_step, fused_adamw_step
from megafp4.optim.dqt import dqt_step


class Optimizer:
    """AdamW for dense parameters, Direct Quantized Training for grid parameters.

    The learning rate and the step index are arguments of :meth:`step`, not state: the only state is
    the moments, so a resumed run cannot disagree with its schedule.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        config: OptimConfig,
        seed: int,
        *,
        fused: bool = False,
    ) -> None:
        """Allocate the moments; use :func:`build_optimizer`, which checks the parameters.

        Args:
            params: Parameters by name.
            config: Adam's constants.
            seed: Seed of the stochastic rounding of grid parameters.
            fused: Move the dense parameters, which lie on one device, in one kernel.
        """
        self.fused = fused
        self.params = dict(params)
        self.config = config
        self.seed = seed
        self.exp_avg = {name: _moment(param) for name, param in self.params.items()}
        self.exp_avg_sq = {name: _moment(param) for name, param in self.params.items()}
        self.grid_statistics: dict[str, StoreStatistics] = {}
        """Flips and saturation of each grid parameter in the last step."""

    @property
    def can_run_ahead(self) -> bool:
        """Whether :meth:`step` never waits for the device, given device tensors."""
        return self.fused and not any(grid_of(param) for param in self.params.values())

    def step(
        self,
        step: int,
        lr: float,
        grad_scale: float | Tensor = 1.0,
        skip: Tensor | None = None,
    ) -> None:
        """Move every parameter that has a gradient.

        Args:
            step: Index of this optimizer step, counted from 0. It sets Adam's bias correction and
                the random bits of the stochastic rounding.
            lr: Learning rate.
            grad_scale: Multiplies every gradient: the clipping factor of :func:`clip_grad_norm`.
                A tensor (FP64, 0-dim, on the device) needs :attr:`can_run_ahead`; what the
                gradients hold afterwards is not specified.
            skip: FP32, 0-dim, on the device, together with a tensor ``grad_scale``: where it is 1
                nothing moves.

        Raises:
            DivergenceError: ``grad_scale`` is not finite, which means that the gradients are not
                (nothing has moved then), or the new value of a grid parameter is not. A tensor is
                not looked at: whoever passes one sets ``skip``.
        """
        if isinstance(grad_scale, Tensor):
            self._fused_step(step, lr, grad_scale.float().view(1), skip)
            return
        if not math.isfinite(grad_scale):
            raise DivergenceError(
                f"the gradients of step {step} hold NaN or Inf: lower the learning rate or go on "
                "from an earlier checkpoint"
            )
        self.grid_statistics = {}
        if self.fused:
            scale = None
            if grad_scale != 1.0:
                device = next(iter(self.params.values())).device
                scale = torch.full((1,), grad_scale, device=device)
            self._fused_step(step, lr, scale, None)
        for name, param in self.params.items():
            grid = grid_of(param)
            if param.grad is None or (grid is None and self.fused):
                continue
            grad = param.grad.float()
            if grad_scale != 1.0:
                grad = grad * grad_scale
            m, v = self.exp_avg[name], self.exp_avg_sq[name]
            hyper = AdamHyper(lr, self.config.betas, self.config.eps, self.decay_of(param))
            if grid is None:
                adamw_step(param, grad, m, v, hyper, step)
            else:
                key = Key(self.seed, step, grid.layer, "update", "b")
                self.grid_statistics[name] = dqt_step(grid, grad, m, v, hyper, step, key)

    def _fused_step(self, step: int, lr: float, scale: Tensor | None, skip: Tensor | None) -> None:
        """Move all dense parameters: those that decay in one call, the others in another."""
        groups: dict[float, list[str]] = {}
        for name, param in self.params.items():
            if param.grad is not None and grid_of(param) is None:
                groups.setdefault(self.decay_of(param), []).append(name)
        for decay, names in groups.items():
            params = [self.params[name] for name in names]
            grads = [param.grad.float() for param in params if param.grad is not None]
            moments = ([self.exp_avg[n] for n in names], [self.exp_avg_sq[n] for n in names])
            hyper = AdamHyper(lr, self.config.betas, self.config.eps, decay)
            fused_adamw_step(
                params,
                grads,
                moments,
                hyper,
                step,
                scale,
                None if skip is None else skip.view(1),
            )

    def decay_of(self, param: Tensor) -> float:
        """Weight decay of a parameter: the configured one for two or more dims, else 0."""
        return self.config.weight_decay if param.dim() >= 2 else 0.0

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for param in self.params.values():
            param.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The moments by name: ``exp_avg.<parameter>`` and ``exp_avg_sq.<parameter>``."""
        return {
            f"{kind}.{name}": tensor
            for kind, moments in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq))
            for name, tensor in moments.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy saved moments in.

        Raises:
            CheckpointError: The names, shapes or dtypes are not exactly this optimizer's; nothing
                has been copied then.
        """
        mine = self.state_dict()
        strange = sorted(mine.keys() ^ state.keys())
        if strange:
            where = "lacks" if strange[0] in mine else "has an unknown"
            raise CheckpointError(
                f"the saved optimizer {where} {strange[0]!r} ({len(strange)} names differ): load "
                "the optimizer of the same model and recipe"
            )
        for name, tensor in mine.items():
            found = state[name]
            if found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{name!r} of the saved optimizer is {found.dtype} {list(found.shape)}, "
                    f"expected {tensor.dtype} {list(tensor.shape)}: load the optimizer of the same "
                    "model and recipe"
                )
        for name, tensor in mine.items():
            tensor.copy_(state[name])

    def state_bytes(self) -> int:
        """Bytes of the moments, measured on their storages."""
        return storage_bytes(self.state_dict().values())


def build_optimizer(
    named_params: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    seed: int,
    *,
    fused: bool = False,
) -> Optimizer:
    """Build the optimizer of a model.

    Args:
        named_params: ``model.named_parameters()``; those that need no gradient are left out.
        config: Adam's constants.
        seed: Seed of the run.
        fused: Move the dense parameters, which must lie on one device, in one kernel.

    Raises:
        ConfigError: A dense parameter is not FP32, a name or parameter comes twice, or two grid
            parameters share the stream id from which their random bits are drawn.
    """
    params: dict[str, nn.Parameter] = {}
    owners: dict[int, str] = {}
    streams: dict[int, str] = {}
    for name, param in named_params:
        if not param.requires_grad:
            continue
        if name in params or id(param) in owners:
            raise ConfigError(
                f"parameter {name!r} was given twice (first as {owners.get(id(param), name)!r}): "
                "list every parameter once, as model.named_parameters() does"
            )
        grid = grid_of(param)
        if grid is None and param.dtype != torch.float32:
            raise ConfigError(
                f"parameter {name!r} is {param.dtype}: keep parameters in torch.float32, the "
                "linears cast what they multiply"
            )
        if grid is not None and grid.layer in streams:
            raise ConfigError(
                f"{streams[grid.layer]!r} and {name!r} both have layer id {grid.layer} and would "
                "round with the same random bits: give every linear its own layer id"
            )
        params[name] = param
        owners[id(param)] = name
        if grid is not None:
            streams[grid.layer] = name
    return Optimizer(params, config, seed, fused=fused)


def grid_of(param: Tensor) -> GridWeight | None:
    """The grid that a parameter stands for, or None for a dense one."""
    grid: GridWeight | None = getattr(param, "grid", None)
    return grid


def memory_report(
    named_params: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer
) -> dict[str, float]:
    """Bytes per parameter that training keeps between steps, measured on tensor storages.

    Counts weights (dense values, or packed codes with their scales, and the few bytes of a grid
    parameter's placeholder) and moments; not gradients and activations. A tensor shared under
    several names counts once.

    Args:
        named_params: ``model.named_parameters()``.
        optimizer: The optimizer of the same model.

    Returns:
        ``{"weights": .., "optimizer": .., "total": ..}`` in bytes per parameter.
    """
    params = {id(param): param for _, param in named_params}.values()
    tensors: list[Tensor] = []
    for param in params:
        tensors.append(param)
        grid = grid_of(param)
        if grid is not None:
            tensors += grid.state_dict().values()
    count = max(1, sum(param.numel() for param in params))
    weights, moments = storage_bytes(tensors), optimizer.state_bytes()
    return {
        "weights": weights / count,
        "optimizer": moments / count,
        "total": (weights + moments) / count,
    }


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind the tensors, shared memory counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _moment(param: Tensor) -> Tensor:
    """FP32 zeros of the parameter's shape (``zeros_like`` would copy the strides of a grid's)."""
    return torch.zeros(param.shape, dtype=torch.float32, device=param.device)
