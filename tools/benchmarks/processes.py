"""Work in processes of its own: one that starts with empty memory, or a rank on each GPU."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

OUT_OF_MEMORY = "OutOfMemoryError"
_POLL_S = 0.05
_GRACE_S = 3.0
"""How long the other ranks may go on after one has failed: their errors may say more."""


def in_processes(module: str, given: Mapping[str, Any], ranks: int, seconds: float) -> Any:
    """Run a module on some ranks, as torchrun would, and return what rank 0 found.

    Each process runs ``main(arguments)`` of the module through :func:`serve`. No process outlives
    this call.

    Args:
        module: Name of the module.
        given: What it is told, as JSON.
        ranks: Processes; one is started as without torchrun.
        seconds: After which all are ended.

    Raises:
        RuntimeError: A process failed, or they did not finish in time.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        processes = []
        port = _free_port()
        for rank in range(ranks):
            log = stack.enter_context((folder / f"log{rank}").open("w"))
            process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(given), name],
                env=_environment(rank, ranks, port),
                stdout=log,
                stderr=log,
            )
            stack.callback(_end, process)
            processes.append(process)
        _wait_for(processes, seconds)
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        if failed:
            status = processes[failed[0]].returncode
            raise RuntimeError(f"it ended with status {status}: {_cause(folder, ranks)}")
        return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def serve(run: Callable[[Mapping[str, Any]], Any], arguments: list[str]) -> int:
    """Be one of the processes: call ``run`` with what is given and leave what it returns.

    Args:
        run: The work.
        arguments: What is given, as JSON, and the folder of the processes.
    """
    given, folder = json.loads(arguments[0]), Path(arguments[1])
    rank = int(os.environ.get("RANK", "0"))
    try:
        found = run(given)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        (folder / f"error{rank}").write_text(f"{type(error).__name__}: {first}", encoding="utf-8")
        raise
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one)}
    if ranks == 1:
        return found
    return found | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = math.inf if math.isinf(seconds) else time.monotonic() + max(seconds, 1.0)
    failing = math.inf
    while None in (statuses := [process.poll() for process in processes]):
        now = time.monotonic()
        if any(statuses):
            failing = min(failing, now + _GRACE_S)
        if now > failing:
            return
        if now > deadline:
            raise RuntimeError(f"it did not finish within the {seconds:.0f} s left")
        time.sleep(_POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _cause(folder: Path, ranks: int) -> str:
    """The first rank's error that is not about the loss of another one; else its last words."""
    errors = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("error*"))]
    causes = [one for one in errors if not one.startswith(("CommunicationError", "Dist"))]
    if causes or errors:
        return (causes or errors)[0]
    lines = [line for r in range(ranks) for line in (folder / f"log{r}").read_text().splitlines()]
    return lines[-1] if lines else "no message"
