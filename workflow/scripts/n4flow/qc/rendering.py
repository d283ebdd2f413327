"""What the pages share: the template environment, numbers for people, JSON in and out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from n4flow.errors import InputError

HERE = Path(__file__).parent

#: A smaller number that has no such digits is written with its power of ten.
LEAST_WRITTEN_OUT = 1e-3


def render(template: str, **values: Any) -> str:
    """A page: one of the templates with these values, which are escaped."""
    return _environment().get_template(template).render(**values)


def compile_template(template: str) -> None:
    """Compile a template, for a process whose children are to find it there."""
    _environment().get_template(template)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    # our own style and code, never a value
    environment.globals["asset"] = lambda name: Markup((HERE / "assets" / name).read_text(encoding="utf-8"))
    return environment


def number(value: Any, digits: int = 3) -> str:
    """A number for people; n/a where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.2g}" if abs(value) >= LEAST_WRITTEN_OUT else f"{value:.1e}"
    return f"{value:,.{digits}f}"


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    InputError
        The file cannot be read, or holds no object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError) as error:
        raise InputError(path, f"cannot be read as JSON ({error})", "make it again") from None


def plain(value: Any) -> Any:
    """The value as strict JSON has it: None for what is no number, Python's own types."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
