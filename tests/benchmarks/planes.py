"""What levelling serial sections leaves of gains and field: the table in docs/microscopy.md.

python tests/benchmarks/planes.py
"""

import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "workflow/scripts")]

from tests.phantoms import serial_sections  # noqa: E402
from tests.unit.test_planes import corrected  # noqa: E402

STACKS = {
    "8 sections": {},
    "8 sections, a fifth as strong": {"gain_sd": 0.05, "attenuation": 0.12},
    "each plane": {"sections": None},
    "no gains": {"gain_sd": 0, "attenuation": 0},
}


def left(scan, axis, mask):
    """Sd of the error of the log field in the object."""
    with tempfile.TemporaryDirectory() as folder:
        _, found = corrected(Path(folder), scan.image, axis, mask)
    return np.std((found - scan.log_bias)[scan.brain])


def main():
    """Print the table: median over three axes and two seeds, and in brackets the worst."""
    for what, (label, settings) in product(("light-sheet", "head", "brain"), STACKS.items()):
        rows = []
        for axis, seed in product(range(3), (1, 3)):
            scan = serial_sections(seed, axis=axis, what=what, **settings)
            mask = scan.brain if what == "brain" else None
            errors = [left(scan, planes, mask) for planes in (None, "ijk"[axis])]
            rows.append([np.std(scan.log_bias[scan.brain]), *errors])
        cells = [f"{np.median(column):.3f} ({max(column):.3f})" for column in zip(*rows, strict=True)]
        print(f"| {what} | {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
