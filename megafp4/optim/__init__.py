"""How weights move: AdamW, Direct Quantized Training, learning rate, clipping."""

from megafp4.optim.adamw import AdamHyper, adamw_step, fused_adamw_step
from megafp4.optim.clip import clip_grad_norm, clip_grad_norm_on_device, global_norm
from megafp4.optim.dqt import dqt_step
from megafp4.optim.optimizer import Optimizer, build_optimizer, memory_report
from megafp4.optim.schedule import learning_rate

__all__ = [
    "AdamHyper",
    "Optimizer",
    "adamw_step",
    "build_optimizer",
    "clip_grad_norm",
    "clip_grad_norm_on_device",
    "dqt_step",
    "fused_adamw_step",
    "global_norm",
    "learning_rate",
    "memory_report",
]
