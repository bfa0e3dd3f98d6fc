"""Boxes that ranks hold of a model and its optimizer tile the whole, element by element."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from megafp4.checkpoint.boxes import Parts
from megafp4.optim.shard_states import OwnedState, StateKind
from megafp4.parallel.collectives import Group
from megafp4.parallel.cut import Cut, Layout
from megafp4.train.parts import model_parts, optimizer_parts

QKV = torch.arange(24 * 10.0).view(24, 10)
OUT = torch.arange(24 * 10.0).view(10, 24) + 1000
NORM = torch.arange(10.0) + 5000
WHOLE = {"qkv": QKV, "out": OUT, "norm": NORM}


class Cuts(nn.Module):
    """A fused weight cut by rows in each segment, one cut by columns, one that is whole."""

    def __init__(self, tp: Group) -> None:
        super().__init__()
        self.layouts = {
            "qkv": Layout(Cut((16, 4, 4), tp.size), 0, tp.rank),
            "out": Layout(Cut((24,), tp.size), 1, tp.rank),
        }
        self.qkv = nn.Parameter(self.layouts["qkv"].take(QKV))
        self.out = nn.Parameter(self.layouts["out"].take(OUT))
        self.norm = nn.Parameter(NORM.clone())


def join(parts: Sequence[Mapping[str, Parts]], name: str) -> Tensor:
    """Put together what all ranks write; every element must come once."""
    found = torch.full(parts[0][name].shape, torch.nan)
    for one in parts:
        assert one[name].shape == parts[0][name].shape
        for box, tensor in one[name].held:
            place = box.of(found)
            assert place.isnan().all()
            place.copy_(tensor)
    return found


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_model_is_written_once(tp: int) -> None:
    replicas = 3
    written = [
        model_parts(
            Cuts(Group("tp", t, tp)),
            Group("tp", t, tp),
            Group("dp", r, replicas),
            writing=True,
            skip=frozenset(),
        )
        for t in range(tp)
        for r in range(replicas)
    ]
    for name, value in WHOLE.items():
        assert torch.equal(join(written, name), value), name


def test_what_is_read_is_everything_that_a_rank_holds() -> None:
    tp = Group("tp", 1, 2)
    model = Cuts(tp)
    read = model_parts(model, tp, Group("dp", 2, 3), writing=False, skip=frozenset({"norm"}))
    for name, parameter in model.named_parameters():
        found = torch.cat([box.of(WHOLE[name]).reshape(-1) for box, _ in read[name].held])
        assert torch.equal(found.sort().values, parameter.detach().reshape(-1).sort().values)
        for box, memory in read[name].held:
            assert torch.equal(box.of(WHOLE[name]), memory)


def owned(model: Cuts, rank: int, ranks: int) -> Iterator[OwnedState]:
    """Runs of 3 ranks that end anywhere; the state of an element is the element."""
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        start, stop = count * rank // ranks, count * (rank + 1) // ranks
        state = parameter.detach().reshape(-1)[start:stop]
        kind = StateKind(torch.float32)
        yield OwnedState(name, "exp_avg", parameter.shape, kind, start, stop, state)


@pytest.mark.parametrize("tp", [1, 2])
def test_runs_of_state_are_laid_out_as_the_whole_parameters(tp: int) -> None:
    written = []
    for t in range(tp):
        group = Group("tp", t, tp)
        for rank in range(3):
            model = Cuts(group)
            state = owned(model, rank, 3)
            written.append(optimizer_parts(state, model, group, writing=True, skip=frozenset()))
    for name, value in WHOLE.items():
        assert torch.equal(join(written, f"exp_avg.{name}"), value), name


def test_rows_for_groups_keep_to_their_tp_where_the_parameter_is_cut() -> None:
    names: set[str] = set()
    for t in range(2):
        group = Group("tp", t, 2)
        model = Cuts(group)
        states = (
            OwnedState(
                name, "scale", shape, StateKind(torch.float32, 4, 2), 4, 10, torch.ones(2, 2)
            )
            for name, shape in (("qkv", model.qkv.shape), ("norm", model.norm.shape))
        )
        found = optimizer_parts(states, model, group, writing=True, skip=frozenset())
        names |= found.keys()
        assert found[f"scale.qkv@tp{t}of2"].shape == (30, 2)
        ((box, _),) = found[f"scale.qkv@tp{t}of2"].held
        assert (box.offsets, box.sizes) == ((1, 0), (2, 2))
        assert found["scale.norm"].shape == (3, 2)
        assert len(found["scale.norm"].held) == (t == 0)
    assert names == {"scale.qkv@tp0of2", "scale.qkv@tp1of2", "scale.norm"}


def test_another_stage_writes_what_is_skipped() -> None:
    tp = Group("tp")
    model, skip = Cuts(tp), frozenset({"norm"})
    assert not model_parts(model, tp, Group("dp"), writing=True, skip=skip)["norm"].held
    found = optimizer_parts(owned(model, 0, 1), model, tp, writing=True, skip=skip)
    assert not found["exp_avg.norm"].held
    assert found["exp_avg.qkv"].held
