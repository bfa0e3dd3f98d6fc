import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megafp4.config import ModelConfig
from megafp4.errors import ConfigError
from megafp4.models import flops_per_token, parameter_count
from tests.models.small import batch, build, small_config

LLAMA2_7B = ModelConfig(
    family="llama", layers=32, hidden=4096, heads=32, ffn_hidden=11008, vocab_size=32000
)
LLAMA2_13B = ModelConfig(
    family="llama", layers=40, hidden=5120, heads=40, ffn_hidden=13824, vocab_size=32000
)
LLAMA3_8B = ModelConfig(
    family="llama",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    ffn_hidden=14336,
    vocab_size=128256,
)
GPT_6_7B = ModelConfig(layers=32, hidden=4096, heads=32, vocab_size=50304)
GPT_13B = ModelConfig(layers=40, hidden=5120, heads=40, vocab_size=50304)


@pytest.mark.parametrize(
    ("config", "seq_len", "half", "full"),
    [
        (GPT_6_7B, 2048, 41.50, 43.11),
        (GPT_13B, 2048, 79.56, 82.08),
        (LLAMA2_7B, 4096, 42.86, 46.08),
        (LLAMA2_13B, 4096, 82.14, 87.18),
        (LLAMA3_8B, 8192, 51.47, 57.91),
    ],
    ids=["gpt-6.7b", "gpt-13b", "llama2-7b", "llama2-13b", "llama3-8b"],
)
def test_reference_figures_in_gflop_per_token(config, seq_len, half, full):
    assert flops_per_token(config, seq_len) == flops_per_token(config, seq_len, "half")
    assert round(flops_per_token(config, seq_len, "half") / 1e9, 2) == half
    assert round(flops_per_token(config, seq_len, "full") / 1e9, 2) == full


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_full_convention_equals_torchs_flop_counter(family):
    """Torch counts every matmul of forward and backward; its attention is the full square."""
    config = small_config(family, kv_heads=None)
    model = build(config)
    tokens, targets = batch(config, rows=2, length=16)
    # The unfused kernel, because the counter does not know the fused one of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, targets).backward()
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(config, 16, "full")


def test_unknown_convention():
    with pytest.raises(ConfigError, match="did you mean 'half'"):
        flops_per_token(GPT_6_7B, 2048, "halve")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"subln": True},
        {"bias": False},
        {"family": "llama"},
        {"family": "llama", "bias": True, "tie_embeddings": True},
        {"family": "llama", "subln": True, "activation": "relu2-glu", "kv_heads": 1},
        {"family": "llama", "activation": "gelu"},
    ],
)
def test_parameter_count_equals_the_built_model(changes):
    config = small_config(**changes)
    with torch.device("meta"):
        model = build(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
