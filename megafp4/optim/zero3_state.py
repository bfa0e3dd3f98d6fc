"""What is saved under ZeRO-3: whole tensors, of which every rank takes its rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megafp4.errors import CheckpointError
from megafp4.parallel.bucket import Bucket, Piece
from megafp4.parallel.fsdp import Share, share_of


def layout_of(name: str, shape: torch.Size, ranks: int) -> Bucket:
    """Where the ranks' rows of one parameter lie in it."""
    shares = [share_of(shape, rank, ranks) for rank in range(ranks)]
    width, shard = shares[0].width, shares[0].every * shares[0].width
    pieces = tuple(
        Piece(name, share.first * width, share.stop * width, rank * shard)
        for rank, share in enumerate(shares)
        if share.numel
    )
    return Bucket(name, "rows", pieces, shard, ranks)


def saved_rows(state: Mapping[str, Tensor], key: str, mine: Tensor, share: Share) -> Tensor:
    """This rank's rows of a saved tensor of the model.

    Args:
        state: Whole tensors.
        key: Which of them.
        mine: This rank's rows as it keeps them.
        share: Which rows these are.

    Raises:
        CheckpointError: The tensor is missing or has another shape or type.
    """
    shape, found = torch.Size((share.shape[0], *mine.shape[1:])), state.get(key)
    if found is None or found.shape != shape or found.dtype != mine.dtype:
        given = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise CheckpointError(
            f"{key!r} of the saved model is {given}, expected {mine.dtype} {list(shape)}: load the "
            "checkpoint of the same model"
        )
    return found[share.first : share.stop]
