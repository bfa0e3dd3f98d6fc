"""GPT runs: ours for small machines, FP8-LM's 125M, the MXFP4 paper's and MS-AMP's.

Source marks in the docstrings: [MXFP4] arXiv 2502.20586 and the launch scripts of
amazon-science/mxfp4-llm; [FP8-LM] arXiv 2310.18313; [MS-AMP] Azure/MS-AMP-Examples, gpt3/.
"""

from dataclasses import replace
from typing import Any

from megafp4.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

_GPT2_VOCAB = 50304
"""GPT-2's 50,257 tokens padded to a multiple of 128, Megatron's default."""
BYTE_VOCAB = 384
"""256 bytes and an end-of-document token, padded to a multiple of 128."""
_GPT2_DATA = DataConfig(tokenizer="gpt2")


def gpt_tiny() -> RunConfig:
    """GPT of 0.9 M parameters on bytes: minutes on two CPU cores. No source; ours."""
    return RunConfig(
        name="gpt-tiny",
        out="runs/gpt-tiny",
        model=ModelConfig(layers=4, hidden=128, heads=4, vocab_size=BYTE_VOCAB, seq_len=128),
        optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=30),
        train=TrainConfig(
            steps=300, global_batch=8, micro_batch=8, eval_interval=100, eval_batches=16
        ),
    )


def gpt_30m() -> RunConfig:
    """GPT of 30 M parameters on GPT-2's vocabulary: an hour-scale check on one GPU.

    No source; ours. Batch and learning rate follow the 125 M model of [FP8-LM], scaled down.
    """
    return RunConfig(
        name="gpt-30m",
        out="runs/gpt-30m",
        dtype="bfloat16",
        data=_GPT2_DATA,
        model=_gpt(layers=6, hidden=384, heads=6, seq_len=1024),
        optim=OptimConfig(lr=6e-4, min_lr=6e-5, warmup_steps=200),
        train=TrainConfig(
            steps=5000, global_batch=128, micro_batch=16, eval_interval=500, eval_batches=80
        ),
    )


def gpt_125m() -> RunConfig:
    """GPT-3 125M (768 wide, 12 layers, 12 heads) as [FP8-LM] trains it.

    Printed: shape, lr 6e-4, batch of 1 M tokens, betas, weight decay, 1,000 warm-up steps, cosine
    to 10 %, sequence 2048, 100 B tokens. Not printed: vocabulary, dropout, initialisation, clipping
    and micro-batch (GPT-2's padded vocabulary, 0, 0.02, 1.0 and 8 here).
    """
    return RunConfig(
        name="gpt-125m",
        out="runs/gpt-125m",
        dtype="bfloat16",
        data=_GPT2_DATA,
        model=_gpt(layers=12, hidden=768, heads=12, seq_len=2048),
        optim=OptimConfig(lr=6e-4, min_lr=6e-5, warmup_steps=1000),
        train=TrainConfig(
            steps=95_367,
            global_batch=512,
            micro_batch=8,
            eval_interval=1000,
            eval_batches=640,
            checkpoint_interval=2000,
        ),
    )


def gpt_345m() -> RunConfig:
    """GPT 345M of [MXFP4]: 24 layers, 1024 wide, 33 B tokens.

    All values are the script's, or the Megatron defaults it leaves in force (Adam 0.9/0.999,
    dropout 0.1, seed 1234). The learning rate stays at its minimum after
    320 k of the 500 k steps.
    """
    return _mxfp4_paper(
        "gpt-345m",
        model=_gpt(layers=24, hidden=1024, heads=16, seq_len=1024, dropout=0.1),
        lr=1.5e-4,
        min_lr=1e-5,
        weight_decay=0.01,
        steps=500_000,
        decay_steps=320_000,
        batch=(64, 8),
        intervals=(10_000, 20_000),
    )


def gpt_1_3b() -> RunConfig:
    """GPT 1.3B of [MXFP4]: 24 layers, 2048 wide, 42 B tokens (or 210 B in 100 k steps)."""
    return _mxfp4_paper(
        "gpt-1.3b",
        model=_gpt(layers=24, hidden=2048, heads=16, seq_len=2048, dropout=0.1),
        lr=2e-4,
        min_lr=2e-5,
        weight_decay=0.1,
        steps=20_000,
        decay_steps=20_000,
        batch=(1024, 4),
        intervals=(1000, 2000),
    )


def gpt_6_7b() -> RunConfig:
    """GPT 6.7B of [MXFP4]: 32 layers, 4096 wide, 21 B tokens, trained there on TP 8.

    Weights, moments and gradients are 106 GB. So that the rest fits on one GPU of 141 GB, outputs
    of norms and activations are made again in backward; no number depends on it.
    """
    run = _mxfp4_paper(
        "gpt-6.7b",
        model=_gpt(layers=32, hidden=4096, heads=32, seq_len=2048, dropout=0.1),
        lr=1.2e-4,
        min_lr=1.2e-5,
        weight_decay=0.1,
        steps=40_000,
        decay_steps=40_000,
        batch=(256, 4),
        intervals=(1000, 5000),
    )
    train = replace(run.train, recompute="selective")
    return replace(run, saved_as="input", train=train)


def gpt_13b() -> RunConfig:
    """GPT 13B of [MS-AMP] (pretrain_13b_megatron.sh): 40 layers, 5120 wide, 300 B tokens.

    The script counts samples (146,484,375; decay over 131,835,938; warm-up over 4,096,000); steps
    here are those over 1,280, rounded up. Trained there on TP 2 with sequence parallelism.
    """
    return RunConfig(
        name="gpt-13b",
        out="runs/gpt-13b",
        dtype="bfloat16",
        data=_GPT2_DATA,
        model=_gpt(layers=40, hidden=5120, heads=40, seq_len=2048, init_std=0.0099),
        optim=OptimConfig(lr=2e-4, min_lr=2e-5, warmup_steps=3200, decay_steps=102_997),
        train=TrainConfig(
            steps=114_441,
            global_batch=1280,
            micro_batch=1,
            seed=43,
            eval_interval=200,
            eval_batches=7 * 1280,
            checkpoint_interval=2000,
        ),
    )


def _gpt(**shape: Any) -> ModelConfig:
    return ModelConfig(vocab_size=_GPT2_VOCAB, **shape)


def _mxfp4_paper(
    name: str,
    *,
    model: ModelConfig,
    lr: float,
    min_lr: float,
    weight_decay: float,
    steps: int,
    decay_steps: int,
    batch: tuple[int, int],
    intervals: tuple[int, int],
) -> RunConfig:
    """Build a run of [MXFP4]: cosine, warm-up over 1 % of the decay, 10 batches an evaluation.

    Args:
        name: Name of the preset.
        model: Shape.
        lr: Peak learning rate.
        min_lr: Last learning rate.
        weight_decay: Decoupled weight decay.
        steps: Optimizer steps.
        decay_steps: Step at which ``min_lr`` is reached.
        batch: Sequences per step and per micro-batch.
        intervals: Steps between evaluations and between checkpoints.
    """
    return RunConfig(
        name=name,
        out=f"runs/{name}",
        dtype="bfloat16",
        data=_GPT2_DATA,
        model=model,
        optim=OptimConfig(
            lr=lr,
            min_lr=min_lr,
            betas=(0.9, 0.999),
            weight_decay=weight_decay,
            warmup_steps=decay_steps // 100,
            decay_steps=decay_steps,
        ),
        train=TrainConfig(
            steps=steps,
            global_batch=batch[0],
            micro_batch=batch[1],
            eval_interval=intervals[0],
            eval_batches=10 * batch[0] // batch[1],
            checkpoint_interval=intervals[1],
        ),
    )
