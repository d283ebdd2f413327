"""n4flow: exact, reproducible N4 bias correction on a CPU or a GPU."""

from n4flow.bspline import bspline_evaluate, bspline_fit
from n4flow.correct import Correction, correct
from n4flow.errors import InputError
from n4flow.field import BiasField
from n4flow.parameters import N4Parameters
from n4flow.sharpening import sharpen_residual

__version__ = "0.1.0"

__all__ = [
    "BiasField",
    "Correction",
    "InputError",
    "N4Parameters",
    "bspline_evaluate",
    "bspline_fit",
    "correct",
    "sharpen_residual",
]
