"""A server of S3 on this machine, for tests: it can be cut off, and keeps its buckets while it is."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

#: What a user would set for a server of their own.
ACCOUNT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


class Server:
    """moto's server, in a process of its own."""

    def __init__(self, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        # one attempt: of a server that is cut off, clients tell at once
        self.environment = {**ACCOUNT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_MAX_ATTEMPTS": "1"}
        self.say("start")

    def say(self, command):
        """Start or stop, and wait until it has."""
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == f"{command}\n", self.log.read_text()

    def requests(self, since=0):
        """Lines of its log, one for each request."""
        return [line for line in self.log.read_text().splitlines() if "GET /" in line or "HEAD /" in line][since:]

    def close(self):
        self.process.kill()
        self.process.communicate()


def put(folder, address):
    """Copy a folder into a bucket; it replaces what is there."""
    import fsspec

    system = fsspec.filesystem("s3")
    with contextlib.suppress(FileNotFoundError):
        system.rm(address, recursive=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            system.pipe_file(f"{address}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def get(address, folder):
    """Copy what is in a bucket to a folder."""
    import fsspec

    system = fsspec.filesystem("s3")
    system.invalidate_cache()
    start = address.partition("://")[2]
    for name in system.find(address):
        path = folder / name.removeprefix(f"{start}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(system.cat_file(name))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running server, to which the environment leads, with the buckets ``bucket`` and ``results``."""
    for package in ("s3fs", "moto", "flask", "flask_cors"):
        pytest.importorskip(package, reason=f"no {package}: install envs/requirements-test.txt")
    import fsspec

    made = Server(tmp_path_factory.mktemp("server") / "log")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        for name, value in made.environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        for bucket in ("bucket", "results"):
            fsspec.filesystem("s3").mkdir(bucket)
        yield made
        fsspec.filesystem("s3").clear_instance_cache()
    made.close()


def main(port):
    from moto.server import ThreadedMotoServer

    server, answers = None, sys.stdout
    sys.stdout = sys.stderr  # moto talks
    for line in sys.stdin:
        if line == "start\n":
            server = ThreadedMotoServer("127.0.0.1", port)
            server.start()
        else:
            server.stop()
        print(line, end="", flush=True, file=answers)


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # whose names are not meant for moto
    main(int(sys.argv[1]))
