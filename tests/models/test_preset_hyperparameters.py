"""Shapes and hyper-parameters of the presets, typed a second time from the papers' own tables."""

import pytest

from megafp4.models import get_preset

# 2502.20586, launch scripts: layers, hidden, heads, sequence; global and micro batch; lr, min lr;
# steps, decay, warm-up (1 % of the decay); weight decay; steps between evaluations and checkpoints.
MXFP4 = {
    "gpt-345m": (24, 1024, 16, 1024, 64, 8, 1.5e-4, 1e-5, 500_000, 320_000, 3200, 0.01, 10_000,
                 20_000),
    "gpt-1.3b": (24, 2048, 16, 2048, 1024, 4, 2e-4, 2e-5, 20_000, 20_000, 200, 0.1, 1000, 2000),
    "gpt-6.7b": (32, 4096, 32, 2048, 256, 4, 1.2e-4, 1.2e-5, 40_000, 40_000, 400, 0.1, 1000, 5000),
}  # fmt: skip
# 2412.04787, supplement 1: layers, hidden, heads, MLP; sequences per GPU.
DQT = {
    "llama-130m": (12, 768, 12, 2048, 64),
    "llama-320m": (24, 1024, 16, 2048, 32),
    "llama-1b": (24, 2048, 32, 3072, 16),
}
# LLaMA 2's shapes, which 2501.17116 trains: layers, hidden, heads, MLP.
FP4 = {
    "llama-7b": (32, 4096, 32, 11008),
    "llama-13b": (40, 5120, 40, 13824),
}


@pytest.mark.parametrize("name", MXFP4)
def test_gpt_of_the_mxfp4_paper(name: str) -> None:
    run = get_preset(name)
    model, optim, train = run.model, run.optim, run.train
    assert (
        model.layers, model.hidden, model.heads, model.seq_len, train.global_batch,
        train.micro_batch, optim.lr, optim.min_lr, train.steps, optim.decay_steps,
        optim.warmup_steps, optim.weight_decay, train.eval_interval, train.checkpoint_interval,
    ) == MXFP4[name]  # fmt: skip
    assert (optim.schedule, optim.clip_grad) == ("cosine", 1.0)
    # What the scripts leave to Megatron: Adam, dropout, initialisation, seed, padded vocabulary.
    assert (optim.betas, optim.eps) == ((0.9, 0.999), 1e-8)
    assert (model.dropout, model.init_std, train.seed) == (0.1, 0.02, 1234)
    assert (model.vocab_size, model.num_ffn_hidden) == (50304, 4 * model.hidden)
    assert (run.data.tokenizer, run.data.split, run.dtype) == ("gpt2", "949,50,1", "bfloat16")
    assert train.eval_batches * train.micro_batch == 10 * train.global_batch


def test_gpt_125m_of_fp8_lm() -> None:
    run = get_preset("gpt-125m")
    assert (run.model.layers, run.model.hidden, run.model.heads) == (12, 768, 12)
    assert run.model.seq_len == 2048
    assert run.train.global_batch * run.model.seq_len == 2**20  # "1 M tokens"
    assert (run.optim.lr, run.optim.min_lr, run.optim.warmup_steps) == (6e-4, 6e-5, 1000)
    assert (run.optim.betas, run.optim.weight_decay) == ((0.9, 0.95), 0.1)
    assert (run.optim.schedule, run.optim.decay_steps) == ("cosine", None)


def test_gpt_13b_of_ms_amp() -> None:
    run = get_preset("gpt-13b")
    model, optim, train = run.model, run.optim, run.train
    assert (model.layers, model.hidden, model.heads, model.seq_len) == (40, 5120, 40, 2048)
    assert (model.init_std, model.dropout) == (0.0099, 0.0)
    assert (optim.lr, optim.min_lr, optim.schedule) == (2e-4, 2e-5, "cosine")
    assert (optim.betas, optim.weight_decay, optim.clip_grad) == ((0.9, 0.95), 0.1, 1.0)
    assert train.global_batch == 1280
    assert optim.warmup_steps * 1280 == 4_096_000
    assert (train.steps - 1) * 1280 < 146_484_375 <= train.steps * 1280
    assert run.data.split == "949,50,1"


@pytest.mark.parametrize("name", DQT)
def test_llama_of_the_dqt_paper(name: str) -> None:
    run = get_preset(name)
    model, optim, train = run.model, run.optim, run.train
    shape = (model.layers, model.hidden, model.heads, model.ffn_hidden, train.micro_batch)
    assert shape == DQT[name]
    assert (model.seq_len, model.vocab_size, model.num_kv_heads) == (512, 32002, model.heads)
    assert model.subln
    assert not model.ties_embeddings
    assert (train.global_batch, train.steps, train.seed) == (256, 55_670, 42)
    assert (optim.lr, optim.min_lr, optim.warmup_steps) == (5e-4, 0.0, 2000)
    assert (optim.betas, optim.eps, optim.weight_decay) == ((0.9, 0.999), 1e-6, 0.01)
    assert optim.schedule == "cosine"


@pytest.mark.parametrize("name", ["llama-1.3b", *FP4])
def test_llama_of_the_fp4_paper(name: str) -> None:
    run = get_preset(name)
    model, optim, train = run.model, run.optim, run.train
    # The paper prints no shape of its 1.3B; 24 layers are read off its figures.
    shape = (model.layers, model.hidden, model.heads, model.ffn_hidden)
    assert shape == FP4.get(name, (24, 2048, 16, 5504))
    assert (model.seq_len, model.vocab_size, train.global_batch) == (2048, 32000, 2048)
    assert (optim.lr, optim.min_lr) == (3e-4, pytest.approx(3e-5))
    assert (optim.betas, optim.eps, optim.weight_decay) == ((0.9, 0.95), 1e-8, 0.1)
    assert optim.warmup_steps / train.steps == pytest.approx(0.05, abs=1e-3)
    assert optim.decay_steps is not None
    assert optim.decay_steps / train.steps == pytest.approx(0.9, abs=1e-3)
    assert optim.schedule == "cosine"
