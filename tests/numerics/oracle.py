"""Independent answers for the numerics tests: numpy in float64, ml_dtypes, brute force.

Nothing here imports megafp4. Every value on a 4-bit grid, every midpoint between two of them and
every FP32 number times a power of two is exact in float64, so these functions have no rounding of
their own and may be written for clarity alone.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1_MIDPOINTS = (E2M1[:-1] + E2M1[1:]) / 2
LADDER_TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])

FP8_TYPES = {"fp8-e4m3": ml_dtypes.float8_e4m3fn, "fp8-e5m2": ml_dtypes.float8_e5m2}
FP8_MAX = {"fp8-e4m3": 448.0, "fp8-e5m2": 57344.0}


def decode_e2m1(codes: np.ndarray) -> np.ndarray:
    """Values of 4-bit codes according to ml_dtypes, signed zero included."""
    return codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)


def encode_e2m1(values: np.ndarray, rounding: str = "nearest-even") -> np.ndarray:
    """Round to E2M1 by counting the midpoints below each magnitude; beyond 6 saturates."""
    magnitude = np.abs(values)
    negative = np.signbit(values)
    below = np.searchsorted(E2M1_MIDPOINTS, magnitude, side="left")
    up_to = np.searchsorted(E2M1_MIDPOINTS, magnitude, side="right")
    tie = below != up_to
    if rounding == "nearest-even":
        index = np.where(tie & (below % 2 == 1), below + 1, below)
    elif rounding == "nearest-away":
        index = up_to
    elif rounding == "nearest-up":
        index = np.where(negative, below, up_to)
    else:
        raise AssertionError(rounding)
    return (index + 8 * negative).astype(np.uint8)


def encode_fp8(values: np.ndarray, name: str) -> np.ndarray:
    """Round to FP8 with ml_dtypes after saturating at the largest finite value; NaN stays NaN."""
    limit = FP8_MAX[name]
    clipped = np.clip(values.astype(np.float32), -limit, limit)
    return clipped.astype(FP8_TYPES[name]).view(np.uint8)


def decode_fp8(codes: np.ndarray, name: str) -> np.ndarray:
    """Values of FP8 codes according to ml_dtypes."""
    return codes.astype(np.uint8).view(FP8_TYPES[name]).astype(np.float64)


def biased_exponent(values: np.ndarray) -> np.ndarray:
    """Bits 23..30 of the FP32 encoding."""
    return (values.astype(np.float32).view(np.uint32) >> 23) & 0xFF


def e8m0_byte(amax: np.ndarray) -> np.ndarray:
    """The MX rule with emax 2: the exponent of amax less two, clamped; 255 if not finite."""
    amax = amax.astype(np.float32)
    exponent = biased_exponent(amax).astype(np.int64)
    byte = np.clip(exponent - 2, 0, 254)
    return np.where(np.isfinite(amax), byte, 255).astype(np.uint8)


def mxfp4(x: np.ndarray, rounding: str = "nearest-even") -> tuple[np.ndarray, np.ndarray]:
    """OCP MX quantization of the last dimension: codes per element, one E8M0 byte per 32.

    The codes of blocks that hold NaN or Inf mean nothing and are returned as 0.
    """
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, 32)
    amax = np.abs(blocks).max(-1)
    bytes_ = e8m0_byte(amax)
    scale = np.ldexp(1.0, bytes_.astype(np.int64) - 127)
    bad = bytes_ == 255
    scaled = np.where(bad[..., None], 0.0, blocks) / scale[..., None]
    codes = encode_e2m1(scaled, rounding)
    return codes.reshape(x.shape), bytes_


def nvfp4(x: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """NVFP4 of a matrix with blocks or tiles of ``shape``: codes, E4M3 bytes, FP32 tensor scale.

    [2509.25149, appendix B], every operation in FP32: s = amax / (448 * 6); a block's scale is
    E4M3(amax_b / 6 / s); an element becomes E2M1(x * (1 / (block scale * s))).
    """
    f32 = np.float32
    rows, cols = x.shape
    blocks = x.astype(f32).reshape(rows // shape[0], shape[0], cols // shape[1], shape[1])
    amax = np.abs(blocks).max((1, 3))
    tensor_scale = np.maximum(amax.max() / f32(448 * 6), f32(2.0**-117))
    bytes_ = encode_fp8(amax / f32(6) / tensor_scale, "fp8-e4m3")
    scale = decode_fp8(bytes_, "fp8-e4m3").astype(f32) * tensor_scale
    with np.errstate(divide="ignore"):
        reciprocal = np.where(scale == 0, f32(0), f32(1) / scale).astype(f32)
    scaled = blocks * reciprocal[:, None, :, None]
    return encode_e2m1(scaled.astype(np.float64)).reshape(x.shape), bytes_, tensor_scale


def half_step_bound(fmt_max: float, scaled: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Largest error of nearest rounding at each |x| / scale: half the gap, or the overshoot."""
    magnitude = np.minimum(np.abs(scaled), fmt_max)
    index = np.clip(np.searchsorted(grid, magnitude, side="right") - 1, 0, len(grid) - 2)
    gap = (grid[index + 1] - grid[index]) / 2
    return np.maximum(gap, np.abs(scaled) - fmt_max)


def hadamard_matrix(g: int) -> np.ndarray:
    """Sylvester's +-1 matrix by its entry formula: (-1) ** popcount(i & j)."""
    return np.array([[(-1.0) ** bin(i & j).count("1") for j in range(g)] for i in range(g)])


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in plain Python integers [Salmon et al., SC 2011]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + 0x9E3779B9) % (1 << 32)
        k1 = (k1 + 0xBB67AE85) % (1 << 32)
    return c0, c1, c2, c3


def random_words(
    line: np.ndarray, group: np.ndarray, step: int, stream: int, seed: int
) -> np.ndarray:
    """Philox words at every (line, group), uint32 [lines, groups, 4], with numpy's uint64."""
    mask = np.uint64(0xFFFFFFFF)
    shape = (len(line), len(group))
    counter = [
        np.broadcast_to(group.astype(np.uint64)[None, :], shape),
        np.broadcast_to(line.astype(np.uint64)[:, None], shape),
        np.full(shape, step, np.uint64),
        np.full(shape, stream, np.uint64),
    ]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first = counter[0] * np.uint64(0xD2511F53)
        second = counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (second >> np.uint64(32)) ^ counter[1] ^ np.uint64(key[0]),
            second & mask,
            (first >> np.uint64(32)) ^ counter[3] ^ np.uint64(key[1]),
            first & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(counter, -1).astype(np.uint32)


def dither(
    shape: tuple[int, int],
    key: tuple[int, int, int, int, int],
    bits: int,
    origin: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """Centred uniforms of a [lines, k] tensor, as the docstring of ``philox.py`` lays them out.

    ``key`` is (seed, step, layer, gemm, operand) in integers. The bytes of the four words, little
    end first, are cut into numbers of ``bits`` bits; of 32 the upper 23 count.
    """
    seed, step, layer, gemm, operand = key
    per_call = 128 // bits
    lines = np.arange(origin[0], origin[0] + shape[0])
    groups = np.arange(-(-(origin[1] + shape[1]) // per_call))
    words = random_words(lines, groups, step, layer * 256 + gemm * 16 + operand, seed)
    numbers = words.astype("<u4").reshape(shape[0], -1).view(f"<u{bits // 8}").astype(np.int64)
    used = min(bits, 23)
    numbers = (numbers >> (bits - used))[:, origin[1] : origin[1] + shape[1]]
    return (numbers + 0.5) / 2.0**used


def stochastic_e2m1(values: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Dithered rounding to E2M1: the lower neighbour, or the upper if remainder + u >= 1."""
    magnitude = np.abs(values)
    index = np.minimum(np.searchsorted(E2M1, magnitude, side="right") - 1, 6)
    remainder = (magnitude - E2M1[index]) / (E2M1[index + 1] - E2M1[index])
    index = index + (remainder + u >= 1)
    return (index + 8 * np.signbit(values)).astype(np.uint8)


def dge(values: np.ndarray, k: float, cap: float) -> np.ndarray:
    """[2501.17116, eq. 8] interval by interval: (1/k) |u|^(1/k - 1), never above ``cap``."""
    grid = np.concatenate([-E2M1[:0:-1], E2M1])
    left = np.clip(np.searchsorted(grid, values, side="right") - 1, 0, len(grid) - 2)
    width = grid[left + 1] - grid[left]
    u = 2 * (values - grid[left]) / width - 1
    with np.errstate(divide="ignore"):
        slope = np.abs(u) ** (1 / k - 1) / k
    return np.minimum(slope, cap)


def float32_ladder() -> Iterator[tuple[float, float, float]]:
    """Each E2M1 threshold with the FP32 numbers just below and just above it."""
    for tie in LADDER_TIES.astype(np.float32):
        yield (
            float(np.nextafter(tie, np.float32(0))),
            float(tie),
            float(np.nextafter(tie, np.float32(np.inf))),
        )
