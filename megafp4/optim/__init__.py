"""How weights move: AdamW, Direct Quantized Training, learning rate, clipping."""

from megafp4.optim.adamw import AdamHyper, StepNumbers, adamw_update
from megafp4.optim.clip import clip_grad_norm, clip_grad_norm_on_device, global_norm
from megafp4.optim.dqt import dqt_step
from megafp4.optim.optimizer import Optimizer, build_optimizer, memory_report
from megafp4.optim.schedule import learning_rate
from megafp4.optim.states import CODECS, StateCodec, codec_step

__all__ = [
    "CODECS",
    "AdamHyper",
    "Optimizer",
    "StateCodec",
    "StepNumbers",
    "adamw_update",
    "build_optimizer",
    "clip_grad_norm",
    "clip_grad_norm_on_device",
    "codec_step",
    "dqt_step",
    "global_norm",
    "learning_rate",
    "memory_report",
]
