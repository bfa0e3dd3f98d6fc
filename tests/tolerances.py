"""Tolerances, one place for all tests: a tolerance is a property of a format, not of a test.

Measured on Gaussian data of 2^20 elements, with a margin of about 0.5 dB; where two things should
be equal bit for bit a test says so and uses none of these.
"""

FP32_SUM = 4e-7
"""Relative RMS error of FP32 sums of at most a few thousand terms against float64."""

BF16_GEMM = 4e-3
"""Relative RMS error of a BF16 GEMM with FP32 accumulation against float64: 2^-8."""

MIN_SNR_DB = {
    "mxfp4": 18.2,
    "nvfp4": 20.2,
    "fp4-vector": 18.0,
    "fp8-e4m3": 31.0,
    "fp8-e5m2": 25.0,
    "int8": 40.0,
    "int4": 14.0,
    "int3": 6.0,
    "ternary": 5.0,
}
"""Least signal-to-noise ratio, in dB, of nearest-even quantization of Gaussian data at the
format's default scaling and statistic."""
