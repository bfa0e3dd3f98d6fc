"""AdamW in one pass over memory, for many tensors in one launch, whatever form their state has.

Bytes of memory traffic per element: fp32 28, bf16-sr 16, fp8lm 16, coat 16, gradients in FP32; two
less with gradients in BF16. Bit-equal to ``megafp4.optim.states``, which explains the forms.

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

from megafp4_kernels import adamw_states as states
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
}
"""Types of the tensors of each form of state."""

_TILES = {"fp32": (8, 4), "bf16-sr": (8, 4), "fp8lm": (4, 2), "coat": (4, 4)}
"""Rows of a program and its warps, by form: the fastest of a few on an H200."""
# Columns of the table, addresses first.
_COLUMN_OF = {
    "weight": 0, "exp_avg": 1, "exp_avg_sq": 2, "master_low": 3, "exponents": 4, "ranges": 4,
}  # fmt: skip
_COUNT = tl.constexpr(5)
_FIRST = tl.constexpr(6)
_STREAM = tl.constexpr(7)
_LARGEST = tl.constexpr(8)
_COLUMNS = tl.constexpr(9)


@triton.jit
def _address(entry, column, TYPE: tl.constexpr):
    """Address in a table of a tensor that starts on a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(entry + column).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _load(start, offsets, inside, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(start + offsets)
    else:
        return tl.load(start + offsets, mask=inside, other=0)


@triton.jit
def _store(start, offsets, values, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(start + offsets, values)
    else:
        tl.store(start + offsets, values, mask=inside)


@triton.jit
def _decode(
    entry, row, count, offsets, inside, FORM: tl.constexpr, NATIVE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Weight and moments of a tile: FP32 [ROWS, 128] each."""
    if FORM == "fp32":
        weight = _load(_address(entry, 0, tl.float32), offsets, inside, WHOLE)
        m = _load(_address(entry, 1, tl.float32), offsets, inside, WHOLE)
        v = _load(_address(entry, 2, tl.float32), offsets, inside, WHOLE)
    elif FORM == "bf16-sr":
        weight = _load(_address(entry, 0, tl.int16), offsets, inside, WHOLE)
        m = _load(_address(entry, 1, tl.int16), offsets, inside, WHOLE)
        v = _load(_address(entry, 2, tl.int16), offsets, inside, WHOLE)
        weight = states.float_of(weight.to(tl.int32) << 16)
        m = states.float_of(m.to(tl.int32) << 16)
        v = states.float_of(v.to(tl.int32) << 16)
    elif FORM == "fp8lm":
        high = _load(_address(entry, 0, tl.int16), offsets, inside, WHOLE)
        low = _load(_address(entry, 3, tl.int8), offsets, inside, WHOLE)
        m = _load(_address(entry, 1, tl.uint8), offsets, inside, WHOLE)
        v = _load(_address(entry, 2, tl.float16), offsets, inside, WHOLE)
        # Two exponents of one byte, the first moment's first.
        both = tl.load(_address(entry, 4, tl.int16) + row, mask=row * 128 < count, other=0)
        weight = states.join_24_bits(high, low)
        of_m, of_v = both.to(tl.int8).to(tl.int32), (both >> 8).to(tl.int32)
        m = states.decode_e4m3(m, NATIVE) * states.power_of_two(of_m)[:, None]
        v = v.to(tl.float32) * states.power_of_two(of_v)[:, None]
    else:
        weight = _load(_address(entry, 0, tl.float32), offsets, inside, WHOLE)
        m = _load(_address(entry, 1, tl.uint8), offsets, inside, WHOLE)
        v = _load(_address(entry, 2, tl.uint8), offsets, inside, WHOLE)
        # Four FP32 numbers, two at a time.
        start, known = _address(entry, 4, tl.int64), row * 128 < count
        of_m = tl.load(start + 2 * row, mask=known, other=0x3F80000000000000)
        of_v = tl.load(start + 2 * row + 1, mask=known, other=0x3F80000000000000)
        power = states.float_of((of_m >> 32).to(tl.int32))
        m = states.contract(m, of_m.to(tl.int32), power, True, NATIVE)
        power = states.float_of((of_v >> 32).to(tl.int32))
        v = states.contract(v, of_v.to(tl.int32), power, False, NATIVE)
    return weight, m, v


@triton.jit
def _encode_moments(
    entry, row, count, offsets, inside, m, v, FORM: tl.constexpr, NATIVE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Store the moments of a tile in one of the FP8 forms."""
    known = row * 128 < count
    if FORM == "fp8lm":
        of_m, of_v = states.e4m3_exponent(m), states.fp16_exponent(v)
        code = states.encode_e4m3(m * states.power_of_two(-of_m)[:, None], NATIVE)
        half = (v * states.power_of_two(-of_v)[:, None]).to(tl.float16)
        _store(_address(entry, 1, tl.uint8), offsets, code, inside, WHOLE)
        _store(_address(entry, 2, tl.float16), offsets, half, inside, WHOLE)
        both = ((of_v << 8) | (of_m & 0xFF)).to(tl.int16)
        tl.store(_address(entry, 4, tl.int16) + row, both, mask=known)
    else:
        largest, power = states.expansion(m)
        code = states.expand(m, largest, power, True, NATIVE)
        _store(_address(entry, 1, tl.uint8), offsets, code, inside, WHOLE)
        start = _address(entry, 4, tl.int64)
        tl.store(start + 2 * row, _pair(largest, power), mask=known)
        largest, power = states.expansion(v)
        code = states.expand(v, largest, power, False, NATIVE)
        _store(_address(entry, 2, tl.uint8), offsets, code, inside, WHOLE)
        tl.store(start + 2 * row + 1, _pair(largest, power), mask=known)


@triton.jit
def _pair(largest, power):
    """Two FP32 numbers in the order of memory, the first given by its bits: int64."""
    high = power.to(tl.int32, bitcast=True).to(tl.int64) << 32
    return high | (largest.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _step_tile(
    entry, grad_address, first_row, count, scale, seed_low, seed_high, step,
    decay, move, inverse_root, beta2, rest1, rest2, eps,
    FORM: tl.constexpr, GRAD_BF16: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Move a tile; return the bits of its weights' magnitudes, as stored: int32 [ROWS, 128]."""
    row = first_row + tl.arange(0, ROWS)
    offsets = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = offsets < count
    if GRAD_BF16:
        start = tl.multiple_of(grad_address.to(tl.pointer_type(tl.int16)), 16)
        grad = states.float_of(_load(start, offsets, inside, WHOLE).to(tl.int32) << 16)
    else:
        start = tl.multiple_of(grad_address.to(tl.pointer_type(tl.float32)), 16)
        grad = _load(start, offsets, inside, WHOLE)
    weight, m, v = _decode(entry, row, count, offsets, inside, FORM, NATIVE, WHOLE)
    grad = grad * scale
    m = m + (grad - m) * rest1
    v = v * beta2 + (grad * rest2) * grad
    denominator = tl.sqrt_rn(v) * inverse_root + eps
    weight = weight * decay + tl.div_rn(m, denominator) * move
    if FORM == "fp32" or FORM == "coat":
        _store(_address(entry, 0, tl.float32), offsets, weight, inside, WHOLE)
        stored = weight.to(tl.int32, bitcast=True)
    elif FORM == "fp8lm":
        high, low = states.split_24_bits(weight)
        _store(_address(entry, 0, tl.int16), offsets, high, inside, WHOLE)
        _store(_address(entry, 3, tl.int8), offsets, low, inside, WHOLE)
        stored = high.to(tl.int32) << 16
    else:
        stream = tl.load(entry + _STREAM)
        random = states.random_words(seed_low, seed_high, step, stream, first_row, ROWS)
        high = states.round_to_bf16(weight, (random & 0xFFFF).to(tl.int32))
        _store(_address(entry, 0, tl.int16), offsets, high, inside, WHOLE)
        stored = high.to(tl.int32) << 16
        _store(_address(entry, 1, tl.int16), offsets, states.nearest_bf16(m), inside, WHOLE)
        v_bits = states.round_to_bf16(v, (random >> 16).to(tl.int32))
        _store(_address(entry, 2, tl.int16), offsets, v_bits, inside, WHOLE)
    if FORM == "fp32":
        _store(_address(entry, 1, tl.float32), offsets, m, inside, WHOLE)
        _store(_address(entry, 2, tl.float32), offsets, v, inside, WHOLE)
    if FORM == "fp8lm" or FORM == "coat":
        _encode_moments(entry, row, count, offsets, inside, m, v, FORM, NATIVE, WHOLE)
    return stored & 0x7FFFFFFF


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step"])
def _step_kernel(
    table, grads, tensor_of, amax, scale_ptr, skip_ptr, seed_low, seed_high, step,
    decay, move, inverse_root, beta2, rest1, rest2, eps,
    FORM: tl.constexpr, GRAD_BF16: tl.constexpr, AMAX: tl.constexpr, NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    # All of this before the branch, for which it would otherwise have to wait.
    skip = tl.load(skip_ptr)
    scale = tl.load(scale_ptr)
    tensor = tl.load(tensor_of + tl.program_id(0))
    entry = table + tensor * _COLUMNS
    first_row = (tl.program_id(0) - tl.load(entry + _FIRST)) * ROWS
    count = tl.load(entry + _COUNT)
    grad_address = tl.load(grads + tensor)
    if skip == 0.0:
        if (first_row + ROWS) * 128 <= count:
            magnitudes = _step_tile(
                entry, grad_address, first_row, count, scale, seed_low, seed_high, step,
                decay, move, inverse_root, beta2, rest1, rest2, eps,
                FORM, GRAD_BF16, NATIVE, ROWS, True,
            )  # fmt: skip
        else:
            magnitudes = _step_tile(
                entry, grad_address, first_row, count, scale, seed_low, seed_high, step,
                decay, move, inverse_root, beta2, rest1, rest2, eps,
                FORM, GRAD_BF16, NATIVE, ROWS, False,
            )  # fmt: skip
        if AMAX:
            largest = tl.max(tl.max(magnitudes, axis=1), axis=0)
            # Ordered as the magnitudes are, so that the result does not depend on who comes first.
            tl.atomic_max(amax + tl.load(entry + _LARGEST), largest, sem="relaxed")


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
    ) -> None:
        """Make the tables; the tensors have to stay where they are.

        Args:
            form: Form of the state.
            tensors: Of each parameter ``weight`` and its state, by the names of :data:`FORMS`. All
                lie on one device, contiguous, on a multiple of 16 bytes. State per group of 128 is
                [groups, 2] or, for ranges, [groups, 4].
            streams: Word 3 of each parameter's Philox counter.
            amax: FP32, contiguous: where to write the largest magnitude of each new weight.
            amax_rows: Each parameter's place in ``amax``.

        Raises:
            ValueError: The form is unknown, or a tensor is not as it says.
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
        table = []
        for one, *numbers in zip(tensors, counts, firsts[:-1], streams, rows, strict=True):
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
            numbers: decay, move, inverse root, beta2, rest1, rest2, eps, as
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


def _check(tensor: Tensor, dtype: torch.dtype, what: str) -> None:
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.data_ptr() % 16:
        raise ValueError(
            f"{what} is {tensor.dtype} of shape {list(tensor.shape)} and strides "
            f"{list(tensor.stride())}, {tensor.data_ptr() % 16} bytes past a multiple of 16: give "
            f"a contiguous {dtype} tensor that starts on one"
        )
