"""`python -m neo_calibration`: the same as `neo-calibrate`."""

from __future__ import annotations

import sys

from neo_calibration.cli import main

if __name__ == "__main__":
    sys.exit(main())
