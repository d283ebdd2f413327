"""A warm process that does the steps of a run's jobs: what they import is loaded once, not once a job.

The first job starts it, and it ends with its Snakemake. A job hands over what to call, with paths and plain values, as
JSON on a local socket; the worker forks, and the child does the step as the job would have. Where there can be no
worker (other systems than Linux, a job in a container of its own, no socket to be had), the job does the step itself.

Only the standard library is imported here: this is what every job waits for.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from n4flow.console import PASSING, PREFIX, STOPPED, TOLD, last_error, reporting, say

#: Environment variable with the process ID of the Snakemake that the worker ends with.
RUN = "N4FLOW_RUN"

#: A child that was told to stop has so many seconds to remove what it has half written.
GRACE_S = 5.0

#: Another job has taken the address, but does not listen yet: asked again for so long.
PATIENCE_S = 2.0

#: Of Linux's ``prctl``: the signal that a process gets when its parent ends.
PR_SET_PDEATHSIG = 1


def begin_run() -> None:
    """Let the jobs that this process starts have this copy of the package, and a worker, which ends with it."""
    os.environ[RUN] = str(os.getpid())
    # Snakemake only appends to a script's sys.path, where an n4flow that is installed would come first
    paths = [str(Path(__file__).parents[1]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


def do_step(step: str, log_path: str | Path, *, on_gpu: bool = False, **arguments: Any) -> None:
    """Do a job's step, in the worker where there can be one; end with exit status 1 and a line if it fails.

    Parameters
    ----------
    step : str
        Function to call: ``n4flow.steps.mask:mask_scan``.
    log_path : path-like
        See `console.reporting`.
    on_gpu : bool
        The step may use a GPU: it is done in a child that stays, one after the other, so that the GPU is set up once.
    **arguments
        Paths and plain values, ready for JSON.
    """
    request = {
        "step": step,
        "arguments": arguments,
        "log": os.path.abspath(log_path),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "stays": on_gpu,
    }
    connection = None
    with contextlib.suppress(KeyError, ValueError, OSError):  # no worker is to be had
        connection = _connect(int(os.environ[RUN]))
    if connection is None:
        with reporting(log_path):
            _call(request)
        return
    with connection:
        status = _ask(connection, request)
    if status < 0:
        problem = f"was killed ({signal.Signals(-status).name}), perhaps because memory ran out"
        with open(log_path, "a", encoding="utf-8") as file:
            line = f"{PREFIX}{step.rpartition(':')[2]}: {problem}; give the job more memory, or leave the scan out"
            say(f"{PASSING}\n{line}\n", file)
    if status and status != STOPPED and not os.environ.get(TOLD):
        say(f"{PREFIX}{last_error(log_path)}\n", sys.stderr)
    if status:
        sys.exit(max(status, 1))


def _call(request: Mapping[str, Any]) -> None:
    module, _, function = request["step"].partition(":")
    getattr(importlib.import_module(module), function)(**request["arguments"])


def _ask(connection: socket.socket, request: Mapping[str, Any]) -> int:
    """Exit status of the step; that of a signal is negative."""
    connection.sendall(json.dumps(request).encode() + b"\n")
    try:
        reply = connection.recv(16)
    except KeyboardInterrupt:
        connection.shutdown(socket.SHUT_WR)  # the child stops, and says so in the log
        reply = connection.recv(16)
    return int(reply) if reply else -signal.SIGKILL


# ---------------------------------------------------------------- the way to the worker


def _connect(run: int) -> socket.socket:
    """A connection to the worker of a run, which is started if there is none.

    Raises
    ------
    OSError
        There can be none.
    """
    # a job in a container of its own sees other files: what it starts would be of use to no other job
    if os.readlink(f"/proc/{run}/ns/mnt") != os.readlink("/proc/self/ns/mnt"):
        raise OSError("in another container than Snakemake")
    address = _address(run)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.suppress(OSError):  # there is one
        listener.bind(address)
        listener.listen(1024)
        _start(listener, run)
    end = time.monotonic() + PATIENCE_S
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
        except ConnectionRefusedError:
            connection.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            break
    if _user_of(connection) != os.getuid():
        connection.close()
        raise OSError("it is another user's")
    return connection


def _address(run: int) -> str:
    """Of an abstract socket of Linux: it needs no folder, and is gone with its process.

    One worker serves the jobs of one Snakemake that have one interpreter and one copy of this package.
    """
    content = "\0".join((str(run), sys.executable, __file__))
    return f"\0n4flow-{os.getuid()}-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def _start(listener: socket.socket, run: int) -> None:
    package = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {package!r}); from n4flow.worker import Worker; "
    code += f"Worker({listener.fileno()}, {run}).serve()"
    with open(".snakemake/n4flow_worker.log" if os.path.isdir(".snakemake") else os.devnull, "a") as log:
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C at the terminal is for the jobs
        )


def _user_of(connection: socket.socket) -> int:
    """User ID of the process at the other end."""
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(user)


# ---------------------------------------------------------------- the worker


@dataclass(eq=False)
class Client:
    """A job that waits."""

    socket: socket.socket
    received: bytes = b""
    child: Child | None = None


@dataclass(eq=False)
class Child:
    """A process that does a step."""

    pid: int
    socket: socket.socket
    stays: bool
    client: Client | None = None
    kill_at: float = 0  # if it has been told to stop


class Worker:
    """Listens for jobs, and forks a child for each.

    Parameters
    ----------
    listener : int
        File descriptor of the socket.
    run : int
        Process ID of Snakemake.
    """

    def __init__(self, listener: int, run: int) -> None:
        self.listener = socket.socket(fileno=listener)
        self.run = os.pidfd_open(run)
        self.children: list[Child] = []
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.run, selectors.EVENT_READ)

    def serve(self) -> NoReturn:
        """Until Snakemake ends."""
        while True:
            told = [child for child in self.children if child.kill_at]
            for child in told:
                if child.kill_at <= time.monotonic():
                    os.kill(child.pid, signal.SIGKILL)
            for key, _ in self.selector.select(GRACE_S if told else None):
                if key.fileobj is self.listener:
                    self._welcome()
                elif isinstance(key.data, Client):
                    self._hear(key.data)
                elif isinstance(key.data, Child):
                    self._hear_child(key.data)
                else:
                    self._end()

    def _end(self) -> NoReturn:
        for child in self.children:
            os.kill(child.pid, signal.SIGKILL)
        os._exit(0)

    def _welcome(self) -> None:
        connection, _ = self.listener.accept()
        if _user_of(connection) == os.getuid():
            self.selector.register(connection, selectors.EVENT_READ, Client(connection))
        else:
            connection.close()

    def _hear(self, client: Client) -> None:
        try:
            received = client.socket.recv(2**16)
        except OSError:
            received = b""
        if not received:  # stopped by hand, or killed
            self.selector.unregister(client.socket)
            if client.child:
                os.kill(client.child.pid, signal.SIGINT)
                client.child.kill_at = time.monotonic() + GRACE_S
            else:
                client.socket.close()
            return
        client.received += received
        if client.received.endswith(b"\n"):
            try:
                self._hand_over(client, json.loads(client.received))
            except (OSError, ValueError):  # no process is to be had: that job's loss
                self.selector.unregister(client.socket)
                client.socket.close()

    def _hand_over(self, client: Client, request: Mapping[str, Any]) -> None:
        _load(request["step"])
        idle = (child for child in self.children if child.client is None and child.stays and request["stays"])
        child = next(idle, None) or self._fork(request["stays"])
        child.client, client.child = client, child
        child.socket.sendall(client.received)

    def _fork(self, stays: bool) -> Child:
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        if (pid := os.fork()) == 0:
            _do_requests(theirs, parent, [key.fileobj for key in self.selector.get_map().values()] + [ours])
        theirs.close()
        child = Child(pid, ours, stays)
        self.children.append(child)
        self.selector.register(ours, selectors.EVENT_READ, child)
        return child

    def _hear_child(self, child: Child) -> None:
        reply = child.socket.recv(16)
        if not reply:  # it has ended
            self.selector.unregister(child.socket)
            child.socket.close()
            self.children.remove(child)
            _, status = os.waitpid(child.pid, 0)
            reply = str(os.waitstatus_to_exitcode(status)).encode()
        elif not child.stays:
            child.socket.shutdown(socket.SHUT_WR)
        client, child.client, child.kill_at = child.client, None, 0
        if client:
            with contextlib.suppress(OSError):  # it waits no longer
                client.socket.sendall(reply)
            with contextlib.suppress(KeyError):
                self.selector.unregister(client.socket)
            client.socket.close()


def _load(step: str) -> None:
    """Import what a step needs, for all children to come; what goes wrong goes wrong in the child again, with a log."""
    with contextlib.suppress(Exception):
        module = importlib.import_module(step.partition(":")[0])
        if module.__name__ not in _loaded:
            _loaded.add(module.__name__)
            getattr(module, "preload", lambda: None)()


_loaded: set[str] = set()


def _do_requests(connection: socket.socket, parent: int, inherited: list[Any]) -> NoReturn:
    """What a child does: steps as they come, until there are no more."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        for file in inherited:
            os.close(file) if isinstance(file, int) else file.close()
        for line in connection.makefile("rb"):
            status = _do_request(json.loads(line))
            connection.sendall(str(status).encode())
        status = 0
    finally:
        os._exit(status)


def _do_request(request: Mapping[str, Any]) -> int:
    # where the job would have done it: what libraries print goes into the log as well
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a run in the background may have switched off
    try:
        with reporting(request["log"], quiet=True):
            _call(request)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0
