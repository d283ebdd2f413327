import shutil

import pytest

from n4flow import provenance
from n4flow.provenance import modules_used_by, package_digest, write_json


def test_modules_are_followed_through_lazy_imports():
    assert {"mask", "volume", "errors"} <= modules_used_by("mask")
    assert "reference" in modules_used_by("derivatives"), "imported inside a function"
    assert not {"qc.pages", "metrics"} & modules_used_by("derivatives")


@pytest.fixture
def copy_of_package(tmp_path, monkeypatch):
    copied = shutil.copytree(provenance.PACKAGE, tmp_path / "n4flow", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", copied)
    return copied


@pytest.mark.parametrize(
    ("changed", "affects"),
    [
        ("mask.py", {"mask"}),
        ("volume.py", {"mask", "qc.pages"}),
        ("metrics.py", {"qc.pages"}),
        ("qc/templates/subject.html", {"qc.pages"}),
        ("qc/assets/style.css", {"qc.pages"}),
        ("phantom.py", set()),
    ],
)
def test_a_change_touches_only_what_uses_it(copy_of_package, changed, affects):
    before = {entry: package_digest(entry) for entry in ("mask", "qc.pages")}
    with open(copy_of_package / changed, "a") as file:
        file.write("\n")
    assert {entry for entry, digest in before.items() if package_digest(entry) != digest} == affects


def test_json_that_cannot_be_written_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())
