"""One optimizer for both kinds of parameter: dense ones and those that live on a grid.

* A dense parameter (embedding, norm, bias, head, and every linear outside the DQT recipes) takes an
  AdamW step. How it and its moments are kept is up to a codec of :mod:`megafp4.optim.states`; what
  has fewer than two dims (biases, norm gains) keeps FP32. On a GPU all parameters of a codec move
  in one launch and one pass over memory.
* A parameter with a ``.grid`` owns no memory; its :class:`~megafp4.numerics.grid.GridWeight` takes
  a Direct Quantized Training step. Its moments are FP32, or COAT's 8 bits.

Weight decay applies to tensors of two or more dims (matrices and embeddings) and never to biases
and norm gains.
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
from megafp4.optim.adamw import AdamHyper, StepNumbers
from megafp4.optim.fused import Dense, FusedSteps, exact_steps
from megafp4.optim.grid_step import GridStep, check_stored, takes_kernel
from megafp4.optim.offload import HostStates
from megafp4.optim.states import CODECS, GRID_CODECS, FP32States, GridCodec, State, StateCodec


class Optimizer:
    """AdamW for dense parameters, Direct Quantized Training for grid parameters.

    The learning rate and the step index are arguments of :meth:`step`, not state: the only state is
    what the codecs keep, so a resumed run cannot disagree with its schedule.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        config: OptimConfig,
        seed: int,
        *,
        fused: bool = False,
        weight_amax: bool = False,
    ) -> None:
        """Allocate the state; use :func:`build_optimizer`, which checks the parameters.

        Args:
            params: Parameters by name; those whose codec keeps BF16 weights become BF16.
            config: Adam's constants, and how state is kept.
            seed: Seed of the stochastic rounding.
            fused: Move the dense parameters, which lie on one device, by kernels if it is a GPU.
            weight_amax: Keep :attr:`weight_amax`.
        """
        self.fused = fused
        self.params = dict(params)
        self.config = config
        self.seed = seed
        self.states: dict[str, State] = {}
        """What is kept of each parameter beside its weight, by kind: on its device or, with
        ``config.offload``, in host memory that :meth:`state_dict` waits for."""
        self.grid_statistics: dict[str, StoreStatistics] = {}
        """Flips and saturation of each grid parameter in the last step."""
        self.weight_amax: dict[str, Tensor] = {}
        """Largest magnitude of each dense parameter after the last step that moved it, as the model
        reads it: FP32 [1] on its device, always at the same address."""
        self._dense: dict[str, Dense] = {}
        self._host = self._host_states() if config.offload else None
        for index, (name, param) in enumerate(self.params.items()):
            codec = codec_of(param, config)
            state = codec.adopt(param)
            if self._host is not None:
                state = self._host.adopt(name, state)
            self.states[name] = state
            if config.grad_dtype == "bfloat16" and param.dim() >= 2:
                param.grad_dtype = torch.bfloat16
            if grid_of(param) is None:
                key = Key(seed, 0, index, "update", "a")
                self._dense[name] = Dense(name, param, codec, state, key, len(self._dense))
        self._fused_steps = FusedSteps(self._measure() if weight_amax and self._dense else None)

    def _host_states(self) -> HostStates:
        kept = {n: (codec_of(p, self.config), p.numel()) for n, p in self.params.items()}
        device = next(iter(self.params.values())).device if kept else torch.device("cpu")
        return HostStates(kept, device, fused=self.fused)

    def _measure(self) -> Tensor:
        """Allocate and fill :attr:`weight_amax`, which are parts of the tensor returned."""
        device = next(iter(self._dense.values())).param.device
        amax = torch.zeros(len(self._dense), device=device)
        for name, dense in self._dense.items():
            self.weight_amax[name] = amax[dense.index : dense.index + 1]
            self.weight_amax[name].copy_(_amax(dense.param))
        return amax

    @property
    def can_run_ahead(self) -> bool:
        """Whether :meth:`step` never waits for the device, given device tensors."""
        return self.fused and kernels_take(self.params.values())

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
                A tensor (FP64, 0-dim, on the device) needs :attr:`can_run_ahead`.
            skip: FP32, 0-dim, on the device, together with a tensor ``grad_scale``: where it is 1
                nothing moves.

        Raises:
            DivergenceError: ``grad_scale`` is not finite, which means that the gradients are not
                (nothing has moved then), or the new value of a grid parameter is not. With a tensor
                nobody looks: whoever passes one sets ``skip`` and reads ``broken`` of
                :attr:`grid_statistics`.
        """
        if isinstance(grad_scale, Tensor):
            flag, factor = None if skip is None else skip.view(1), grad_scale.float().view(1)
            self._dense_step(step, lr, factor, flag)
            self._grid_step(step, lr, factor, flag)
            return
        if not math.isfinite(grad_scale):
            raise DivergenceError(
                f"the gradients of step {step} hold NaN or Inf: lower the learning rate or go on "
                "from an earlier checkpoint"
            )
        scale = None
        if grad_scale != 1.0 and self.params:
            device = next(iter(self.params.values())).device
            scale = torch.full((1,), grad_scale, device=device)
        self._dense_step(step, lr, scale, None)
        self._grid_step(step, lr, scale, None)
        check_stored(self.grid_statistics)

    def _grid_step(self, step: int, lr: float, scale: Tensor | None, skip: Tensor | None) -> None:
        """Move all parameters on a grid."""
        self.grid_statistics = {}
        for name, param in self.params.items():
            grid = grid_of(param)
            if param.grad is None or grid is None:
                continue
            how = GridStep(
                grid_codec(self.config), self._hyper(param, lr), step, self.seed, scale, skip
            )
            if self._host is not None:
                found = self._host.grid_step(name, grid, param.grad, how)
            else:
                found = how.move(grid, param.grad, self.states[name], fused=self.fused)
            self.grid_statistics[name] = found

    def _dense_step(self, step: int, lr: float, scale: Tensor | None, skip: Tensor | None) -> None:
        """Move all dense parameters, those of one codec and one weight decay together."""
        groups: dict[tuple[str, float], list[Dense]] = {}
        for dense in self._dense.values():
            if dense.param.grad is not None:
                group = dense.codec.name, self.decay_of(dense.param)
                groups.setdefault(group, []).append(dense)
        for tensors in groups.values():
            numbers = StepNumbers.of(self._hyper(tensors[0].param, lr), step)
            if self._host is not None:
                self._host.step(tensors, numbers, step, scale, skip)
                self._measure_moved(tensors)
            elif self.fused and tensors[0].param.is_cuda:
                self._fused_steps.step(tensors, numbers, step, scale, skip)
            elif skip is None or not skip.item():
                exact_steps(tensors, numbers, step, scale)
                self._measure_moved(tensors)

    def _measure_moved(self, tensors: list[Dense]) -> None:
        if self._fused_steps.amax is not None:
            for one in tensors:
                self._fused_steps.amax[one.index] = _amax(one.param)

    def _hyper(self, param: Tensor, lr: float) -> AdamHyper:
        return AdamHyper(lr, self.config.betas, self.config.eps, self.decay_of(param))

    def decay_of(self, param: Tensor) -> float:
        """Weight decay of a parameter: the configured one for two or more dims, else 0."""
        return self.config.weight_decay if param.dim() >= 2 else 0.0

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for param in self.params.values():
            param.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """What the codecs keep, as ``<kind>.<parameter>``: ``exp_avg.head.weight`` and so on."""
        if self._host is not None:
            self._host.settle()
        return {
            f"{kind}.{name}": tensor
            for name, state in self.states.items()
            for kind, tensor in state.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy saved state in, and measure the weights anew, which have been loaded before.

        Raises:
            CheckpointError: The state is of another codec, or the names, shapes or dtypes are not
                exactly this optimizer's; nothing has been copied then.
        """
        dtypes = {name: tensor.dtype for name, tensor in state.items()}
        check_kept_as(self.params, self.config, dtypes)
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
        for name, amax in self.weight_amax.items():
            amax.copy_(_amax(self._dense[name].param))

    def state_bytes(self) -> int:
        """Bytes of what the codecs keep, measured on storages; weights are not in it."""
        return storage_bytes(self.state_dict().values())


def build_optimizer(
    named_params: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    seed: int,
    *,
    fused: bool = False,
    weight_amax: bool = False,
) -> Optimizer:
    """Build the optimizer of a model.

    Args:
        named_params: ``model.named_parameters()``; those that need no gradient are left out.
        config: Adam's constants, and how state is kept: matrices become BF16 if it asks for that.
        seed: Seed of the run.
        fused: Move the dense parameters, which must lie on one device, by kernels if it is a GPU.
        weight_amax: Keep :attr:`Optimizer.weight_amax`.

    Raises:
        ConfigError: A dense parameter is neither FP32 nor what its codec keeps, a name or parameter
            comes twice, or two grid parameters share the stream id from which their random bits
            are drawn.
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
        if grid is None and param.dtype not in (
            torch.float32,
            codec_of(param, config).weight_dtype,
        ):
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
    return Optimizer(params, config, seed, fused=fused, weight_amax=weight_amax)


def codec_of(param: Tensor, config: OptimConfig) -> StateCodec:
    """How a parameter is kept: as configured if it is a matrix, else in FP32."""
    if grid_of(param) is not None:
        return grid_codec(config)
    return CODECS[config.states if param.dim() >= 2 else "fp32"]


def grid_codec(config: OptimConfig) -> GridCodec:
    """How the moments of weights on a grid are kept."""
    return GRID_CODECS.get(config.states, _FP32)


def check_kept_as(
    params: Mapping[str, Tensor], config: OptimConfig, saved: Mapping[str, torch.dtype]
) -> None:
    """Refuse state that was kept in another form than parameters are to be kept in.

    Args:
        params: Parameters by name.
        config: How their state is to be kept.
        saved: Type of each saved tensor, by ``<kind>.<parameter>``.

    Raises:
        CheckpointError: Another codec kept it.
    """
    # Dense parameters first: if optim.states has changed, they say so.
    for name, param in sorted(params.items(), key=lambda item: grid_of(item[1]) is not None):
        codec = codec_of(param, config)
        found = {kind: saved[key] for kind in _KINDS if (key := f"{kind}.{name}") in saved}
        others = [repr(codec.name) for codec in CODECS.values() if codec.dtypes == found]
        if found == codec.dtypes or not others:
            continue
        if grid_of(param) is not None and found == _FP32.dtypes:
            raise CheckpointError(
                f"the saved optimizer keeps FP32 moments of {name!r}, a weight on a grid, as "
                f"megafp4 first did under optim.states {config.states!r}, where it now keeps 8 "
                "bits: finish the run with the version that began it, or start another run"
            )
        raise CheckpointError(
            f"the saved optimizer keeps {name!r} as optim.states {' or '.join(others)} does and "
            f"this one as {codec.name!r}: set optim.states to what the run began with, or start "
            "anew from its weights"
        )


def grid_of(param: Tensor) -> GridWeight | None:
    """The grid that a parameter stands for, or None for a dense one."""
    grid: GridWeight | None = getattr(param, "grid", None)
    return grid


def kernels_take(params: Iterable[Tensor]) -> bool:
    """Whether kernels can move all that are on a grid."""
    return all(takes_kernel(grid) for param in params if (grid := grid_of(param)) is not None)


def memory_report(
    named_params: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer
) -> dict[str, float]:
    """Bytes per parameter that training keeps between steps, measured on tensor storages.

    Counts weights (dense values, or packed codes with their scales, and the few bytes of a grid
    parameter's placeholder) and what the codecs keep; not gradients and activations. A tensor
    shared under several names counts once.

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


def _amax(weight: Tensor) -> Tensor:
    return weight.detach().abs().amax().float() if weight.numel() else torch.zeros(())


_FP32 = FP32States()
_KINDS = sorted({kind for codec in CODECS.values() for kind in codec.dtypes})
