"""The exceptions that are meant for the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self


class InputError(ValueError):
    """Something the user can mend: names the file, what is wrong and what to do, in one line."""

    def __init__(self, source: object, problem: str, remedy: str) -> None:
        super().__init__(" ".join(f"{source}: {problem}; {remedy}".split()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).of_lines, ([str(self)],)  # so that it survives the way between processes

    @classmethod
    def of_lines(cls, lines: Sequence[str]) -> Self:
        """Several at once, a line each (those of a sample sheet)."""
        error = cls.__new__(cls)
        ValueError.__init__(error, "\n".join(" ".join(line.split()) for line in lines))
        return error


class DamagedError(InputError):
    """A file that is there and damaged: a matter of its own scan, not of the sheet."""


class MachineError(InputError):
    """One that another machine or moment would not raise (a full disk, no GPU): the input is not at fault."""
