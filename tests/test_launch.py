"""Who a process is: torchrun's variables, Slurm's, or none."""

import pytest

from megafp4.errors import ConfigError
from megafp4.launch import Job, find_job, first_host

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "20007",
    "SLURM_STEP_NODELIST": "gpu[08-09]", "SLURM_NTASKS": "4",
}  # fmt: skip


def test_torchrun_comes_first() -> None:
    assert find_job(SLURM | TORCHRUN) == Job(5, 8, 1, "env://")
    assert find_job(TORCHRUN | {"WORLD_SIZE": "1"}) == Job()


def test_slurm_meets_on_its_first_machine() -> None:
    assert find_job(SLURM) == Job(3, 4, 1, "tcp://gpu08:20007")
    assert find_job(SLURM | {"MASTER_ADDR": "b", "MASTER_PORT": "1"}).address == "tcp://b:1"


def test_a_batch_script_is_one_process() -> None:
    alone = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    assert find_job(alone) == Job()
    assert find_job({}) == Job()


@pytest.mark.parametrize("name", sorted(TORCHRUN.keys() - {"WORLD_SIZE"}))
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks {name}: start several ranks with torchrun"):
        find_job({key: value for key, value in TORCHRUN.items() if key != name})


def test_what_is_no_number_is_named() -> None:
    with pytest.raises(ConfigError, match="RANK is 'x' in the environment"):
        find_job(TORCHRUN | {"RANK": "x"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu01", "gpu01"), ("gpu[07-09,12],b", "gpu07"), ("a,b", "a"), ("n[1,4]-ib", "n1-ib")],
)
def test_first_hosts(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
