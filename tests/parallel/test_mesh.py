"""Who is where in the mesh, who talks to whom, and which meshes cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megafp4.config import ModelConfig
from megafp4.errors import ConfigError, UnsupportedError
from megafp4.parallel.mesh import AXES, Mesh, MeshSizes, check_model
from megafp4.recipes import get_recipe
from tests.parallel.pool import Ranks


def test_ranks_and_coordinates_are_the_same_thing() -> None:
    sizes = MeshSizes(pp=2, dp=3, cp=2, tp=4)
    assert sizes.world_size == 48
    places = [sizes.coordinate(rank) for rank in range(48)]
    assert [sizes.rank(place) for place in places] == list(range(48))
    assert len(set(places)) == 48
    assert places[1] == (0, 0, 0, 1)  # tp is fastest
    assert places[4] == (0, 0, 1, 0)
    assert places[24] == (1, 0, 0, 0)


@pytest.mark.parametrize("axes", [*((axis,) for axis in AXES), ("dp", "cp"), ("pp", "tp")])
def test_groups_part_the_ranks(axes: tuple[str, ...]) -> None:
    sizes = MeshSizes(pp=2, dp=3, cp=2, tp=4)
    groups = list(sizes.groups(axes))
    assert sorted(rank for group in groups for rank in group) == list(range(48))
    for group in groups:
        assert group == sorted(group)
        places = [sizes.coordinate(rank)._asdict() for rank in group]
        for axis in AXES:
            if axis not in axes:
                assert len({place[axis] for place in places}) == 1


def test_dp_takes_what_is_left() -> None:
    assert MeshSizes(tp=2, pp=2).fill(16) == MeshSizes(tp=2, pp=2, dp=4)
    with pytest.raises(ConfigError, match="multiple of 6 ranks, and the job has 16"):
        MeshSizes(tp=3, pp=2).fill(16)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tp is 0"):
        MeshSizes(tp=0)
    with pytest.raises(ConfigError, match="rank 4 does not exist"):
        MeshSizes(tp=4).coordinate(4)
    with pytest.raises(ConfigError, match="needs 2 ranks and the job has 1"):
        Mesh(MeshSizes(tp=2))
    with pytest.raises(ConfigError, match="has no device mesh"):
        Mesh(MeshSizes()).device_mesh("cpu")


LLAMA = ModelConfig(
    family="llama", layers=4, hidden=512, heads=8, kv_heads=4, ffn_hidden=1024, vocab_size=1024
)

NARROW = replace(LLAMA, hidden=256)


@pytest.mark.parametrize(
    ("sizes", "changes", "recipe", "error", "message"),
    [
        ({"tp": 3}, {}, "bf16", ConfigError, r"tp 3 does not divide model\.heads 8"),
        ({"tp": 8}, {}, "bf16", ConfigError, r"tp 8 does not divide model\.kv_heads 4"),
        ({"tp": 4}, {"ffn_hidden": 1026}, "bf16", ConfigError, r"model\.ffn_hidden 1026"),
        ({"tp": 2}, {"vocab_size": 1023}, "bf16", ConfigError, r"model\.vocab_size 1023"),
        ({"pp": 5}, {}, "bf16", ConfigError, r"pp 5 needs .* model\.layers is 4"),
        ({"cp": 2, "tp": 2, "sequence": True}, {"seq_len": 1022}, "bf16", ConfigError,
         r"seq_len 1022 cannot be cut into 4 \(cp 2 x tp 2\)"),
        ({"tp": 2}, {"dropout": 0.1}, "bf16", UnsupportedError, "dropout 0.1 under tp 2"),
        ({"tp": 4}, {"hidden": 256}, "mxfp4", ConfigError,
         r"each rank 32 of 128 outputs of 'blocks\.0\.attention\.qkv', not a multiple of 64"),
        ({"tp": 4}, {"ffn_hidden": 160}, "nvfp4", ConfigError,
         r"40 of 160 outputs of 'blocks\.0\.mlp\.gate_up'"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_cut_are_refused(
    sizes: dict[str, Any],
    changes: dict[str, Any],
    recipe: str,
    error: type[Exception],
    message: str,
) -> None:
    model = replace(LLAMA, **changes)
    with pytest.raises(error, match=message):
        check_model(MeshSizes(**sizes), model, get_recipe(recipe))


def test_a_model_that_fits_is_accepted() -> None:
    check_model(MeshSizes(pp=2, cp=2, tp=4, sequence=True), LLAMA, get_recipe("nvfp4"))
    check_model(MeshSizes(tp=2), LLAMA, get_recipe("mxfp4"))
    with pytest.raises(ConfigError, match="attention"):
        check_model(MeshSizes(tp=4), NARROW, get_recipe("mxfp4"))
    check_model(MeshSizes(tp=4), NARROW, get_recipe("mxfp4"), ("*.attention",))


def numbers_of_peers(sizes: MeshSizes) -> dict[str, Any]:
    """World ranks that this rank meets in each group."""
    mesh = Mesh(sizes)
    own = torch.tensor([dist.get_rank()])
    names = (*AXES, "replicas", "model")
    found: dict[str, Any] = {
        name: getattr(mesh, name).all_gather(own, "test").tolist() for name in names
    }
    device_mesh = mesh.device_mesh("cpu")
    found["device"] = [device_mesh.get_local_rank(axis) for axis in AXES]
    found["coordinate"] = list(mesh.coordinate)
    return found


def test_groups_meet_over_real_processes(four: Ranks) -> None:
    found = four.run(numbers_of_peers, MeshSizes(dp=2, tp=2))
    assert [f["tp"] for f in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [f["dp"] for f in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [f["pp"] for f in found] == [[0], [1], [2], [3]]
    assert [f["replicas"] for f in found] == [f["dp"] for f in found]
    assert [f["model"] for f in found] == [f["tp"] for f in found]
    assert all(f["device"] == f["coordinate"] for f in found)
