"""``python -m megafp4``: the command line without an installed script."""

import sys

from megafp4.cli import main

sys.exit(main())
