"""Boxes of tensors: saved by some ranks, read by others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megafp4.checkpoint import sharded
from megafp4.checkpoint.boxes import Box, Parts, run_boxes
from megafp4.checkpoint.layout import complete_steps
from megafp4.checkpoint.sharded import ShardedReader, save_sharded
from megafp4.errors import CheckpointError


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_a_run_of_elements_is_a_few_boxes(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(torch.Size(shape).numel())
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    boxes = list(run_boxes(shape, start, stop))
    found = torch.cat([box.of(whole.view(shape)).reshape(-1) for box, _ in boxes] or [whole[:0]])
    assert torch.equal(found, whole[start:stop])
    assert len(boxes) <= 2 * len(shape) - 1
    for box, place in boxes:
        assert box.of(whole.view(shape)).reshape(-1)[0] == start + place


def test_boxes_overlap_where_they_share_elements() -> None:
    a, b = Box((0, 2), (4, 4)), Box((3, 0), (4, 3))
    assert a.overlap(b) == Box((3, 2), (1, 1))
    assert a.overlap(Box((4, 2), (1, 1))) is None
    assert Box((), ()).overlap(Box((), ())) == Box((), ())
    assert Box((3, 2), (1, 1)).within(b) == Box((0, 2), (1, 1))


def on_ranks(count: int, act: Callable[[int, sharded.Share], Any]) -> list[Any]:
    """Run a function on threads that stand for ranks."""
    barrier, box = Barrier(count), [None] * count

    def share_on(rank: int) -> sharded.Share:
        def share(value: Any) -> Sequence[Any]:
            box[rank] = value
            barrier.wait()
            found = list(box)
            barrier.wait()
            return found

        return share

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: act(rank, share_on(rank)), range(count)))


WHOLE = {
    "matrix": torch.randn(6, 10, generator=torch.Generator().manual_seed(0)),
    "codes": torch.arange(48, dtype=torch.uint8).view(12, 4),
    "fp8": torch.linspace(-3, 3, 60).view(6, 10).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "nothing": torch.zeros(0, 4),
}


def parts_of(rank: int, count: int) -> dict[str, Parts]:
    """Rank r of n: a run of the matrix, rows of the codes, columns of FP8; rank 0 the rest."""
    matrix, fp8 = WHOLE["matrix"].clone(), WHOLE["fp8"].clone()
    start, stop = rank * 60 // count, (rank + 1) * 60 // count
    flat = matrix.view(-1)[start:stop]
    rows = range(rank * 12 // count, (rank + 1) * 12 // count)
    columns = 10 // count
    of_matrix = tuple(
        (box, flat[place : place + box.numel].view(box.sizes))
        for box, place in run_boxes((6, 10), start, stop)
    )
    of_codes = Box((rows.start, 0), (len(rows), 4))
    of_fp8 = Box((0, rank * columns), (6, columns))
    held = {
        "matrix": Parts((6, 10), torch.float32, of_matrix),
        "codes": Parts((12, 4), torch.uint8, ((of_codes, of_codes.of(WHOLE["codes"].clone())),)),
        "fp8": Parts((6, 10), torch.float8_e4m3fn, ((of_fp8, of_fp8.of(fp8)),)),
    }
    for name in ("scalar", "nothing"):
        value = WHOLE[name]
        held[name] = Parts.none(value.shape, value.dtype) if rank else Parts.whole(value.clone())
    return held


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def save(folder: Path, count: int, step: int = 3, keep: int = 2) -> None:
    def act(rank: int, share: sharded.Share) -> Path:
        groups = {"model": parts_of(rank, count)}
        return save_sharded(folder, step, groups, {"loss": 0.1, "who": rank}, rank, share, keep)

    assert on_ranks(count, act) == [folder / f"step_{step:08d}"] * count


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 5), (5, 2)])
def test_other_boxes_are_read_than_were_written(tmp_path: Path, writers: int, readers: int) -> None:
    save(tmp_path, writers)
    for rank in range(readers):
        reader = ShardedReader(tmp_path / "step_00000003")
        wanted = parts_of(rank, readers)
        for name, parts in wanted.items():
            expected = [tensor.clone() for _, tensor in parts.held]
            for _, tensor in parts.held:
                tensor.copy_(torch.zeros_like(tensor))
            reader.fill("model", name, parts)
            for (_, tensor), value in zip(parts.held, expected, strict=True):
                assert torch.equal(bits(tensor), bits(value)), name
    assert reader.step == 3
    assert reader.meta == {"loss": 0.1, "who": 0}


def test_the_whole_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "_FILE_BYTES", 16)  # a file for nearly every box
    save(tmp_path, 2)
    reader = ShardedReader(tmp_path / "step_00000003")
    found = reader.whole("model")
    assert found.keys() == WHOLE.keys()
    for name, value in WHOLE.items():
        assert torch.equal(bits(found[name]), bits(value)), name
    assert len(list((tmp_path / "step_00000003").glob("rank_00000_*"))) > 2
    on_ranks(3, reader.check)


def test_old_checkpoints_go(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, 2, step)
    assert complete_steps(tmp_path) == [3, 4]


def test_a_rank_that_fails_fails_all_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 2)

    def act(rank: int, share: sharded.Share) -> str:
        whole = {"x": Parts.whole(torch.ones(3))}  # on both ranks: twice too much
        with pytest.raises(CheckpointError, match="'model/x' was saved as 2 parts") as caught:
            save_sharded(tmp_path, 4, {"model": whole}, {}, rank, share, 2)
        return str(caught.value)

    first, second = on_ranks(2, act)
    assert first == second
    assert complete_steps(tmp_path) == [3]
    save(tmp_path, 2, 4)
    assert complete_steps(tmp_path) == [3, 4]


def test_damage_is_found_on_all_ranks(tmp_path: Path) -> None:
    save(tmp_path, 2)
    victim = tmp_path / "step_00000003" / "rank_00001_00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    reader = ShardedReader(victim.parent)

    def act(rank: int, share: sharded.Share) -> None:
        with pytest.raises(CheckpointError, match=r"rank_00001_00000.* is damaged"):
            reader.check(rank, share)

    on_ranks(2, act)
    victim.unlink()
    with pytest.raises(CheckpointError, match="is missing: restore it"):
        reader.check(0, lambda value: [value])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 2)
    reader = ShardedReader(tmp_path / "step_00000003")
    with pytest.raises(CheckpointError, match="holds no 'other' in 'model'"):
        reader.fill("model", "other", Parts.whole(torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"'matrix' .* expected torch.float32 \[5, 12\]"):
        reader.fill("model", "matrix", Parts.whole(torch.zeros(5, 12)))
    state = tmp_path / "step_00000003" / "state.json"
    table = json.loads(state.read_text())
    del table["groups"]["model"]["matrix"]["parts"][0]
    state.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="elements of 'matrix' are missing"):
        ShardedReader(state.parent).fill("model", "matrix", Parts.whole(torch.zeros(6, 10)))
    table["format_version"] = 1
    state.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="is not of a sharded checkpoint"):
        ShardedReader(state.parent)
