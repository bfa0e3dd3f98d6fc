"""What a micro-batch keeps for backward, by kind of layer: measured, not estimated."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megafp4.backends.ledger import Ledger
from megafp4.linear import Linear
from megafp4.models.decoder import Decoder
from megafp4.models.layers import DenseLinear, Head, LayerNorm, RMSNorm, SelfAttention

if TYPE_CHECKING:
    from megafp4.train.build import Run

MEMORY = "memory.json"

_KINDS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    ((Linear, DenseLinear), "linear inputs"),
    ((LayerNorm, RMSNorm), "norms"),
    (SelfAttention, "attention"),
    (Head, "head and loss"),
    (nn.Embedding, "embeddings"),
)
_REST = "activations and residuals"


def saved_bytes(model: Decoder, tokens: Tensor, targets: Tensor) -> dict[str, int]:
    """Bytes that one forward pass keeps for backward, by kind of the module that keeps them.

    Memory that several keep counts once, for the first; parameters and buffers do not count.
    Forward is run once with gradients, and nothing of it stays.

    Args:
        model: The model, in training mode.
        tokens: int64 [B, S].
        targets: int64 [B, S].

    Returns:
        Bytes by kind, in order of first use, and their sum as ``total``.
    """
    own = {_address(one) for one in [*model.parameters(), *model.buffers()]}
    seen: dict[int, Tensor] = {}
    counts: Counter[str] = Counter()
    running: list[str] = []

    def keep(tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in own and address not in seen:
            seen[address] = tensor  # held, so that no later tensor comes to lie there
            counts[running[-1] if running else _REST] += tensor.untyped_storage().nbytes()
        return tensor

    def enter(module: nn.Module, _inputs: Any) -> None:
        running.append(next((name for kind, name in _KINDS if isinstance(module, kind)), _REST))

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        running.pop()

    handles = [
        handle
        for module in model.modules()
        for handle in (
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        )
    ]
    before = model.execution.observer
    model.execution.observer = keep
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(tokens, targets)
    finally:
        model.execution.observer = before
        for handle in handles:
            handle.remove()
    return {**counts, "total": counts.total()}


def report_activations(run: Run, step: int) -> None:
    """Measure the first micro-batch of a step, show it, and write ``memory.json``.

    Leaves no trace in training: ledger, statistics, random generators and what the backend carries
    are as before.
    """
    precision = run.precision
    carried = {name: one.clone() for name, one in run.backend.state_dict(run.device).items()}
    ledger, probe = precision.ledger, precision.probe
    precision.ledger, precision.probe = Ledger(), None
    precision.step, precision.first_token = step, 0
    tokens, targets = run.data.training(step)[0]
    devices = [run.device] if run.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            counts = saved_bytes(run.model, tokens, targets)
    finally:
        precision.ledger, precision.probe = ledger, probe
        run.backend.load_state_dict(carried, run.device)
        for module in run.model.modules():
            if isinstance(module, Linear):
                module.op.forget_weights()
    blocks = len(run.model.blocks)
    run.metrics.screen.say(f"kept for backward per micro-batch of {tokens.numel():,} tokens:")
    for kind, count in counts.items():
        per_block = f"{count / blocks / 1e6:>9,.2f} MB per block"
        run.metrics.screen.say(f"  {kind:<26}{count / 1e6:>12,.2f} MB  {per_block}")
    if not run.writes:
        return
    text = json.dumps({"tokens": tokens.numel(), "blocks": blocks, "bytes": counts}, indent=2)
    (run.folder / MEMORY).write_text(text + "\n", encoding="utf-8")


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
