"""What figures were measured on: versions, commit, clocks and power."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import platform
import statistics
import subprocess
from pathlib import Path

import torch

_PACKAGES = ("triton", "cuda-bindings", "torchao", "transformer-engine")
_QUERY = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
_HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    """Date, GPU, driver, versions and commit."""
    found = {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", _NO_HEADER)
    found |= {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"commit": commit()}


def commit() -> str:
    """Short hash of the commit, ``-dirty`` behind it if tracked files differ; or ``unknown``."""
    short = _first_line("git", "-C", str(_HERE), "rev-parse", "--short", "HEAD")
    if short == "unknown":
        return short
    changed = _first_line(
        "git", "-C", str(_HERE), "status", "--porcelain", "--untracked-files=no", empty=""
    )
    return f"{short}-dirty" if changed else short


def refuse_dirty_tree() -> None:
    """Raise RuntimeError unless the figures can be traced to a commit."""
    found = commit()
    if found == "unknown" or found.endswith("-dirty"):
        raise RuntimeError(
            f"the commit is {found!r}, so nobody could measure the same again: commit first, or "
            "pass --allow-dirty"
        )


class Sensors:
    """Samples clocks, power and temperature of the first visible GPU while it is entered.

    Args:
        command: What prints one line of numbers a sample, in the order of nvidia-smi's query.
    """

    def __init__(self, command: tuple[str, ...] | None = None) -> None:
        self._command = command or (
            "nvidia-smi",
            f"--query-gpu={','.join(_QUERY)}",
            "--format=csv,noheader,nounits",
            "--id=0",
            "--loop-ms=200",
        )
        self._process: subprocess.Popen[str] | None = None
        self.found: dict[str, float] = {}
        """Medians of the samples; the temperature is the highest. Empty without nvidia-smi."""

    def __enter__(self) -> Sensors:
        """Start sampling."""
        try:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except FileNotFoundError:
            self._process = None
        return self

    def __exit__(self, *_: object) -> None:
        """Stop sampling and summarize."""
        if self._process is None:
            return
        self._process.terminate()
        text, _ = self._process.communicate()
        self.found = summarize_samples(text)


def summarize_samples(text: str) -> dict[str, float]:
    """Summarize lines of SM clock, memory clock, power and temperature; broken lines are left out.

    Returns:
        Medians in MHz and W, and the highest temperature in degrees Celsius.
    """
    samples = []
    for fields in csv.reader(text.splitlines()):
        try:
            numbers = [float(field) for field in fields]
        except ValueError:  # "[N/A]", or a line cut off by the end of the process
            continue
        if len(numbers) == len(_QUERY):
            samples.append(numbers)
    if not samples:
        return {}
    sm, memory, power, temperature = zip(*samples, strict=True)
    return {
        "SM MHz": statistics.median(sm),
        "memory MHz": statistics.median(memory),
        "W": statistics.median(power),
        "hottest C": max(temperature),
        "samples": len(samples),
    }


_NO_HEADER = "--format=csv,noheader"


def _first_line(*command: str, empty: str = "unknown") -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    lines = done.stdout.splitlines()
    return "unknown" if done.returncode else lines[0].strip() if lines else empty
