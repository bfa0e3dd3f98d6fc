"""Embedding tables that the optimizer keeps in BF16 give FP32 vectors and get FP32 gradients."""

import pytest
import torch

from megafp4.config import OptimConfig
from megafp4.models.factory import DenseFactory
from megafp4.optim import build_optimizer


@pytest.mark.parametrize("states", ["fp32", "fp8lm", "bf16-sr"])
def test_gradients_of_frequent_words_are_summed_in_fp32(states: str) -> None:
    torch.manual_seed(0)
    table = DenseFactory().embedding(8, 16, role="tokens")
    build_optimizer(table.named_parameters(), OptimConfig(states=states), 0)  # type: ignore[arg-type]
    tokens = torch.randint(8, (4, 4096))
    dy = torch.rand(4, 4096, 16) / 4096
    out = table(tokens)
    assert out.dtype == torch.float32
    out.backward(dy)
    expected = torch.zeros(8, 16, dtype=torch.float64)
    expected.index_add_(0, tokens.flatten(), dy.flatten(0, 1).double())
    grad = table.weight.grad
    assert grad.dtype == torch.float32
    assert float((grad - expected).norm() / expected.norm()) < 1e-5
