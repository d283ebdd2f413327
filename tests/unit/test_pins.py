"""One set of versions: what pip installs, what conda installs and what the tests run with are the same."""

import re
from pathlib import Path

import pytest
import yaml

ENVS = Path(__file__).resolve().parents[2] / "envs"
LOCKS = sorted(ENVS.glob("requirements*.txt"))
CONDA = sorted(ENVS.glob("*.yaml"))
CONDA_NAMES = {"matplotlib-base": "matplotlib", "python-isal": "isal"}
LOCKED = re.compile(r"(?P<name>[a-z0-9][a-z0-9-]*)==(?P<version>[0-9]\S*)(?P<marker> ; .+)?")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
CONDA_PIN = re.compile(r"(?P<name>[a-z0-9][a-z0-9-]*)=(?P<version>[0-9][0-9a-z.]*)")


def requirements(lock: Path) -> list[list[str]]:
    """Return each requirement of a lock file as its first line and its option lines, without the continuations."""
    entries = lock.read_text().replace("\\\n", "\n").split("\n")
    found: list[list[str]] = []
    for line in filter(str.strip, entries):
        if line[0].isspace():
            found[-1].append(line.strip())
        else:
            found.append([line.rstrip()])
    return found


def locked(lock: Path) -> dict[str, str]:
    """Return the version of each package of a lock file."""
    matches = [LOCKED.fullmatch(entry[0]) for entry in requirements(lock)]
    return {match["name"]: match["version"] for match in matches if match}


def named(path: Path) -> str:
    return path.name


def test_every_expected_file_is_there():
    names = ["requirements-gpu.txt", "requirements-remote.txt", "requirements-slurm.txt"]
    names += ["requirements-test.txt", "requirements.txt"]
    assert [path.name for path in LOCKS] == names
    assert [path.name for path in CONDA] == ["n4.yaml", "qc.yaml", "reference.yaml"]
    assert [path.with_suffix(".in").is_file() for path in LOCKS] == [True] * len(LOCKS)


@pytest.mark.parametrize("lock", LOCKS, ids=named)
def test_requirement_is_exact_and_hashed(lock):
    entries = requirements(lock)
    assert entries
    for first, *options in entries:
        assert LOCKED.fullmatch(first), f"{lock.name}: not one exact version: {first}"
        assert options, f"{lock.name}: no hash: {first}"
        for option in options:
            assert HASH.fullmatch(option), f"{lock.name}: not a sha256 hash: {option}"


@pytest.mark.parametrize("lock", LOCKS, ids=named)
def test_package_has_one_version_on_every_python(lock):
    names = [entry[0].partition("==")[0] for entry in requirements(lock)]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("lock", LOCKS, ids=named)
def test_lock_has_what_its_source_names(lock):
    pins = locked(lock)
    for line in lock.with_suffix(".in").read_text().splitlines():
        wanted = re.match(r"([A-Za-z0-9-]+)(?:\[[a-z,]+\])?(?:==([0-9.]+))?", line)
        if wanted and not line.startswith(("#", "-")):
            name, version = wanted[1].lower(), wanted[2]
            assert name in pins, f"{lock.name} lacks {name}: compile it again"
            assert version in (None, pins[name]), f"{lock.name}: {name}=={pins[name]}, asked for {version}"


def test_tests_run_with_the_packages_of_a_run():
    run, test = locked(ENVS / "requirements.txt"), locked(ENVS / "requirements-test.txt")
    assert {name: test.get(name) for name in run} == run


@pytest.mark.parametrize(
    ("added", "common"),
    [("requirements-gpu.txt", "numpy"), ("requirements-remote.txt", "urllib3"), ("requirements-slurm.txt", "numpy")],
)
def test_packages_that_are_added_fit_on_top_of_a_run(added, common):
    more = locked(ENVS / added)
    for other in ("requirements.txt", "requirements-test.txt"):
        pins = locked(ENVS / other)
        shared = more.keys() & pins.keys()
        assert common in shared
        assert {name: more[name] for name in shared} == {name: pins[name] for name in shared}


@pytest.mark.parametrize("environment", CONDA, ids=named)
def test_conda_pin_is_the_pin_of_a_run(environment):
    content = yaml.safe_load(environment.read_text())
    assert content.keys() == {"channels", "dependencies"}
    assert content["channels"] == ["conda-forge", "nodefaults"]
    pins, python = locked(ENVS / "requirements.txt"), None
    for dependency in content["dependencies"]:
        match = CONDA_PIN.fullmatch(dependency)
        assert match, f"{environment.name}: not name=version: {dependency}"
        name, version = CONDA_NAMES.get(match["name"], match["name"]), match["version"]
        if name == "python":
            python = version
        else:
            assert pins.get(name) == version, f"{environment.name}: {dependency}, requirements.txt: {pins.get(name)}"
    assert python in {"3.11", "3.12", "3.13"}


@pytest.mark.parametrize("path", sorted(path for path in ENVS.iterdir() if path.is_file()), ids=named)
def test_file_names_no_place_to_download_from(path):
    options = {"-i", "--index-url", "--extra-index-url", "--find-links", "-f", "--trusted-host", "--default-index"}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        assert "://" not in line, f"{path.name}:{number}"
        assert not re.search(r"\bhttp", line), f"{path.name}:{number}"
        if not line.startswith("#"):
            used = options & set(re.split(r"[\s=]+", line))
            assert not used, f"{path.name}:{number}: {used}"
