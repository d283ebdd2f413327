import re
import shutil

import pytest

from n4flow.images.files import write_json
from n4flow.study import provenance
from n4flow.study.provenance import modules_used_by, package_digest


def test_modules_are_followed_through_lazy_imports():
    assert {"steps.mask", "images.nifti", "errors"} <= modules_used_by("steps.mask")


# the modules that the rules name, and what may not make their jobs run again
NOT_USED = {
    "steps.mask": {"correction", "steps.correct", "steps.reference", "core.phantom", "qc.metrics", "qc.pages"},
    "steps.correct": {"steps.apply", "steps.reference", "core.phantom", "steps.mask", "qc.metrics", "qc.pages"},
    "steps.reference": {"core.phantom", "steps.mask", "qc.metrics", "qc.pages"},
    "steps.apply": {"estimate", "steps.mask", "qc.pages"},
    "steps.pyramid": {"estimate", "correction", "steps.correct", "steps.mask", "qc.pages"},
    "steps.demo": {"estimate", "steps.mask", "qc.pages"},
    "study.bids": {"images.nifti", "estimate", "steps.mask", "qc.pages"},
    "qc.pages": {"estimate", "steps.reference", "core.phantom", "steps.mask"},
    "qc.crops": {"estimate", "steps.mask", "steps.pyramid", "qc.pages"},
    "qc.dataset": {"qc.panels", "qc.guide", "qc.tune", "estimate", "images.nifti"},
    "qc.figures": {"qc.pages", "estimate", "steps.mask"},
    "qc.guide": {"qc.tune", "qc.dataset", "study.ratings", "study.config", "study.sheet"},
    "qc.tune": {"core.phantom", "steps.reference", "qc.dataset", "qc.guide"},
    "study.manifest": {"images.nifti", "estimate", "steps.mask", "qc"},
    "study.ratings": {"qc.rendering", "images.nifti", "estimate"},
}


def test_the_rules_name_these_modules(pytestconfig):
    rules = pytestconfig.rootpath / "workflow" / "rules"
    named = {
        name for path in rules.glob("*.smk") for name in re.findall(r'package_digest\("(.*?)"\)', path.read_text())
    }
    assert named == set(NOT_USED)


@pytest.mark.parametrize("entry", NOT_USED)
def test_a_rule_hangs_on_no_module_that_it_does_not_use(entry):
    assert not NOT_USED[entry] & modules_used_by(entry)


@pytest.fixture
def copy_of_package(tmp_path, monkeypatch):
    copied = shutil.copytree(provenance.PACKAGE, tmp_path / "n4flow", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", copied)
    return copied


@pytest.mark.parametrize(
    ("changed", "affects"),
    [
        ("steps/mask.py", {"steps.mask"}),
        ("images/nifti.py", {"steps.mask", "steps.correct", "qc.pages"}),
        ("qc/metrics.py", {"qc.pages"}),
        ("qc/templates/subject.html", {"qc.pages"}),
        ("qc/assets/style.css", {"qc.pages"}),
        ("kernels/cuda.cu", {"steps.mask", "steps.correct"}),
        ("kernels/compiled.py", {"steps.mask", "steps.correct"}),
        ("core/phantom.py", set()),
    ],
)
def test_a_change_touches_only_what_uses_it(copy_of_package, changed, affects):
    before = {entry: package_digest(entry) for entry in ("steps.mask", "steps.correct", "qc.pages")}
    with open(copy_of_package / changed, "a") as file:
        file.write("\n")
    assert {entry for entry, digest in before.items() if package_digest(entry) != digest} == affects


def test_json_that_cannot_be_written_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())
