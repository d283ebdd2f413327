"""Lint, format and types, as tests: one command checks everything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(sys.executable).parent  # not resolved: the link leads to the base Python, which has no tools beside it

COMMANDS = [
    "ruff check .",
    "ruff format --check --diff .",
    "snakefmt --check --diff Snakefile workflow",
    "snakemake --lint",
    "mypy",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_tool_has_no_complaint(command):
    tool, *arguments = command.split()
    environment = {**os.environ, "NO_COLOR": "1", "PATH": os.pathsep.join([str(TOOLS), os.environ.get("PATH", "")])}
    done = subprocess.run(
        [str(TOOLS / tool), *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"{command} ended with {done.returncode}:\n\n{done.stdout}", pytrace=False)
