"""Checkpoints: what comes back, what survives a kill, what stays on disk."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megafp4 import checkpoint
from megafp4.checkpoint import layout, store
from megafp4.errors import CheckpointError, ConfigError


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"w": torch.full((3, 2), float(step)), "b": torch.arange(3.0)},
        "optimizer": {"exp_avg.w": torch.full((3, 2), -float(step))},
    }


def save(folder: Path, step: int, keep: int | None = None) -> Path:
    return checkpoint.save(folder, step, tensors_of(step), {"tokens": step * 7}, keep)


def assert_holds(saved: checkpoint.Checkpoint, step: int) -> None:
    assert saved.step == step
    assert saved.meta == {"tokens": step * 7}
    wanted = tensors_of(step)
    assert saved.tensors.keys() == wanted.keys()
    for group, named in wanted.items():
        assert saved.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert torch.equal(saved.tensors[group][name], tensor)


def test_round_trip_and_files(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "checkpoints", 100)
    assert path.name == "step_00000100"
    assert sorted(p.name for p in path.iterdir()) == [
        "checksums.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", "step_00000100"]
    assert (path.parent / "latest").read_text() == "step_00000100\n"
    assert_holds(checkpoint.load(path.parent), 100)
    assert checkpoint.load(path.parent).path == path


def test_floats_in_the_json_part_come_back_bit_for_bit(tmp_path: Path) -> None:
    meta = {"loss": 0.1 + 0.2, "tiny": 5e-324, "list": [1, None, True], "name": "s\u00fc\u00df"}
    checkpoint.save(tmp_path, 0, {}, meta)
    assert checkpoint.load(tmp_path).meta == meta


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", 5), save(tmp_path / "b", 5)
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes()


def test_load_by_step(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert_holds(checkpoint.load(tmp_path, 2), 2)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4: choose one of 1, 2, 3"):
        checkpoint.load(tmp_path, 4)


def test_steps_beyond_eight_digits_sort_by_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    (tmp_path / "latest").unlink()
    assert checkpoint.load(tmp_path).step == 100_000_000


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2)
    assert layout.complete_steps(tmp_path) == [30, 40]
    save(tmp_path, 50, keep=1)
    assert layout.complete_steps(tmp_path) == [50]


def test_retention_never_deletes_what_was_just_saved(tmp_path: Path) -> None:
    # A run that was taken back to an earlier step saves below what is there already.
    for step in (100, 200, 300):
        save(tmp_path, step)
    save(tmp_path, 150, keep=2)
    assert layout.complete_steps(tmp_path) == [150, 300]
    assert_holds(checkpoint.load(tmp_path), 150)


def test_retention_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_00000001").write_text("a file")
    for step in (10, 20):
        save(tmp_path, step, keep=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step_notes", "step_1", "step_00000001", "step_00000020", "latest"}


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 10)
    checkpoint.save(tmp_path, 10, {"model": {"other": torch.ones(1)}}, {}, keep=1)
    saved = checkpoint.load(tmp_path)
    assert list(saved.tensors) == ["model"]
    assert list(saved.tensors["model"]) == ["other"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000010"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test may catch it."""


SYSCALLS = {
    "sync": (layout, "sync"),
    "write_text": (layout, "write_text"),
    "write_tensors": (store, "write_tensors"),
    "rename": (Path, "rename"),
    "replace": (Path, "replace"),
    "rmtree": (layout.shutil, "rmtree"),
    "unlink": (Path, "unlink"),
}


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int, *, after: bool) -> None:
    """Die before or after the ``moment``-th operation on files."""
    count = 0

    def wrap(original):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == moment and not after:
                raise Killed
            result = original(*args, **kwargs)
            if count >= moment and after:
                raise Killed
            return result

        return wrapped

    for owner, name in SYSCALLS.values():
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(
    tmp_path: Path, again: bool, after: bool
) -> None:
    """``again``: the step that is being saved is there already, and is the only one."""
    killed = 0
    for moment in range(1, 60):
        folder = tmp_path / str(moment)
        old, new = (20, 20) if again else (10, 20)
        save(folder, old)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment, after=after)
            try:
                save(folder, new, keep=1)
            except Killed:
                killed += 1
            else:
                break
        saved = checkpoint.load(folder)
        assert_holds(saved, saved.step)
        assert saved.step in (old, new)
        # The next save works and leaves nothing behind.
        save(folder, 30, keep=1)
        assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000030"]
        assert_holds(checkpoint.load(folder), 30)
    assert killed > 8
    assert_holds(checkpoint.load(folder), 20)


def test_every_file_is_on_disk_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, rename, replace = layout.sync, Path.rename, Path.replace
    monkeypatch.setattr(layout, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (events.append(f"-> {to.name}"), rename(path, to))[1]
    )
    monkeypatch.setattr(
        Path, "replace", lambda path, to: (events.append(f"-> {to.name}"), replace(path, to))[1]
    )
    path = save(tmp_path, 10)
    named = events.index("-> step_00000010")
    assert {entry.name for entry in path.iterdir()} < set(events[:named])
    # The folder's own entries last, then the new name, and only then what points to it.
    assert events[named - 1] == ".unfinished-step_00000010"
    assert events[named + 1 :] == [
        tmp_path.name,
        ".unfinished-latest",
        "-> latest",
        tmp_path.name,
    ]


def test_a_kill_in_the_middle_of_deleting_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_after_one_file(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        raise Killed

    for step in (10, 20):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(layout.shutil, "rmtree", die_after_one_file)
        with pytest.raises(Killed):
            save(tmp_path, 30, keep=1)
    assert layout.complete_steps(tmp_path) == [20, 30]
    assert_holds(checkpoint.load(tmp_path), 30)
    assert_holds(checkpoint.load(tmp_path, 20), 20)
    save(tmp_path, 40, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000040"]


@pytest.mark.parametrize("content", [None, "", "step_00000099\n", "step_x", "../../etc"])
def test_without_a_usable_latest_the_newest_complete_one_is_taken_and_said(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert_holds(checkpoint.load(tmp_path), 20)
    assert "taking the newest complete checkpoint, step 20" in caplog.text


def test_latest_can_be_pointed_back_by_hand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "latest").write_text("step_00000010")
    assert_holds(checkpoint.load(tmp_path), 10)
    assert caplog.text == ""


def test_loading_changes_nothing_on_disk(tmp_path: Path) -> None:
    # A reader must not clear away what a trainer is writing at this moment.
    save(tmp_path, 10)
    writing = layout.unfinished_folder(tmp_path, 20)
    writing.mkdir()
    (writing / "model.safetensors").write_bytes(b"half")
    assert_holds(checkpoint.load(tmp_path), 10)
    assert (writing / "model.safetensors").read_bytes() == b"half"


def test_loaded_tensors_survive_the_deletion_of_their_files(tmp_path: Path) -> None:
    save(tmp_path, 10)
    saved = checkpoint.load(tmp_path)
    save(tmp_path, 20, keep=1)
    assert_holds(saved, 10)
    saved.tensors["model"]["w"].add_(1)
    assert_holds(checkpoint.load(tmp_path), 20)


@pytest.mark.parametrize("content", ["nothing", "no folder", "unfinished"])
def test_nothing_to_load(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "checkpoints"
    if content != "no folder":
        folder.mkdir()
    if content == "unfinished":
        layout.unfinished_folder(folder, 10).mkdir()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint \(no step_\.\.\. folder\)"):
        checkpoint.load(folder)


def test_the_folder_of_one_step_is_told_apart(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    with pytest.raises(CheckpointError, match="is a single checkpoint: give the folder that holds"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "cannot keep 0 checkpoints"),
        ({"step": -1}, "checkpoint of step -1"),
        ({"tensors": {"../model": {}}}, "'../model' cannot name a file"),
        ({"tensors": {"": {}}}, "'' cannot name a file"),
    ],
)
def test_saves_that_make_no_sense(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checkpoint.save(**{"folder": tmp_path, "step": 1, "tensors": {}, "meta": {}, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_meta_that_is_not_json(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        checkpoint.save(tmp_path, 2, {}, {"tensor": torch.ones(1)})
    assert_holds(checkpoint.load(tmp_path), 1)


def test_checksums_are_sha256_of_the_files(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    recorded = json.loads((path / "checksums.json").read_text())
    assert recorded.keys() == {"model.safetensors", "optimizer.safetensors", "state.json"}
    for name, entry in recorded.items():
        content = (path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
