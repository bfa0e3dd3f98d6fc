"""Which recipe is in force at which step.

Two published uses: a short high-precision tail removes most of the gap that quantization leaves
[2502.11458, "target precision training schedule"], and moving only the forward GEMM to BF16
recovers nearly as much for a third of the cost [2509.25149, appendix D].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from megafp4.errors import ConfigError
from megafp4.recipes.library import get_recipe
from megafp4.recipes.recipe import Recipe

_HELP = "write e.g. 'mxfp4:0.9,bf16:0.1' (shares of the run) or 'mxfp4@0,fprop=bf16@900' (steps)"


@dataclass(frozen=True)
class PrecisionSchedule:
    """Recipes with the steps at which they take over.

    Raises:
        ConfigError: Steps do not increase from 0, or weights would have to move onto or off a grid.
    """

    stages: tuple[tuple[int, Recipe], ...]
    """(first step, recipe), in order."""

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0:
            raise ConfigError("a precision schedule must say which recipe runs at step 0: " + _HELP)
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise ConfigError(f"precision schedule has start steps {starts}: they must increase")
        names = [recipe.name for _, recipe in self.stages]
        if len({recipe.grid for _, recipe in self.stages}) > 1:
            raise ConfigError(
                f"precision schedule {names} mixes recipes that store weights differently (on a "
                "grid or not): stay with one storage for the whole run"
            )

    @classmethod
    def parse(cls, text: str, steps: int, base: str | Recipe | None = None) -> PrecisionSchedule:
        """Read a schedule.

        Args:
            text: ``name:share,...`` with shares that add up to 1, or ``name@step,...``. Instead of
                a name, ``fprop=name`` replaces only the forward GEMM of the recipe before it.
                Empty means ``base`` for the whole run.
            steps: Optimizer steps of the run.
            base: Recipe in force before the first ``@`` of ``text``.

        Raises:
            ConfigError: The text cannot be read, names an unknown recipe, or has a stage that would
                never run because it starts when the run is over.
        """
        entries = [entry.strip() for entry in text.split(",") if entry.strip()]
        if any(":" in entry for entry in entries):
            pairs = _from_shares(entries, steps)
        else:
            pairs = [_split(entry, "@") for entry in entries]
        stages: list[tuple[int, Recipe]] = []
        current = None if base is None else get_recipe(base)
        if current is not None and (not pairs or pairs[0][1] != "0"):
            stages.append((0, current))
        for name, start in pairs:
            if not start.isdecimal():
                raise ConfigError(f"precision schedule has step {start!r}: " + _HELP)
            current = _resolve(name, current)
            if int(start) >= steps:
                raise ConfigError(
                    f"precision schedule starts {name!r} at step {start}, but a run of {steps} "
                    f"steps ends at step {steps - 1}: start it earlier or remove it"
                )
            stages.append((int(start), current))
        return cls(tuple(stages))

    def recipe_at(self, step: int) -> Recipe:
        """Recipe in force at an optimizer step (counted from 0)."""
        if step < 0:
            raise ConfigError(f"step is {step}: give a number that is not negative")
        return [recipe for start, recipe in self.stages if start <= step][-1]


def _split(entry: str, mark: str) -> tuple[str, str]:
    name, found, value = entry.rpartition(mark)
    if not found or not name:
        raise ConfigError(f"precision schedule has {entry!r}: " + _HELP)
    return name.strip(), value.strip()


def _from_shares(entries: list[str], steps: int) -> list[tuple[str, str]]:
    """Turn shares of the run into start steps."""
    pairs, done = [], 0.0
    for entry in entries:
        name, text = _split(entry, ":")
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            raise ConfigError(f"precision schedule has share {text!r} in {entry!r}: " + _HELP)
        pairs.append((name, str(round(done * steps))))
        done += share
    if abs(done - 1.0) > 1e-6:
        raise ConfigError(f"the shares of a precision schedule add up to {done:g}: make it 1")
    return pairs


def _resolve(name: str, current: Recipe | None) -> Recipe:
    part, found, other = name.partition("=")
    if not found:
        return get_recipe(name)
    if part.strip() != "fprop":
        raise ConfigError(f"precision schedule has {name!r}: only fprop can be switched alone")
    if current is None:
        raise ConfigError(f"precision schedule starts with {name!r}: name a recipe before it")
    forward = get_recipe(other.strip())
    return replace(
        current,
        name=f"{current.name}, fprop={forward.name}",
        summary=f"{current.summary}; forward as in {forward.name}",
        fprop=forward.fprop,
    )
