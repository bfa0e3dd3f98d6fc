"""Who computes: interchangeable ways to multiply quantized operands, and the precision ledger."""

from collections.abc import Callable
from types import MappingProxyType

from megafp4.backends.base import Backend, Operand, Slope, operand_format
from megafp4.backends.bf16 import BF16Backend
from megafp4.backends.blackwell import BlackwellBackend
from megafp4.backends.hopper import HopperBackend
from megafp4.backends.ledger import Ledger
from megafp4.backends.reference import ReferenceBackend
from megafp4.errors import unknown_name

__all__ = [
    "BF16Backend",
    "Backend",
    "BlackwellBackend",
    "HopperBackend",
    "Ledger",
    "Operand",
    "ReferenceBackend",
    "Slope",
    "backend_names",
    "operand_format",
    "resolve_backend",
]

_BACKENDS: MappingProxyType[str, Callable[[], Backend]] = MappingProxyType(
    {
        "reference": ReferenceBackend,
        "bf16": BF16Backend,
        "hopper": HopperBackend,
        "blackwell": BlackwellBackend,
    }
)


def backend_names() -> tuple[str, ...]:
    """Names of the backends that exist."""
    return tuple(_BACKENDS)


def resolve_backend(backend: str | Backend) -> Backend:
    """Look a backend up by name; a backend object is returned as it is.

    What was asked for is returned or refused: there is no second choice.

    Raises:
        ConfigError: No backend has this name.
    """
    if not isinstance(backend, str):
        return backend
    if backend not in _BACKENDS:
        raise unknown_name("backend", backend, _BACKENDS)
    return _BACKENDS[backend]()
