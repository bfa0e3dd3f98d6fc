"""Quantize a tensor to every format and see what is lost.

Run it with ``python examples/quantize_a_tensor.py``.
"""

import torch

import megafp4
from megafp4.numerics import operand_statistics

torch.manual_seed(0)
x = torch.randn(32, 256)

print(f"{'format':<12}{'bytes':>7}{'SNR (dB)':>10}{'underflow':>11}{'clipped':>9}")
for name in megafp4.formats():
    q = megafp4.quantize(x, name)
    lost = operand_statistics(x, q)
    size = q.pack().nbytes + q.scales.nbytes
    print(
        f"{name:<12}{size:>7}{lost['snr_db']:>10.1f}"
        f"{lost['underflow_rate']:>11.2%}{lost['clip_rate']:>9.2%}"
    )

# Stochastic rounding is unbiased: the mean of many draws approaches x. The key says what a draw is
# for (seed, step, layer, GEMM, operand), so each of these steps draws anew and reproducibly.
draws = [
    megafp4.quantize(x, "mxfp4", rounding="stochastic", key=(0, i, 0, "fprop", "a"), prescale=0.75)
    for i in range(64)
]
mean = torch.stack([q.dequantize() / 0.75 for q in draws]).mean(0)
print(f"\nmean error of 1 draw   {(draws[0].dequantize() / 0.75 - x).abs().mean():.4f}")
print(f"mean error of 64 draws {(mean - x).abs().mean():.4f}")
