"""What the numbers are: the bit-exact specification, in plain PyTorch, on any device."""

from megafp4.numerics.estimators import clamp_outliers, dge_multiplier, fold_outliers
from megafp4.numerics.formats import Format, Integer, Minifloat, Scaling, formats, get_format
from megafp4.numerics.grid import GridWeight
from megafp4.numerics.hadamard import hadamard, hadamard_signs
from megafp4.numerics.philox import Key, dither, philox4x32
from megafp4.numerics.qtensor import QTensor, unpack
from megafp4.numerics.quantize import Statistic, amax, encode, quantize, scales_from_amax
from megafp4.numerics.rounding import Rounding
from megafp4.numerics.shards import Origin, Peers, Runs, Slice, part_of
from megafp4.numerics.statistics import operand_statistics

__all__ = [
    "Format",
    "GridWeight",
    "Integer",
    "Key",
    "Minifloat",
    "Origin",
    "Peers",
    "QTensor",
    "Rounding",
    "Runs",
    "Scaling",
    "Slice",
    "Statistic",
    "amax",
    "clamp_outliers",
    "dge_multiplier",
    "dither",
    "encode",
    "fold_outliers",
    "formats",
    "get_format",
    "hadamard",
    "hadamard_signs",
    "operand_statistics",
    "part_of",
    "philox4x32",
    "quantize",
    "scales_from_amax",
    "unpack",
]
