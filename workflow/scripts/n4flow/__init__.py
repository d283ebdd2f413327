"""n4flow: exact, reproducible N4 bias correction on a CPU or a GPU."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# loaded when asked for: the workflow itself needs none of the numeric libraries
_ROOMS = {
    "BiasField": "core.field",
    "Correction": "correction",
    "InputError": "errors",
    "N4Parameters": "parameters",
    "basis_matrix": "core.bspline",
    "bspline_evaluate": "core.bspline",
    "bspline_fit": "core.bspline",
    "correct": "correction",
    "load_field": "images.fields",
    "save_field": "images.fields",
    "sharpen_residual": "core.sharpening",
}

__all__ = sorted(_ROOMS)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'n4flow' has no attribute {name!r}")
    return getattr(import_module(f"n4flow.{_ROOMS[name]}"), name)
