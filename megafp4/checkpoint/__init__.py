"""What is kept: safetensors and JSON in a folder that is complete or absent."""

from megafp4.checkpoint.boxes import Box, Parts
from megafp4.checkpoint.compatibility import Signature, check_compatible, signature
from megafp4.checkpoint.integrity import refuse_pickles
from megafp4.checkpoint.rng import capture_rng, restore_rng
from megafp4.checkpoint.sharded import ShardedReader, is_sharded, save_sharded
from megafp4.checkpoint.store import Checkpoint, find, load, save

__all__ = [
    "Box",
    "Checkpoint",
    "Parts",
    "ShardedReader",
    "Signature",
    "capture_rng",
    "check_compatible",
    "find",
    "is_sharded",
    "load",
    "refuse_pickles",
    "restore_rng",
    "save",
    "save_sharded",
    "signature",
]
