"""What lets FP8 hardware run FP4 exactly: E2M1 times a power of two lies on the FP8 grids."""

import ml_dtypes
import numpy as np
import pytest

from tests.numerics import oracle


@pytest.mark.parametrize(
    ("kind", "octaves"), [(ml_dtypes.float8_e4m3fn, 15), (ml_dtypes.float8_e5m2, 29)]
)
def test_e2m1_is_exact_on_fp8_for_so_many_octaves(kind: type, octaves: int) -> None:
    # The values with sign and 0.5, the subnormal; ml_dtypes alone, so this is about the formats.
    values = oracle.decode_e2m1(np.arange(16))
    exact = []
    for k in range(-40, 40):
        scaled = np.ldexp(values, k).astype(np.float32)
        back = scaled.astype(kind).astype(np.float64)
        if np.array_equal(back, np.ldexp(values, k)):
            exact.append(k)
    assert len(exact) == octaves
    assert exact == list(range(exact[0], exact[0] + octaves))
