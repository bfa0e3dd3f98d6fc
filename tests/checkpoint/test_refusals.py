"""What is not loaded: pickles, damaged files, other models, newer formats."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from megafp4 import checkpoint
from megafp4.checkpoint import check_compatible, signature
from megafp4.checkpoint.integrity import checksums, refuse_pickle
from megafp4.errors import CheckpointError


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Folder of one saved step, with an older one beside it."""
    model = nn.Linear(4, 3).state_dict()
    for step in (5, 10):
        path = checkpoint.save(tmp_path / "ckpt", step, {"model": model}, {"step": step})
    return path


def sign_again(path: Path) -> None:
    """Make the checksums fit, as somebody who tampers on purpose would."""
    (path / "checksums.json").write_text(json.dumps(checksums(path)))


@pytest.mark.parametrize("name", ["model.pt", "a.PTH", "pytorch_model.bin", "x.pkl", "o.distcp"])
def test_a_pickle_by_its_name(saved: Path, name: str) -> None:
    (saved / name).write_bytes(b"")
    sign_again(saved)
    with pytest.raises(CheckpointError, match=rf"{name} is a pickle, .*: convert it"):
        checkpoint.load(saved.parent)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "torch", "torch-legacy"])
@pytest.mark.parametrize("size", [1, 50, 300, 70000])
def test_a_pickle_by_its_content_never_runs(saved: Path, protocol: object, size: int) -> None:
    trace = saved.parent / "trace"
    content = {"bomb": Bomb(trace), "padding": "x" * size}
    path = saved / "model.safetensors"
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        zipped = protocol == "torch"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    sign_again(saved)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a pickle"):
        checkpoint.load(saved.parent)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()


def test_a_text_pickle_is_no_safetensors_file(saved: Path) -> None:
    trace = saved.parent / "trace"
    (saved / "model.safetensors").write_bytes(pickle.dumps(Bomb(trace), protocol=0))
    sign_again(saved)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        checkpoint.load(saved.parent)
    assert not trace.exists()


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x950480])
def test_safetensors_headers_that_look_like_pickles_are_told_apart(
    tmp_path: Path, length: int
) -> None:
    header = b'{"__metadata__":{"x":"'
    header += b"y" * (length - len(header) - 3) + b'"}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header)
    assert refuse_pickle(path) is None


def test_a_run_folder_of_pickles(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=r"model_optim_rng\.pt is a pickle"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"model_optim_rng\.pt is a pickle"):
        checkpoint.load(tmp_path / "model_optim_rng.pt")


def test_a_file_instead_of_a_folder(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        checkpoint.load(saved / "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "append", "empty", "delete"])
def test_damage_is_found_and_the_file_named(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-2] ^= 1
    elif damage == "truncate":
        del content[-1]
    elif damage == "append":
        content += b" "
    elif damage == "empty":
        content.clear()
    path.write_bytes(content)
    if damage == "delete":
        path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is (damaged|missing)"):
        checkpoint.load(saved.parent)
    # An older one is loaded only when it is asked for.
    assert checkpoint.load(saved.parent, 5).step == 5


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[]"])
def test_damaged_checksums(saved: Path, content: bytes | None) -> None:
    path = saved / "checksums.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checksums\.json (cannot be read|holds no table)"):
        checkpoint.load(saved.parent)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "..", ""])
def test_checksums_of_files_elsewhere(saved: Path, name: str) -> None:
    entries = json.loads((saved / "checksums.json").read_text())
    entries[name] = {"bytes": 0, "sha256": ""}
    (saved / "checksums.json").write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match="not a file of its folder"):
        checkpoint.load(saved.parent)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors"])
def test_a_file_without_checksum_is_not_read(saved: Path, name: str) -> None:
    entries = json.loads((saved / "checksums.json").read_text())
    del entries[name]
    (saved / "checksums.json").write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(saved.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has checkpoint format 2, this megafp4 reads up to 1: upgrade"),
        ({"format_version": "new"}, "has no format version"),
        ({"step": 11}, "was saved as step 11: give the folder its name back"),
        ({"groups": {"../x": {"tied": {}, "expanded": {}}}}, "is missing"),
        ({"groups": {"model": {"tied": {"a": "b"}, "expanded": {}}}}, "cannot be read"),
        ({"groups": {"model": {"tied": {}, "expanded": {"bias": [7, 7]}}}}, "cannot be read"),
    ],
)
def test_a_state_file_that_does_not_fit(saved: Path, change: dict, message: str) -> None:
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | change))
    sign_again(saved)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(saved.parent)


def test_other_files_in_the_folder_do_no_harm(saved: Path) -> None:
    (saved / "notes.txt").write_text("the good one")
    (saved / "plots").mkdir()
    assert checkpoint.load(saved.parent).step == 10


def test_the_same_model_is_compatible() -> None:
    model = nn.Linear(4, 3)
    check_compatible(signature(model.state_dict()), signature(nn.Linear(4, 3).state_dict()))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (nn.Linear(4, 3, bias=False), r"'bias' is missing; load it"),
        (nn.Linear(4, 5), r"'weight' is float32 \[5, 4\] instead of float32 \[3, 4\], 'bias' is"),
        (nn.Linear(4, 3).half(), r"'weight' is float16 \[3, 4\] instead of float32 \[3, 4\]"),
        (nn.Sequential(nn.Linear(4, 3)), r"'weight' is missing, 'bias' is missing, '0\.weight' is "
         r"not part of it and 1 more"),
    ],
)  # fmt: skip
def test_another_model_is_told_by_its_first_differences(found: nn.Module, message: str) -> None:
    expected = signature(nn.Linear(4, 3).state_dict())
    with pytest.raises(CheckpointError, match=f"belongs to another model: {message}"):
        check_compatible(expected, signature(found.state_dict()))
