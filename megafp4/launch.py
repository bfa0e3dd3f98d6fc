"""Who this process is in a job of several ranks, how such a job begins and ends, and who says why.

torchrun says who a rank is, or Slurm where it starts the processes itself. Host tensors travel by
gloo and device tensors by NCCL, through the same groups.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console

from megafp4.errors import ConfigError

USER_ERROR = 2
"""Exit code of a request that cannot be met."""

GRACE_S = 10.0
"""Seconds for which ranks with nothing to say stay, so that the first one can."""

_LOCAL_RANK = "SLURM_LOCALID"
_SLURM_PORTS = range(20_000, 40_000)


@dataclass(frozen=True)
class Job:
    """A rank's place in the job; the default is a job of one process."""

    rank: int = 0
    """Number of this process."""
    world_size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Number of this process on its machine: its GPU."""
    address: str = ""
    """Where the ranks meet."""

    @property
    def speaks(self) -> bool:
        """Whether this rank says what all ranks would."""
        return self.rank == 0

    def use_device(self, name: str) -> None:
        """Make this rank's GPU the current one, so that ``cuda`` means it.

        Raises:
            ConfigError: Several ranks are to use one GPU, or there are too few.
        """
        if self.world_size == 1:
            return
        import torch  # which takes a second, and only a run needs it

        if torch.device(name).type != "cuda":
            return
        if torch.device(name).index is not None:
            raise ConfigError(
                f"device {name!r} names one GPU for {self.world_size} ranks: give cuda, and each "
                "rank takes its own"
            )
        count = torch.cuda.device_count()
        # Slurm may show each task one GPU only, its own.
        index = 0 if count == 1 and _LOCAL_RANK in os.environ else self.local_rank
        if index >= count:
            raise ConfigError(
                f"rank {self.rank} is number {index + 1} on a machine with {count} GPUs: start as "
                "many ranks as there are GPUs"
            )
        torch.cuda.set_device(index)

    def join(self, device: str) -> None:
        """Connect the ranks.

        Raises:
            CommunicationError: Somebody did not come in time.
        """
        if self.world_size > 1:
            from megafp4.parallel.mesh import connect

            gpu = device.startswith("cuda")
            if gpu:
                import torch  # as in use_device
            # Only torchrun sets it, and DeepSpeed takes it for the number of the GPU.
            here = torch.cuda.current_device() if gpu else self.local_rank
            os.environ.setdefault("LOCAL_RANK", str(here))
            backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
            connect(backend, self.rank, self.world_size, self.address)

    def leave(self) -> None:
        """Disconnect at the end of a job that went well."""
        if self.world_size > 1:
            from megafp4.parallel.mesh import disconnect

            disconnect()

    def let_first_speak(self) -> None:
        """Stay a while, unless this is the first rank, which may be about to say the same.

        A launcher ends all ranks when one has ended, so whoever comes back from here has an error
        of its own to tell.
        """
        if not self.speaks:
            time.sleep(GRACE_S)


def find_job(environment: Mapping[str, str] = os.environ) -> Job:
    """Read from the environment who this process is.

    Returns:
        What torchrun set, else what Slurm set for a step of several tasks, else a job of one.

    Raises:
        ConfigError: A variable is missing or not a number.
    """
    if "WORLD_SIZE" in environment:
        size = _number(environment, "WORLD_SIZE")
        if size == 1:
            return Job()
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            _text(environment, name)
        return Job(_number(environment, "RANK"), size, _number(environment, "LOCAL_RANK"), "env://")
    # SLURM_NTASKS is also set for a batch script itself, which is one process.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        host = environment.get("MASTER_ADDR") or first_host(
            _text(environment, "SLURM_STEP_NODELIST")
        )
        port = environment.get("MASTER_PORT") or str(
            _SLURM_PORTS[_number(environment, "SLURM_JOB_ID") % len(_SLURM_PORTS)]
        )
        return Job(
            _number(environment, "SLURM_PROCID"),
            _number(environment, "SLURM_STEP_NUM_TASKS"),
            _number(environment, _LOCAL_RANK),
            f"tcp://{host}:{port}",
        )
    return Job()


def first_host(nodes: str) -> str:
    """First machine of Slurm's list: ``node[07-09,12],other`` begins with ``node07``."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?", nodes)
    if found is None:
        raise ConfigError(f"SLURM_STEP_NODELIST is {nodes!r}: set MASTER_ADDR to the first machine")
    return "".join(part or "" for part in found.groups())


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise ConfigError(
            f"the environment lacks {name}: start several ranks with torchrun or srun, which set it"
        )
    return environment[name]


def _number(environment: Mapping[str, str], name: str) -> int:
    text = _text(environment, name)
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r} in the environment: give a number")
    return int(text)


def refuse(sentence: str, *, own: bool = False) -> int:
    """Print why a request cannot be met.

    Args:
        sentence: The reason.
        own: The other ranks do not say the same.

    Returns:
        The exit code.
    """
    job = _job()
    if not own:
        job.let_first_speak()
    who = "" if job.speaks else f"rank {job.rank} of {job.world_size}: "
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"error: {who}{sentence}", style="red", markup=False)
    return USER_ERROR


def say_who_fails() -> None:
    """Name the rank whose traceback is about to be printed, if there are several."""
    if (job := _job()).world_size > 1:
        print(f"rank {job.rank} of {job.world_size} fails:", file=sys.stderr)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, for which torch has no type on a CPU."""
    words = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(part in str(error) for part in words)


def _job() -> Job:
    try:
        return find_job()
    except ConfigError:  # which says so itself
        return Job()
