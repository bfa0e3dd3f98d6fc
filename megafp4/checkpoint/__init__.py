"""What is kept: safetensors and JSON in a folder that is complete or absent."""

from megafp4.checkpoint.compatibility import Signature, check_compatible, signature
from megafp4.checkpoint.integrity import refuse_pickles
from megafp4.checkpoint.rng import capture_rng, restore_rng
from megafp4.checkpoint.store import Checkpoint, load, save

__all__ = [
    "Checkpoint",
    "Signature",
    "capture_rng",
    "check_compatible",
    "load",
    "refuse_pickles",
    "restore_rng",
    "save",
    "signature",
]
