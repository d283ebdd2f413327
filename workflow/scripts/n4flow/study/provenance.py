"""What a result was made of: enough to make it again."""

from __future__ import annotations

import ast
import hashlib
import platform
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from n4flow import __version__
from n4flow.images.files import header_file

PACKAGE = Path(__file__).parents[1]


def modules_used_by(*entries: str) -> set[str]:
    """Modules of the package that these import, directly or through others, lazily or not.

    Parameters
    ----------
    *entries : str
        Module names without the package: ``correction``, ``qc.pages``.
    """
    seen: set[str] = set()
    waiting = ["__init__", *entries]
    while waiting:
        module = waiting.pop()
        path = _file_of(module)
        if module in seen or path is None:
            continue
        seen.add(module)
        waiting += _imported_by(path.read_bytes())
    return seen


@lru_cache(maxsize=256)
def _imported_by(source: bytes) -> list[str]:
    """What may be modules of the package among what a source imports; read once for all rules that stand on it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "n4flow":
            base = (node.module or "").partition(".")[2]
            found += [base] + [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
    return found


def _file_of(module: str) -> Path | None:
    place = PACKAGE.joinpath(*module.split("."))
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in candidates if path.is_file()), None) if module else None


def package_digest(*entries: str) -> str:
    """SHA-256, shortened, over the source files that these modules of the package stand on.

    A workflow puts it among the parameters of a job, so that the job runs again when, and only
    when, the code that it uses has changed. Files that are not Python (templates, kernels) count
    with the folder of a module that is used.

    Parameters
    ----------
    *entries : str
        As in `modules_used_by`; all modules if there are none.
    """
    everything = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    modules = modules_used_by(*entries)
    sources = {path for module in modules if (path := _file_of(module))}
    folders = {path.parent for path in sources} - {PACKAGE}
    digest = hashlib.sha256()
    for path in sorted(everything):
        if not entries or path in sources or (path.suffix != ".py" and folders & set(path.parents)):
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance(inputs: Mapping[str, str | Path], packages: tuple[str, ...]) -> dict[str, Any]:
    """Versions, digests and the machine, for a sidecar.

    Parameters
    ----------
    inputs : mapping of str to path
        Files that went in, by role; of an image in two files, that of the header is added.
    packages : tuple of str
        Distributions whose versions matter.
    """
    headers = {f"{role} header": header for role, path in inputs.items() if (header := header_file(path)) != Path(path)}
    return {
        "n4flow": __version__,
        "PackageDigest": remember_package(),
        "InputSHA256": {role: file_sha256(path) for role, path in {**inputs, **headers}.items()},
        "Versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "Machine": platform.machine(),
    }


@lru_cache(maxsize=1)
def remember_package() -> str:
    """Digest of the whole package, looked up once a process: a file that changes later is not the code that runs."""
    return package_digest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
