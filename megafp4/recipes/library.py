"""The published recipes, one function each.

Every docstring names the paper and where in it the choice is made; ``notes`` say what the paper
leaves open. Nothing here is registered anywhere: all functions that take a recipe name also take
a :class:`Recipe`, so ``dataclasses.replace(mxfp4(), ...)`` is as good as any of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

from megafp4.errors import unknown_name
from megafp4.recipes.estimators import DGE, OCC
from megafp4.recipes.recipe import GemmSpec, GridSpec, OperandSpec, Recipe

BF16 = OperandSpec("bf16")
_ALL_BF16 = GemmSpec(BF16, BF16)


def bf16() -> Recipe:
    """BF16 operands, FP32 accumulation: the baseline that every other recipe is compared with."""
    return Recipe("bf16", "all three GEMMs in BF16: the baseline", "1905.12322")


def fp8() -> Recipe:
    """Tensor-wise FP8 with the current amax; E4M3 forward, E5M2 gradients [2209.05433].

    Scales come from the tensor at hand ("current scaling"); the history of amaxes of "delayed
    scaling" saves a pass over memory and changes the numbers.
    """
    x, dy = OperandSpec("fp8-e4m3"), OperandSpec("fp8-e5m2")
    return Recipe(
        "fp8",
        "tensor-wise FP8: E4M3 activations and weights, E5M2 gradients",
        "2209.05433",
        fprop=GemmSpec(x, x),
        dgrad=GemmSpec(dy, x),
        wgrad=GemmSpec(dy, replace(x, saved_as="operand")),
        notes="Current scaling: the scale is this tensor's amax, no history.",
    )


def fp8_row() -> Recipe:
    """Row-wise FP8: one scale per line along the contraction axis, E4M3 everywhere.

    The axis-wise recipe of torchao's float8 training; its scales are powers of two, these are not.
    """
    line = OperandSpec("fp8-e4m3", scaling="vector")
    every = GemmSpec(line, line)
    return Recipe(
        "fp8-row",
        "row-wise FP8: E4M3, one scale per line of every operand",
        "torchao float8, rowwise",
        fprop=every,
        dgrad=every,
        wgrad=every,
        notes="Scales are amax / 448, not rounded to powers of two.",
    )


def _mxfp4_backward(
    name: str, summary: str, operand: OperandSpec, hadamard: int | None, notes: str
) -> Recipe:
    gemm = GemmSpec(operand, operand, hadamard)
    return Recipe(
        name,
        summary,
        "2502.20586",
        fprop=_ALL_BF16,
        dgrad=gemm,
        wgrad=gemm,
        notes=notes,
    )


_UNBIASED_MXFP4 = OperandSpec("mxfp4", rounding="stochastic", prescale=0.75)
# The paper's code rounds ties away from zero where it says nearest.
_NEAREST_MXFP4 = OperandSpec("mxfp4", rounding="nearest-away")


def mxfp4(g: int = 64) -> Recipe:
    """BF16 forward; unbiased MXFP4 dgrad and wgrad [2502.20586, algorithms 2 and 3].

    Scale from the unscaled amax, values times 3/4, stochastic rounding of both operands, random
    Hadamard transform of block ``g`` along the contraction axis, result times 16/9.
    """
    recipe = _mxfp4_backward(
        "mxfp4",
        "BF16 forward; MXFP4 backward, unbiased: 3/4, stochastic rounding, random Hadamard",
        _UNBIASED_MXFP4,
        g,
        "Signs and weight noise are drawn once per step and layer, so micro-batches share them.",
    )
    return replace(recipe, paper="2502.20586, algorithm 3")


def mxfp4_fp8() -> Recipe:
    """FP8 E4M3 forward, MXFP4 backward [2502.20586, experiments with FP8 forward].

    As in the released code, wgrad starts from the activation that was saved in FP8, while dgrad
    starts from the master weight. The tensor-wise scale is the current one; the paper used
    Transformer Engine's delayed scaling.
    """
    x = OperandSpec("fp8-e4m3")
    saved = replace(_UNBIASED_MXFP4, source="fprop", saved_as="operand")
    return replace(
        mxfp4(),
        name="mxfp4-fp8",
        summary="FP8 E4M3 forward; MXFP4 backward as in mxfp4",
        paper="2502.20586, FP8 forward",
        fprop=GemmSpec(x, x),
        wgrad=GemmSpec(_UNBIASED_MXFP4, saved, 64),
        notes="Current tensor-wise scales in forward; wgrad starts from the FP8 activation.",
    )


def mxfp4_rht() -> Recipe:
    """Ablation: random Hadamard, nearest rounding, OCP scale [2502.20586, table 2, RHT only]."""
    return _mxfp4_backward(
        "mxfp4-rht",
        "ablation of mxfp4: random Hadamard and nearest rounding (biased)",
        _NEAREST_MXFP4,
        64,
        "Ties round away from zero and values beyond 6 clip, as in the released code (mode 1).",
    )


def mxfp4_sr() -> Recipe:
    """Ablation: stochastic rounding without the Hadamard transform [2502.20586, table 2]."""
    return _mxfp4_backward(
        "mxfp4-sr",
        "ablation of mxfp4: 3/4 and stochastic rounding, no Hadamard",
        _UNBIASED_MXFP4,
        None,
        "Unbiased, with a variance that outliers drive up (mode 4 of the released code).",
    )


def mxfp4_rtn() -> Recipe:
    """Ablation: plain OCP quantization of the backward GEMMs [2502.20586, algorithm 1]."""
    return _mxfp4_backward(
        "mxfp4-rtn",
        "ablation of mxfp4: nearest rounding alone (biased)",
        _NEAREST_MXFP4,
        None,
        "Ties round away from zero and values beyond 6 clip, as in the released code (mode 2).",
    )


_LADDER = OperandSpec("fp4-vector", rounding="nearest-up")


def fp4(k: float = 5.0, cap: float = 3.0, alpha: float = 0.99) -> Recipe:
    """E2M1 forward with DGE and OCC, FP8 backward [2501.17116, sections 3.1 to 3.3].

    Token-wise activations, channel-wise weights (one scale per output channel), the paper's
    comparison ladder (ties go up), outliers of each token clamped at its alpha-quantiles and
    multiplied in high precision, DGE on the weight gradient.

    The paper does not spell the backward pass out. As in the released code: output gradients in
    tensor-wise E5M2; the forward's FP4-valued operands recast to E4M3, the activation with its
    residual added back. Choices of ours: the residual meets the high-precision weight (the paper's
    equation, not the released code's FP4 weight), in BF16.
    """
    return replace(
        fp4_direct(),
        name="fp4",
        summary="E2M1 forward, token- and channel-wise, with DGE and OCC; FP8 backward",
        paper="2501.17116, eq. 4-9",
        fprop=GemmSpec(
            replace(_LADDER, clamp=OCC(alpha)),
            replace(_LADDER, estimator=DGE(k, cap)),
        ),
        notes="Backward as in the released code: E5M2 gradients against the forward's operands "
        "recast to E4M3; the OCC residual meets the BF16 weight.",
    )


def fp4_folded(k: float = 5.0, cap: float = 3.0, alpha: float = 0.99) -> Recipe:
    """``fp4`` with the outliers inside the forward GEMM, as E4M3 values of the same operand.

    The released code of [2501.17116] also lets outliers meet the FP4 weight. There is no second
    GEMM in BF16, which costs more than all that FP4 saves in forward.
    """
    base = fp4(k, cap, alpha)
    folded = replace(base.fprop.a, clamp=OCC(alpha, residual="folded"))
    return replace(
        base,
        name="fp4-folded",
        summary="fp4 with OCC's outliers as E4M3 values of the same operand: no second GEMM",
        paper="2501.17116",
        fprop=replace(base.fprop, a=folded),
        notes="Outliers meet the FP4 weight, rounded to three mantissa bits and at most 448 times "
        "the token's scale; backward as in fp4.",
    )


def fp4_direct() -> Recipe:
    """Direct W4A4 cast: ``fp4`` without DGE and OCC [2501.17116, ablations]."""
    dy = OperandSpec("fp8-e5m2")
    recast = OperandSpec("fp8-e4m3", source="fprop")
    return Recipe(
        "fp4-direct",
        "E2M1 forward, token- and channel-wise, straight-through; FP8 backward",
        "2501.17116, ablations",
        fprop=GemmSpec(_LADDER, _LADDER),
        dgrad=GemmSpec(dy, recast),
        wgrad=GemmSpec(dy, replace(recast, saved_as="operand")),
        notes="Backward as in fp4.",
    )


_TOKEN_INT8 = OperandSpec("int8", scaling="vector")
_AS_FORWARD = OperandSpec("bf16", source="fprop")


def _dqt(bits: float, name: str, what: str) -> Recipe:
    grid = GridSpec(bits)
    return Recipe(
        name,
        f"{what} weights trained on their grid, no master; INT8 activations, BF16 backward",
        "2412.04787, eq. 1-5",
        fprop=GemmSpec(_TOKEN_INT8, OperandSpec(grid.format, source="grid")),
        dgrad=GemmSpec(BF16, OperandSpec("bf16", source="grid")),
        wgrad=GemmSpec(BF16, _AS_FORWARD),
        grid=grid,
        notes="Scale frozen at initialisation, per sub-matrix; norms, embedding and head stay off "
        "the grid (the released code quantizes them too and recomputes scales).",
    )


def dqt8() -> Recipe:
    """Direct quantized training with 8-bit weights [2412.04787, section 3].

    Forward: the weight as stored times int8 activations (per token, straight-through). The
    optimizer rounds stochastically back to the grid, see :mod:`megafp4.optim`.
    """
    return _dqt(8, "dqt8", "8-bit")


def dqt4() -> Recipe:
    """Direct quantized training with 4-bit weights [2412.04787, section 3]."""
    return _dqt(4, "dqt4", "4-bit")


def dqt3() -> Recipe:
    """Direct quantized training with 3-bit weights [2412.04787, section 3]."""
    return _dqt(3, "dqt3", "3-bit")


def dqt_ternary() -> Recipe:
    """Direct quantized training with ternary weights, "1.58 bit" [2412.04787, section 3]."""
    return _dqt(1.58, "dqt-ternary", "ternary")


_TERNARY = OperandSpec("ternary", scaling="tensor", statistic="absmean")


def dqt8_ternary() -> Recipe:
    """BitNet over 8-bit grid weights [2412.04787, "DQT 8 bit (ternary inference)"]."""
    return replace(
        bitnet(),
        name="dqt8-ternary",
        summary="ternary forward over 8-bit grid weights, no master; INT8 activations",
        paper="2412.04787, table 1 (ternary inference)",
        grid=GridSpec(8),
        notes="Straight-through from the ternary weight to the 8-bit one; backward as in bitnet.",
    )


def bitnet() -> Recipe:
    """BitNet b1.58: ternary absmean weights, int8 activations per token [2402.17764, eq. 1-3].

    Straight-through estimators; the backward GEMMs multiply the quantized values in BF16.
    """
    return Recipe(
        "bitnet",
        "BitNet b1.58: ternary weights, INT8 activations; BF16 backward",
        "2402.17764, eq. 1-3",
        fprop=GemmSpec(_TOKEN_INT8, _TERNARY),
        dgrad=GemmSpec(BF16, _AS_FORWARD),
        wgrad=GemmSpec(BF16, _AS_FORWARD),
        notes="Weight scales per sub-matrix (q, k, v); use a model with SubLN, as published.",
    )


def nvfp4(skip_first: int = 0, skip_last: int = 0) -> Recipe:
    """NVIDIA's NVFP4 pre-training [2509.25149, section 4].

    All three GEMMs NVFP4: 1x16 blocks for activations and gradients, 16x16 tiles for weights (so
    that forward and dgrad see the same weight), Hadamard of block 16 with one fixed sign vector in
    wgrad only, stochastic rounding of gradients only. The paper keeps some blocks in BF16 (its
    12B model the first 2 and the last 8 of 62).

    Args:
        skip_first: Blocks at the start that stay BF16.
        skip_last: Blocks at the end that stay BF16.
    """
    x = OperandSpec("nvfp4")
    w = OperandSpec("nvfp4", scaling="tile")
    dy = OperandSpec("nvfp4", rounding="stochastic")
    return Recipe(
        "nvfp4",
        "all GEMMs NVFP4: 16x16 weight tiles, stochastic gradients, Hadamard in wgrad",
        "2509.25149, section 4",
        fprop=GemmSpec(x, w),
        dgrad=GemmSpec(dy, w),
        wgrad=GemmSpec(dy, x, hadamard=16, signs="fixed"),
        skip_first=skip_first,
        skip_last=skip_last,
        notes="The paper keeps about 15 % of the linears in BF16, at both ends: use exempt.",
    )


def int8() -> Recipe:
    """SwitchBack: int8 forward and dgrad, 16-bit wgrad [2304.13013, algorithm 1].

    Row-wise activations and gradients, tensor-wise weights. wgrad stays BF16 because quantization
    noise grows with the contraction length, which there is the number of tokens.
    """
    w = OperandSpec("int8", scaling="tensor")
    return Recipe(
        "int8",
        "SwitchBack: INT8 forward and dgrad, BF16 wgrad",
        "2304.13013, algorithm 1",
        fprop=GemmSpec(_TOKEN_INT8, w),
        dgrad=GemmSpec(_TOKEN_INT8, w),
        wgrad=_ALL_BF16,
    )


_LIBRARY: MappingProxyType[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "bf16": bf16,
        "fp8": fp8,
        "fp8-row": fp8_row,
        "mxfp4": mxfp4,
        "mxfp4-fp8": mxfp4_fp8,
        "mxfp4-rht": mxfp4_rht,
        "mxfp4-sr": mxfp4_sr,
        "mxfp4-rtn": mxfp4_rtn,
        "fp4": fp4,
        "fp4-folded": fp4_folded,
        "fp4-direct": fp4_direct,
        "dqt8": dqt8,
        "dqt4": dqt4,
        "dqt3": dqt3,
        "dqt-ternary": dqt_ternary,
        "dqt8-ternary": dqt8_ternary,
        "bitnet": bitnet,
        "nvfp4": nvfp4,
        "int8": int8,
    }
)


def recipe_names() -> tuple[str, ...]:
    """Names of the published recipes."""
    return tuple(_LIBRARY)


def get_recipe(recipe: str | Recipe) -> Recipe:
    """Look a published recipe up by name; a :class:`Recipe` is returned as it is.

    Raises:
        ConfigError: No recipe has this name; the nearest one is suggested.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in _LIBRARY:
        raise unknown_name("recipe", recipe, _LIBRARY)
    return _LIBRARY[recipe]()
