"""Weights on their way from their owners, awaited by whoever reads them first.

A step ends with gathers that take as long as sending all weights. The next forward pass needs the
first layer's at once and the last one's much later, so each module waits for its own, and the
gathers of the others go on while it computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from megafp4.parallel.bucket import Bucket
from megafp4.parallel.collectives import Pending


class Arrivals:
    """Gathers of buckets that are under way.

    Args:
        buckets: All buckets.
    """

    def __init__(self, buckets: Iterable[Bucket]) -> None:
        self._home = {name: i for i, bucket in enumerate(buckets) for name in bucket.names}
        self._pending: dict[int, Pending] = {}
        self.awaited_by_modules = False
        """Whether modules wait for what they read; else a step waits for everything."""

    def start(self, index: int, gather: Pending) -> None:
        """Take note of a bucket's gather."""
        self._pending[index] = gather

    def wait(self, names: Collection[str] | None = None) -> None:
        """Wait for some weights, or for all; on a GPU the host does not.

        Raises:
            CommunicationError: Another rank is gone.
        """
        if not self._pending:
            return
        homes = set(self._pending) if names is None else {self._home[name] for name in names}
        for index in homes & self._pending.keys():
            self._pending.pop(index).wait()

    def await_in(self, model: nn.Module, also: Mapping[str, Collection[str]]) -> None:
        """Let every module of a model wait for its weights when it is called, from now on.

        Args:
            model: All its parameters are read by the modules that hold them, and by nobody else
                before :meth:`wait`.
            also: Names of parameters that a module reads besides, by the name of the module.

        Raises:
            CommunicationError: Another rank is gone; when a module is called.
        """
        for prefix, module in model.named_modules():
            own = [name for name, _ in module.named_parameters(prefix, recurse=False)]
            names = frozenset([*own, *also.get(prefix, ())]) & self._home.keys()
            if names:
                module.register_forward_pre_hook(self._hook(names))
        self.awaited_by_modules = True

    def _hook(self, names: frozenset[str]) -> Any:
        def arrive(module: nn.Module, inputs: Any) -> None:
            self.wait(names)

        return arrive
