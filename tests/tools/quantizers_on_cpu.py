"""``bench.py quantize`` with Triton's interpreter, and with the CUDA quantizer's specification.

TRITON_INTERPRET=1 python -m tests.tools.quantizers_on_cpu FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from benchmarks import quantize
from benchmarks.ceilings import copy_words

from megafp4_kernels import mxfp4
from tests.tools import fakes


def main(folder: Path) -> None:
    """Measure all rows on a small matrix, and print how many passed."""
    torch.manual_seed(1)
    mxfp4.quantize, mxfp4.unpack = fakes.quantize, fakes.unpack
    report = quantize.measure(fakes.session(folder, timer=fakes.idle_timer), 64, 64, 1)
    report.finish()
    report.show()
    assert not report.failed
    assert not report.left_out
    words = torch.arange(1 << 13, dtype=torch.int32)
    copied = torch.zeros_like(words)
    copy_words(words, copied, 1 << 12, 8)
    assert torch.equal(copied, words)
    print(f"{len(report.rows)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
