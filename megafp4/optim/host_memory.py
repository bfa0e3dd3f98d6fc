"""Host memory that a GPU copies from and to by itself, in exactly the size asked for."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megafp4.errors import UnsupportedError

_PAGE = 4096


class HostMemory:
    """Zeroed bytes in host memory, pinned if a stream is given.

    PyTorch's own allocator of pinned memory rounds sizes up to powers of two, so the pages are
    registered here. They stay as long as this object; what it handed out stays readable longer.

    Args:
        size: Bytes.
        last: Stream of the copies that write here; it is waited for before the memory goes.

    Raises:
        UnsupportedError: The system does not pin that much.
    """

    def __init__(self, size: int, last: torch.cuda.Stream | None) -> None:
        size = -(-size // _PAGE) * _PAGE
        self._array = np.zeros(size + _PAGE, np.uint8)
        self._first = -self._array.ctypes.data % _PAGE
        if last is not None and size:
            address = self._array.ctypes.data + self._first
            if int(torch.cuda.cudart().cudaHostRegister(address, size, 0)):
                raise UnsupportedError(
                    f"optim.offload cannot pin {size} bytes of host memory: raise the limit of "
                    "locked memory (ulimit -l), choose shorter optim.states, or set optim.offload "
                    "to false"
                )
            weakref.finalize(self, _release, last, address, self._array)

    def bytes(self, offset: int, count: int) -> Tensor:
        """Some of the bytes, uint8 [count]; ``count`` is positive."""
        start = self._first + offset
        return torch.frombuffer(self._array, dtype=torch.uint8, count=count, offset=start)

    def like(self, offset: int, tensor: Tensor) -> Tensor:
        """Memory for a tensor of this shape and type, with a storage of its own."""
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        return self.bytes(offset, tensor.nbytes).view(tensor.dtype).view(tensor.shape)


def _release(last: torch.cuda.Stream, address: int, array: Any) -> None:
    """Give pages back behind the last copy; ``array`` keeps them until then."""
    last.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)
    del array
