"""The map of the kernels is the folder."""

import re
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def test_the_map_lists_every_file() -> None:
    section = (KERNELS / "README.md").read_text().split("## Map")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    package = KERNELS / "megafp4_kernels"
    files = [
        path.relative_to(package).as_posix() for path in package.rglob("*.*") if path.is_file()
    ]
    assert sorted(listed) == sorted(name for name in files if "__pycache__" not in name)
