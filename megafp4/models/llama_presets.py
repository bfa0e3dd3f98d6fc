"""Llama runs: ours for small machines, the DQT paper's and the FP4 paper's.

Source marks in the docstrings: [FP4] arXiv 2501.17116, section 5; [MS-AMP] Azure/MS-AMP-Examples,
gpt3/; [DQT] arXiv 2412.04787, supplement 1, and KYuuto1006/DQT, train.py. The papers' tokenizers
are files that a user has to bring: point ``data.tokenizer`` at them.
"""

from megafp4.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from megafp4.models.gpt_presets import BYTE_VOCAB

_LLAMA_VOCAB = 32000


def llama_tiny() -> RunConfig:
    """Llama of 0.8 M parameters on bytes, with grouped-query attention: minutes on a CPU. Ours."""
    return RunConfig(
        name="llama-tiny",
        out="runs/llama-tiny",
        model=ModelConfig(
            family="llama",
            layers=4,
            hidden=128,
            heads=4,
            kv_heads=2,
            ffn_hidden=384,
            vocab_size=BYTE_VOCAB,
            seq_len=128,
        ),
        optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=30),
        train=TrainConfig(
            steps=300, global_batch=8, micro_batch=8, eval_interval=100, eval_batches=16
        ),
    )


def llama_130m() -> RunConfig:
    """BitNet-style Llama 130M of [DQT]: 768 wide, 12 layers, one epoch of Wikipedia."""
    return _dqt_paper("llama-130m", layers=12, hidden=768, heads=12, ffn_hidden=2048, micro=64)


def llama_320m() -> RunConfig:
    """BitNet-style Llama 320M of [DQT]: 1024 wide, 24 layers, one epoch of Wikipedia."""
    return _dqt_paper("llama-320m", layers=24, hidden=1024, heads=16, ffn_hidden=2048, micro=32)


def llama_1b() -> RunConfig:
    """BitNet-style Llama 1B of [DQT]: 2048 wide, 24 layers, one epoch of Wikipedia.

    The paper's second 1B run, on 10 B tokens of FineWeb, takes about 118,800 steps (read off its
    figure).
    """
    return _dqt_paper("llama-1b", layers=24, hidden=2048, heads=32, ffn_hidden=3072, micro=16)


def llama_1_3b() -> RunConfig:
    """Llama 1.3B of [FP4], 100 B tokens.

    The paper prints no widths: 24 layers are inferred from its figures, 2048 wide with 16 heads and
    an MLP of 5504 are our choice.
    """
    return _fp4_paper("llama-1.3b", layers=24, hidden=2048, heads=16, ffn_hidden=5504)


def llama_7b() -> RunConfig:
    """Llama 7B of [FP4], 100 B tokens; shape of LLaMA 2 7B, not printed there."""
    return _fp4_paper("llama-7b", layers=32, hidden=4096, heads=32, ffn_hidden=11008)


def llama_13b() -> RunConfig:
    """Llama 13B of [FP4], 100 B tokens; shape of LLaMA 2 13B, as for the 7B."""
    return _fp4_paper("llama-13b", layers=40, hidden=5120, heads=40, ffn_hidden=13824)


def _dqt_paper(
    name: str, *, layers: int, hidden: int, heads: int, ffn_hidden: int, micro: int
) -> RunConfig:
    """Build a run of [DQT]: SubLN as in 1bitLLM's BitNet, untied, sequence 512, batch 256.

    Printed: shapes, warm-up 2,000, AdamW, cosine, seed 42; from the script: vocabulary 32,002,
    55,670 steps, lr 5e-4, weight decay 0.01, betas, eps 1e-6, initialisation 0.02. Not printed: the
    learning rates that were chosen per model (from 1e-5, 1e-4, 5e-4, 1e-3), and clipping (1.0 is
    the Hugging Face trainer's default). The paper's FP32 baseline is a plain Llama: set
    ``model.subln`` to False for it. Its residual outputs start at 0.02 too, ours are scaled down.
    """
    return RunConfig(
        name=name,
        out=f"runs/{name}",
        dtype="bfloat16",
        model=ModelConfig(
            family="llama",
            layers=layers,
            hidden=hidden,
            heads=heads,
            ffn_hidden=ffn_hidden,
            vocab_size=32002,
            seq_len=512,
            subln=True,
        ),
        optim=OptimConfig(
            lr=5e-4,
            min_lr=0.0,
            betas=(0.9, 0.999),
            eps=1e-6,
            weight_decay=0.01,
            warmup_steps=2000,
        ),
        train=TrainConfig(
            steps=55_670,
            global_batch=256,
            micro_batch=micro,
            seed=42,
            eval_interval=1000,
            eval_batches=2560 // micro,
            checkpoint_interval=5000,
        ),
    )


def _fp4_paper(name: str, *, layers: int, hidden: int, heads: int, ffn_hidden: int) -> RunConfig:
    """Build a run of [FP4]: LLaMA 2, sequence 2048, batch 2048 (4.2 M tokens), 100 B tokens.

    Printed: AdamW 0.9/0.95, eps 1e-8, weight decay 0.1, lr 3e-4, 5 % warm-up, cosine to 10 % of the
    peak. "Over the remaining 90 %" is read as the authors' scripts [MS-AMP] have it: the decay ends
    at 90 % of the run. Not printed: clipping, initialisation (1.0 and 0.02 here), micro-batch.
    """
    steps = 23_842
    return RunConfig(
        name=name,
        out=f"runs/{name}",
        dtype="bfloat16",
        model=ModelConfig(
            family="llama",
            layers=layers,
            hidden=hidden,
            heads=heads,
            ffn_hidden=ffn_hidden,
            vocab_size=_LLAMA_VOCAB,
            seq_len=2048,
        ),
        optim=OptimConfig(
            lr=3e-4, min_lr=3e-5, warmup_steps=steps // 20, decay_steps=steps * 9 // 10
        ),
        train=TrainConfig(
            steps=steps,
            global_batch=2048,
            micro_batch=4,
            eval_interval=500,
            eval_batches=2560,
            checkpoint_interval=1000,
        ),
    )
