"""The one exception that is meant for the user."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user can mend: names the file, what is wrong and what to do, in one line."""

    def __init__(self, source: object, problem: str, remedy: str) -> None:
        super().__init__(" ".join(f"{source}: {problem}; {remedy}".split()))
