"""Training steps of a preset on random tokens: forward, backward, clipping and AdamW."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.report import Report
from megafp4.models import QuantizedFactory, build_model, flops_per_token, get_preset
from megafp4.models.decoder import Decoder
from megafp4.models.execution import Execution
from megafp4.optim import build_optimizer, clip_grad_norm_on_device
from megafp4.precision import Precision
from megafp4.train.graphs import Recorder

_COLUMNS = ("recipe", "tokens/s", "ms", "x BF16", "TFLOP/s (half)", "TFLOP/s (full)", "peak GiB")
_LEARNING_RATE = 1e-5


def measure(
    preset: str,
    recipes: Sequence[str],
    layers: int,
    micro_batch: int,
    micro_batches: int,
    steps: int,
    graph: bool,
) -> Report:
    """Time steps of each recipe; the check is that the loss of one repeated batch falls."""
    name = f"{preset}, micro-batch {micro_batch}, {micro_batches} a step"
    report = Report(f"Training step of {name}", _COLUMNS, "tokens/s")
    base = None
    for recipe in recipes:
        ms, losses, model, tokens = _run(
            preset, recipe, layers, micro_batch, micro_batches, steps, graph
        )
        config = model.config
        speed = tokens / ms * 1e3
        base = speed if recipe == "bf16" else base
        half, full = (
            flops_per_token(config, config.seq_len, kind) * speed / 1e12
            for kind in ("half", "full")
        )
        report.add(
            recipe,
            speed,
            ms,
            speed / base if base else "",
            half,
            full,
            torch.cuda.max_memory_allocated() / 2**30,
            error=losses[-1] / losses[0],
            limit=0.999,
            losses=losses,
            layers=config.layers,
        )
        del model
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return report


def _run(
    preset: str,
    recipe: str,
    layers: int,
    micro_batch: int,
    micro_batches: int,
    steps: int,
    graph: bool,
) -> tuple[float, list[float], Decoder, int]:
    run = get_preset(preset)
    config = replace(run.model, dropout=0.0, layers=layers or run.model.layers)
    precision = Precision(seed=1, accumulates=True)
    factory = QuantizedFactory(recipe, "hopper", precision, config.layers)
    with torch.device("meta"):
        model = build_model(config, factory, torch.bfloat16)
    model.to_empty(device="cuda")
    _initialize(model)
    model.execute(Execution(compiled=True))
    optimizer = build_optimizer(model.named_parameters(), run.optim, 0, fused=True)
    recorder = Recorder(model, precision) if graph else None
    shape = micro_batches, micro_batch, config.seq_len + 1
    ids = torch.randint(config.vocab_size, shape, device="cuda")
    batches = [(one[:, :-1].contiguous(), one[:, 1:].contiguous()) for one in ids]
    shares = torch.full((micro_batches,), 1.0 / micro_batches, device="cuda")
    skip = torch.zeros((), device="cuda")

    def step(number: int) -> torch.Tensor:
        loss = None if recorder is None else recorder.accumulate(batches, shares, number)
        if loss is None:
            loss, precision.step = torch.zeros((), device="cuda"), number
            for index, (tokens, targets) in enumerate(batches):
                precision.first_token = index * tokens.numel()
                part = model(tokens, targets) * shares[index]
                part.backward()
                loss += part.detach()
        _, scale = clip_grad_norm_on_device(model.parameters(), run.optim.clip_grad)
        optimizer.step(number, _LEARNING_RATE, grad_scale=scale, skip=skip)
        optimizer.zero_grad()
        return loss.clone()

    losses = [float(step(number)) for number in range(4)]
    torch.cuda.synchronize()
    started = time.perf_counter()
    rest = [step(4 + number) for number in range(steps)]
    torch.cuda.synchronize()
    ms = 1e3 * (time.perf_counter() - started) / steps
    return ms, [*losses, *map(float, rest)], model, ids[..., 1:].numel()


def _initialize(model: Decoder) -> None:
    """Random weights, drawn on the device."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02)
