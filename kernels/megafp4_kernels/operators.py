"""Operators whose calls take a few microseconds: with ``torch.library.custom_op`` it is tens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def define(name: str, signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``torch.ops.megafp4.<name>``; it has no derivative.

    Args:
        name: Name of the operator.
        signature: Its arguments and results in the notation of ``torch.library.define``.
        run: What it does, on every device.
        fake: What it returns, as empty tensors; raises ValueError for arguments it refuses.
    """
    torch.library.define(f"megafp4::{name}", signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"megafp4::{name}", "CompositeExplicitAutograd", run)
    torch.library.register_fake(f"megafp4::{name}", fake)
