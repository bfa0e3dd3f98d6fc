"""The whole run as frozen dataclasses.

A run is one :class:`RunConfig`. Presets (:mod:`megafp4.models.presets`) are functions that return
one; the command line and configuration files only replace fields. Values are checked here, when
the object is built, so that a bad run fails before any work is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from megafp4.errors import ConfigError


def _require(
    part: str, config: Any, allowed: str, is_allowed: Callable[[float], bool], *names: str
) -> None:
    """Check numbers of a part one by one; None means a default and passes, NaN never does."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and is_allowed(value)):
            raise ConfigError(f"{part}.{name} is {value}: give {allowed}")


def _is_positive(value: float) -> bool:
    return value > 0


def _is_not_negative(value: float) -> bool:
    return value >= 0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder-only transformer."""

    family: Literal["gpt", "llama"] = "gpt"
    """``gpt``: LayerNorm, learned positions, GELU. ``llama``: RMSNorm, RoPE, SwiGLU."""
    layers: int = 4
    """Number of transformer blocks."""
    hidden: int = 256
    """Width of the residual stream."""
    heads: int = 4
    """Query heads; ``hidden`` must be a multiple."""
    kv_heads: int | None = None
    """Key/value heads for grouped-query attention; None means ``heads``."""
    ffn_hidden: int | None = None
    """Width of the MLP; None means 4 x hidden (gpt) or the Llama rule (llama)."""
    vocab_size: int = 50304
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    seq_len: int = 1024
    """Longest sequence, in tokens."""
    activation: Literal["gelu", "gelu-tanh", "swiglu", "relu2-glu"] | None = None
    """MLP activation; None means ``gelu-tanh`` (gpt) or ``swiglu`` (llama)."""
    norm_eps: float = 1e-5
    """Epsilon of LayerNorm and RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding (llama)."""
    tie_embeddings: bool | None = None
    """Share input and output embedding; None means True for gpt, False for llama."""
    bias: bool | None = None
    """Biases in the linears; None means True for gpt, False for llama."""
    subln: bool = False
    """BitNet's SubLN: an extra RMSNorm in front of the attention and MLP output projections."""
    dropout: float = 0.0
    """Dropout probability of embeddings, attention and residuals."""
    init_std: float = 0.02
    """Standard deviation of normal initialisation; residual outputs get std / sqrt(2 layers)."""

    def __post_init__(self) -> None:
        sizes = ("layers", "hidden", "heads", "kv_heads", "ffn_hidden", "vocab_size", "seq_len")
        _require("model", self, "a positive integer", _is_positive, *sizes)
        _require("model", self, "a positive number", _is_positive, "norm_eps", "rope_theta")
        _require("model", self, "zero or a positive number", _is_not_negative, "init_std")
        if self.hidden % self.heads:
            raise ConfigError(
                f"model.hidden {self.hidden} is not divisible by model.heads {self.heads}: "
                "choose a width that is a multiple of the number of heads"
            )
        if self.heads % self.num_kv_heads:
            raise ConfigError(
                f"model.heads {self.heads} is not divisible by model.kv_heads {self.kv_heads}: "
                "each key/value head must serve the same number of query heads"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout is {self.dropout}: give a probability in [0, 1)")

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads with the default applied."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def num_ffn_hidden(self) -> int:
        """MLP width with the default applied (Llama: 8/3 hidden, rounded up to 256)."""
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        if self.family == "gpt":
            return 4 * self.hidden
        return -(-8 * self.hidden // 3 // 256) * 256

    @property
    def ties_embeddings(self) -> bool:
        """Whether the head shares the embedding, with the default applied."""
        return self.family == "gpt" if self.tie_embeddings is None else self.tie_embeddings

    @property
    def has_bias(self) -> bool:
        """Whether the linears have biases, with the default applied."""
        return self.family == "gpt" if self.bias is None else self.bias

    @property
    def mlp_activation(self) -> str:
        """Activation with the default applied."""
        if self.activation is not None:
            return self.activation
        return "gelu-tanh" if self.family == "gpt" else "swiglu"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read."""

    train: tuple[str, ...] = ()
    """Prefixes of .bin/.idx files to train on, weights may precede them: ``0.7 a 0.3 b``."""
    valid: tuple[str, ...] = ()
    """Prefixes to validate on; empty means a split of the training files."""
    split: str = "949,50,1"
    """Train, validation and test shares of each file when ``valid`` is empty."""
    tokenizer: str = "bytes"
    """``bytes``, ``gpt2``, or a path to a tokenizer.json or SentencePiece model."""
    cache: str | None = None
    """Folder for the sample and shuffle indices; None means beside the data."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights move."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the end of the decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's exponential decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay_steps: int | None = None
    """Step at which ``min_lr`` is reached; None means the last step."""
    wsd_decay_fraction: float = 0.2
    """Share of the steps spent decaying under ``wsd``."""
    states: Literal["fp32", "bf16-sr", "fp8lm", "coat", "coat-sr", "eco"] = "fp32"
    """How matrices and their moments are kept between steps; see docs/optimizer.md."""
    offload: bool = False
    """Keep states in host memory and stream them through the device in every step."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the gradients of matrices; bfloat16 for one micro-batch a step on one rank."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr < math.inf or self.lr == 0:
            raise ConfigError(
                f"optim.lr {self.lr} and optim.min_lr {self.min_lr}: "
                "give 0 <= min_lr <= lr with lr positive"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas is {self.betas}: each must lie in [0, 1)")
        _require("optim", self, "a positive number", _is_positive, "eps")
        names = ("clip_grad", "weight_decay", "warmup_steps")
        _require("optim", self, "zero or a positive number", _is_not_negative, *names)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """In what order, how long, and what is kept."""

    steps: int = 1000
    """Optimizer steps."""
    global_batch: int = 32
    """Sequences per optimizer step."""
    micro_batch: int = 8
    """Sequences per forward and backward pass; must divide ``global_batch``."""
    seed: int = 1234
    """Seed of initialisation, data order, dropout, stochastic rounding and Hadamard signs."""
    eval_interval: int = 100
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_batches: int = 10
    """Micro-batches per evaluation; 0 never evaluates."""
    log_interval: int = 10
    """Steps between metric lines; 0 writes only the last step's."""
    stats_interval: int = 0
    """Steps between quantization-statistics lines; 0 switches them off."""
    checkpoint_interval: int = 0
    """Steps between checkpoints; 0 keeps only the last step's."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    spike_factor: float = 3.0
    """A loss above this multiple of its running mean is a spike; 0 switches the check off."""
    max_spikes: int = 5
    """Consecutive spikes that end the run."""
    compile: bool | None = None
    """Compile the work between the linears with torch.compile; None means on a GPU only."""
    cuda_graph: bool = False
    """Replay forward and backward as a CUDA graph; needs backend hopper."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward makes again: nothing, norms and activations, or whole blocks."""
    memory_report: bool = False
    """Before the first step, measure what a micro-batch keeps for backward, by kind of layer."""

    def __post_init__(self) -> None:
        counts = ("steps", "global_batch", "micro_batch", "keep_checkpoints", "max_spikes")
        _require("train", self, "a positive integer", _is_positive, *counts)
        intervals = [f"{name}_interval" for name in ("eval", "log", "stats", "checkpoint")]
        _require("train", self, "zero or more", _is_not_negative, "eval_batches", *intervals)
        _require("train", self, "zero or a positive number", _is_not_negative, "spike_factor")
        if not 0 <= self.seed < 2**32:  # what NumPy's shuffling takes
            raise ConfigError(f"train.seed is {self.seed}: give an integer from 0 to 2^32 - 1")
        if self.global_batch % self.micro_batch:
            raise ConfigError(
                f"train.global_batch {self.global_batch} is not divisible by train.micro_batch "
                f"{self.micro_batch}: choose a micro-batch that divides the global batch"
            )

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes per optimizer step."""
        return self.global_batch // self.micro_batch


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a job of several ranks shares the work; dp takes the ranks that the others leave."""

    tp: int = 1
    """Ranks that share each layer (tensor parallelism)."""
    sequence: bool = False
    """Cut norms and residuals over the tp ranks as well (sequence parallelism)."""
    pp: int = 1
    """Stages of the pipeline."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = "1f1b"
    """Order of the pipeline's forward and backward passes."""
    chunks: int = 1
    """Stages of each pipeline rank; ``interleaved`` needs at least 2."""
    layers: tuple[int, ...] = ()
    """Transformer blocks of each stage, in order; empty shares them evenly."""
    cp: int = 1
    """Ranks that share the tokens of a sequence (context parallelism)."""
    attention: Literal["all-gather", "ring"] = "all-gather"
    """How attention sees the tokens of the other cp ranks."""
    zero: Literal[1, 2, 3] = 1
    """ZeRO stage: what is cut over dp x cp: optimizer state, also gradients, also weights."""
    wire: Literal["fp8", "fp8-peers", "bf16", "fp32", "fp8-lm"] = "fp8"
    """What gradients travel as; ``fp8-peers``: without NCCL, ``fp8-lm``: one scale, FP8 sums."""
    nodes: int = 1
    """Nodes that dp x cp spans: gradients are summed within each before between them."""
    engine: Literal["megafp4", "deepspeed"] = "megafp4"
    """Who runs ZeRO."""

    def __post_init__(self) -> None:
        if self.sequence and self.tp == 1:
            raise ConfigError(
                "parallel.sequence needs parallel.tp of at least 2: raise tp, or switch sequence "
                "parallelism off"
            )
        if self.schedule == "interleaved" and self.chunks == 1:
            raise ConfigError(
                "parallel.schedule interleaved needs parallel.chunks of at least 2: raise chunks, "
                "or choose 1f1b"
            )
        positive = ("tp", "pp", "chunks", "cp", "nodes")
        _require("parallel", self, "a positive integer", _is_positive, *positive)
        if any(count < 1 for count in self.layers):
            raise ConfigError(
                f"parallel.layers is {list(self.layers)}: give each stage a positive number of "
                "blocks, or leave it empty"
            )
        if self.pp == 1 and (self.chunks > 1 or self.layers):
            raise ConfigError(
                "parallel.chunks and parallel.layers cut a pipeline and parallel.pp is 1: raise "
                "pp, or leave them out"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    name: str = "run"
    """Name shown in logs and reports."""
    recipe: str = "bf16"
    """Which numbers go where; see ``megafp4 recipes``."""
    precision_schedule: str = ""
    """Recipes by share or by step, e.g. ``mxfp4:0.9,bf16:0.1``; empty means ``recipe``."""
    exempt: tuple[str, ...] = ()
    """Linears that stay BF16, as glob patterns of their names: ``blocks.0.* *.mlp.down``."""
    backend: Literal["reference", "bf16", "hopper", "blackwell"] = "reference"
    """Who computes the quantized GEMMs."""
    saved_as: Literal["recipe", "input", "operand", "packed"] = "recipe"
    """Form in which linears keep their input for wgrad; ``recipe`` leaves it to the recipe."""
    device: str = "cpu"
    """Torch device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations between the linears."""
    out: str = "runs/run"
    """Run folder: configuration, metrics, checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("out is empty: name a run folder")
