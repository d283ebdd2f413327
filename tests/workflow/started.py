"""Snakemake takes two seconds to start, more than most runs in the tests take after it: so it is started once.

A run is a fork of the process below. What Snakemake imports of others is there; nothing of the workflow is.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from functools import cache


def run_started(arguments, environment):
    """What ``subprocess.run(["python", "-m", "snakemake", *arguments])`` gives, with all output in ``stdout``."""
    server = _server()
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as terminal:
        request = {"arguments": arguments, "environment": environment, "folder": os.getcwd(), "terminal": terminal.name}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, terminal.read())


@cache
def _server():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # each run has its own
    return subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _serve():
    sys.path[0] = ""
    cli = importlib.import_module("snakemake.cli")
    for name in (
        "snakemake.report",
        "snakemake_executor_plugin_slurm",
        "jsonschema",
        "docutils.parsers.rst.directives",
    ):
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.environ.clear()
            os.environ.update(request["environment"])
            os.chdir(request["folder"])
            sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
            for path, descriptors in ((os.devnull, [0]), (request["terminal"], [1, 2])):
                opened = os.open(path, os.O_RDWR)
                for descriptor in descriptors:
                    os.dup2(opened, descriptor)
                os.close(opened)
            sys.argv = ["snakemake", *request["arguments"]]
            sys.exit(cli.main())
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
