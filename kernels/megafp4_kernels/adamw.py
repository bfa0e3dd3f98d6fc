"""AdamW in one pass over memory, for many tensors in one launch, whatever form their state has.

Bytes of memory traffic per element: fp32 28, bf16-sr 16, fp8lm 16, coat 16, coat-sr 12, eco 14,
with gradients in FP32; two less with gradients in BF16. Bit-equal to ``megafp4.optim.states``,
which explains the forms.

A launch finds its tensors through tables in device memory. Each program works on one tile, rows of
128 elements of one tensor; all but a tensor's last are whole and need no masks, so that they are
loaded 16 bytes at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafp4_kernels.adamw_tiles import COLUMNS, COUNT, FIRST, LARGEST, step_tile
from megafp4_kernels.casts import has_fp8_conversions

GROUP = 128
"""Elements that share a scale."""

FORMS: dict[str, dict[str, torch.dtype]] = {
    "fp32": {"weight": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32},
    "bf16-sr": {
        "weight": torch.bfloat16,
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.bfloat16,
    },
    "fp8lm": {
        "weight": torch.bfloat16,
        "exp_avg": torch.float8_e4m3fn,
        "exp_avg_sq": torch.float16,
        "master_low": torch.int8,
        "exponents": torch.int8,
    },
    "coat": {
        "weight": torch.float32,
        "exp_avg": torch.float8_e4m3fn,
        "exp_avg_sq": torch.float8_e4m3fn,
        "ranges": torch.float32,
    },
    "coat-sr": {
        "weight": torch.bfloat16,
        "exp_avg": torch.float8_e4m3fn,
        "exp_avg_sq": torch.float8_e4m3fn,
        "ranges": torch.float32,
    },
    "eco": {
        "weight": torch.bfloat16,
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.float8_e4m3fn,
        "ranges": torch.float32,
    },
}
"""Types of the tensors of each form of state."""

_TILES = {
    "fp32": (8, 4),
    "bf16-sr": (8, 4),
    "fp8lm": (4, 2),
    "coat": (4, 4),
    "coat-sr": (4, 4),
    "eco": (4, 4),
}
"""Rows of a program and its warps, by form: of the first four the fastest of a few on an H200."""
# Columns of the table, addresses first.
_COLUMN_OF = {
    "weight": 0, "exp_avg": 1, "exp_avg_sq": 2, "master_low": 3, "exponents": 4, "ranges": 4,
}  # fmt: skip


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step"])
def _step_kernel(
    table, grads, tensor_of, amax, scale_ptr, skip_ptr, seed_low, seed_high, step,
    decay, move, inverse_root, beta2, rest1, rest2, eps, feedback,
    FORM: tl.constexpr, GRAD_BF16: tl.constexpr, AMAX: tl.constexpr, NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    # All of this before the branch, for which it would otherwise have to wait.
    skip = tl.load(skip_ptr)
    scale = tl.load(scale_ptr)
    tensor = tl.load(tensor_of + tl.program_id(0))
    entry = table + tensor * COLUMNS
    first_row = (tl.program_id(0) - tl.load(entry + FIRST)) * ROWS
    count = tl.load(entry + COUNT)
    grad_address = tl.load(grads + tensor)
    if skip == 0.0:
        if (first_row + ROWS) * 128 <= count:
            magnitudes = step_tile(
                entry, grad_address, first_row, count, scale, seed_low, seed_high, step,
                decay, move, inverse_root, beta2, rest1, rest2, eps, feedback,
                FORM, GRAD_BF16, NATIVE, ROWS, True,
            )  # fmt: skip
        else:
            magnitudes = step_tile(
                entry, grad_address, first_row, count, scale, seed_low, seed_high, step,
                decay, move, inverse_root, beta2, rest1, rest2, eps, feedback,
                FORM, GRAD_BF16, NATIVE, ROWS, False,
            )  # fmt: skip
        if AMAX:
            largest = tl.max(tl.max(magnitudes, axis=1), axis=0)
            # Ordered as the magnitudes are, so that the result does not depend on who comes first.
            tl.atomic_max(amax + tl.load(entry + LARGEST), largest, sem="relaxed")


class AdamWLaunch:
    """Tensors that take their steps together, in one launch.

    Attributes:
        form: Form of their state, a key of :data:`FORMS`.
    """

    def __init__(
        self,
        form: str,
        tensors: Sequence[Mapping[str, Tensor]],
        streams: Sequence[int],
        amax: Tensor | None = None,
        amax_rows: Sequence[int] | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        """Make the tables; the tensors have to stay where they are.

        Args:
            form: Form of the state.
            tensors: Of each parameter ``weight`` and its state, by the names of :data:`FORMS`. All
                lie on one device, contiguous, on a multiple of 16 bytes. State per group of 128 is
                [groups, 2] or, for the ranges of two moments, [groups, 4].
            streams: Word 3 of each parameter's Philox counter.
            amax: FP32, contiguous: where to write the largest magnitude of each new weight.
            amax_rows: Each parameter's place in ``amax``.
            places: Where each tensor begins in the whole parameter that it is a part of, in
                elements, for the random bits; 0 if not given.

        Raises:
            ValueError: The form is unknown, a tensor is not as it says, or a place is no multiple
                of 128.
        """
        if form not in FORMS:
            raise ValueError(f"form of state is {form!r}: choose one of {', '.join(FORMS)}")
        self.form = form
        self._kept = [*tensors]  # their addresses are in the table
        self._tile = _TILES[form]
        self._device = tensors[0]["weight"].device
        self._shapes = [one["weight"].shape for one in tensors]
        self._amax = None if amax is None else amax.view(torch.int32)
        counts = [shape.numel() for shape in self._shapes]
        tiles = [triton.cdiv(count, GROUP * self._tile[0]) for count in counts]
        firsts = [0, *itertools.accumulate(tiles)]
        rows = amax_rows or [0] * len(tensors)
        groups = [_group_at(place) for place in places or [0] * len(tensors)]
        table = []
        for one, *numbers in zip(tensors, counts, firsts[:-1], streams, rows, groups, strict=True):
            table += [*self._addresses(one), *numbers]
        self._programs = firsts[-1]
        self._table = self._upload(table)
        self._amax_rows = self._upload([*rows])
        self._tensor_of = torch.repeat_interleave(
            torch.arange(len(tiles), dtype=torch.int32), torch.tensor(tiles)
        ).to(self._device)
        self._scale = torch.ones(1, device=self._device)
        self._skip = torch.zeros(1, device=self._device)
        self._grads: tuple[list[int], Tensor] = ([], self._table)

    def step(
        self,
        grads: Sequence[Tensor],
        numbers: Sequence[float],
        scale: Tensor | None = None,
        skip: Tensor | None = None,
        seed: int = 0,
        step: int = 0,
    ) -> None:
        """Take one AdamW step [1711.05101, Alg. 2] of each tensor.

        Args:
            grads: All FP32 or all BF16, of the parameters' shapes, contiguous, on a multiple of 16
                bytes; only read.
            numbers: decay, move, inverse root, beta2, rest1, rest2, eps, feedback, as
                ``megafp4.optim.adamw.StepNumbers`` defines them.
            scale: FP32 [1] on the device; multiplies every gradient.
            skip: FP32 [1] on the device; unless it is 0 nothing changes.
            seed: Seed of the random bits, 64 bits.
            step: Optimizer step, for the random bits.

        Raises:
            ValueError: A gradient is not as it says.
        """
        kind = grads[0].dtype
        for grad, shape in zip(grads, self._shapes, strict=True):
            _check(grad, kind if kind == torch.bfloat16 else torch.float32, "a gradient")
            if grad.shape != shape:
                raise ValueError(
                    f"a gradient is {list(grad.shape)} and its weight {list(shape)}: give "
                    "gradients of the weights' shapes, in their order"
                )
        addresses = [grad.data_ptr() for grad in grads]
        if addresses != self._grads[0]:
            self._grads = (addresses, self._upload(addresses))
        if not self._programs:
            return
        scale, skip = self._scale if scale is None else scale, self._skip if skip is None else skip
        with torch.cuda.device_of(self._table):
            self._forget_amax(skip)
            _step_kernel[(self._programs,)](
                self._table,
                self._grads[1],
                self._tensor_of,
                self._table if self._amax is None else self._amax,
                scale,
                skip,
                seed & 0xFFFFFFFF,
                seed >> 32 & 0xFFFFFFFF,
                step,
                *numbers,
                FORM=self.form,
                GRAD_BF16=kind == torch.bfloat16,
                AMAX=self._amax is not None,
                NATIVE=has_fp8_conversions(self._device),
                ROWS=self._tile[0],
                num_warps=self._tile[1],
                enable_fp_fusion=False,  # every product and sum is rounded, as specified
            )

    def _forget_amax(self, skip: Tensor) -> None:
        """Start the maxima of these tensors from zero, unless the step is skipped."""
        if self._amax is not None:
            last = self._amax.index_select(0, self._amax_rows)
            self._amax.index_copy_(0, self._amax_rows, torch.where(skip != 0, last, 0))

    def _addresses(self, tensors: Mapping[str, Tensor]) -> list[int]:
        found = [0] * 5
        for kind, dtype in FORMS[self.form].items():
            _check(tensors[kind], dtype, kind)
            found[_COLUMN_OF[kind]] = tensors[kind].data_ptr()
        return found

    def _upload(self, numbers: list[int]) -> Tensor:
        host = torch.tensor(numbers, dtype=torch.int64)
        if self._device.type != "cuda":
            return host
        return host.pin_memory().to(self._device, non_blocking=True)  # nothing waits for the GPU


def _group_at(place: int) -> int:
    if place % GROUP:
        raise ValueError(
            f"a tensor begins at element {place} of its parameter: cut parameters at multiples of "
            f"{GROUP}, the elements that share a scale"
        )
    return place // GROUP


def _check(tensor: Tensor, dtype: torch.dtype, what: str) -> None:
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.data_ptr() % 16:
        raise ValueError(
            f"{what} is {tensor.dtype} of shape {list(tensor.shape)} and strides "
            f"{list(tensor.stride())}, {tensor.data_ptr() % 16} bytes past a multiple of 16: give "
            f"a contiguous {dtype} tensor that starts on one"
        )
