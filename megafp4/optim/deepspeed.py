"""DeepSpeed's ZeRO 1 to 3 and its offload, as another engine for the same models and recipes.

DeepSpeed [arXiv 1910.02054, 2101.06840] owns backward, the reduction of gradients, clipping and the
update; the linears run the recipe as ever. What it does not have is what :mod:`megafp4.optim.zero`
is for: states in FP8, gradients in FP8 on the wire, weights on a grid. Its norm is known only when
the weights have moved, so an update cannot be refused: a loss spike is not skipped, and a gradient
that is not finite ends the run after the fact, with its last checkpoint intact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megafp4.config import OptimConfig
from megafp4.errors import CheckpointError, ConfigError, UnsupportedError
from megafp4.numerics.grid import StoreStatistics
from megafp4.optim.optimizer import grid_of, storage_bytes

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedOptimizer:
    """AdamW through a DeepSpeed engine over all ranks of the job.

    One step is, on every rank, ``loss = self.engine(tokens, targets)`` and ``backward(loss, last)``
    for each micro-batch, then ``step``.

    Args:
        model: The whole model, FP32 parameters, the same on all ranks. Call it through
            :attr:`engine`.
        config: Adam's constants and the clipping norm; ``states`` must be ``fp32``. With
            ``offload``, states are kept and stepped on the host.
        micro_batches: Backward passes of a rank in a step.
        micro_batch: Sequences of a micro-batch.
        stage: 1 shards states, 2 gradients as well, 3 weights as well.

    Raises:
        UnsupportedError: DeepSpeed is not installed.
        ConfigError: A weight lives on a grid, or ``states`` is not ``fp32``.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        micro_batches: int,
        micro_batch: int,
        stage: Literal[1, 2, 3] = 1,
    ) -> None:
        on_grid = [name for name, p in model.named_parameters() if grid_of(p) is not None]
        if on_grid:
            raise ConfigError(
                f"{on_grid[0]!r} lives on a grid, which DeepSpeed cannot step: choose "
                "parallel.engine megafp4 or a recipe with master weights"
            )
        if config.states != "fp32":
            raise ConfigError(
                f"optim.states {config.states!r} is not DeepSpeed's: choose fp32, or "
                "parallel.engine megafp4"
            )
        deepspeed = _deepspeed()
        self.config, self.stage = config, stage
        self.grid_statistics: dict[str, StoreStatistics] = {}
        """None: there are no weights on a grid."""
        self.params = dict(model.named_parameters())
        self._adam = _adam(self.params, config)
        zero: dict[str, Any] = {"stage": stage}
        if config.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._adam,
            config={
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": micro_batches,
                "gradient_clipping": config.clip_grad,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 1 << 30,
            },
        )
        self._allocate_states()

    @property
    def can_run_ahead(self) -> bool:
        """It waits for the device at every step."""
        return False

    def state_bytes(self) -> int:
        """Bytes of this rank's moments, measured on storages."""
        return storage_bytes(
            state[kind] for state in self._adam.state.values() for kind in _MOMENTS if kind in state
        )

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; ranks' losses are summed, not averaged.

        Args:
            loss: 0-dim, of :attr:`engine`, times its share of the global batch.
            last: Whether it is the step's last one.
        """
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-batch

    def step(self, lr: float) -> float:
        """Clip, move every parameter, and return the global norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def weights(self) -> dict[str, Tensor]:
        """Whole FP32 parameters by name, on the CPU of every rank, which all must call."""
        full = _deepspeed().utils.safe_get_full_fp32_param
        return {name: full(param).detach().cpu().clone() for name, param in self.params.items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`weights` returned; every rank must call this."""
        deepspeed = _deepspeed()
        for name, param in self.params.items():
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0), torch.no_grad():
                if param.numel():
                    param.copy_(weights[name])
            deepspeed.utils.safe_set_full_fp32_param(param, weights[name].to(param.device))

    def state_dict(self) -> dict[str, Tensor]:
        """Whole moments, ``exp_avg.<parameter>``, on the CPU of every rank, which all must call.

        Names and shapes are those of :meth:`megafp4.optim.Optimizer.state_dict` with FP32 states.
        """
        full = _deepspeed().utils.safe_get_full_optimizer_state
        return {
            f"{kind}.{name}": full(param, kind).detach().cpu().clone()
            for kind in _MOMENTS
            for name, param in self.params.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Take over what :meth:`state_dict` returned, after ``steps`` steps of any engine.

        Raises:
            CheckpointError: Names are not this model's; nothing has changed then.
        """
        expected = {f"{kind}.{name}" for kind in _MOMENTS for name in self.params}
        strange = sorted(expected ^ state.keys())
        if strange:
            where = "lacks" if strange[0] in expected else "has an unknown"
            raise CheckpointError(
                f"the saved optimizer {where} {strange[0]!r} ({len(strange)} names differ): load "
                "one with FP32 states of the same model"
            )
        put = _deepspeed().utils.safe_set_full_optimizer_state
        for kind in _MOMENTS:
            for name, param in self.params.items():
                put(param, state[f"{kind}.{name}"].to(param.device), kind)
        self._count_steps(steps)

    def _allocate_states(self) -> None:
        """Make the moments now, which DeepSpeed leaves to Adam's first step.

        A checkpoint is loaded before that; and stages 1 and 2 look for the moments of all groups
        when the first group has been stepped, before the others have any.
        """
        zero = self.engine.optimizer
        if self.stage == 3:
            partitions = list(zero.fp32_partitioned_groups_flat)
        else:
            partitions = [one for group in self._adam.param_groups for one in group["params"]]
        for partition in partitions:
            self._adam.state[partition] = {
                "step": torch.zeros((), device=partition.device),
                **{kind: torch.zeros_like(partition.detach()) for kind in _MOMENTS},
            }
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _count_steps(self, steps: int) -> None:
        """Set the step that bias correction counts from."""
        for state in self._adam.state.values():
            state["step"].fill_(steps)


def _adam(params: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    decayed = [param for param in params.values() if param.dim() >= 2]
    others = [param for param in params.values() if param.dim() < 2]
    groups = [
        {"params": found, "weight_decay": decay}
        for found, decay in ((decayed, config.weight_decay), (others, 0.0))
        if found
    ]
    # The rate until the first step: stage 3 allocates by a step on zeros, which must not decay.
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def _deepspeed() -> Any:
    try:
        import deepspeed  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UnsupportedError(
            "parallel.engine deepspeed needs a package that is not installed: pip install "
            "'megafp4[deepspeed]', or choose parallel.engine megafp4"
        ) from error
    return deepspeed
