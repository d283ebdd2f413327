"""Control points of the built-in dataset: what moves them changes what labs have already published with.

After a change that is meant to, with a line in CHANGELOG.md that has the mark: `python tests/unit/test_golden.py`.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TISSUES = ROOT / "workflow" / "resources" / "mni152" / "tissues_2mm.nii.gz.base64"
GOLDEN = Path(__file__).with_name("golden_fields.json")
MARK = "**[changes outputs]**"
SUBJECTS = ("01", "02", "03", "04")

#: In log. Between instruction sets and versions of NumPy control points move by less.
TOLERANCE = 1e-6


def marks():
    """How many changes of outputs the changelog tells of; its head explains the mark, once."""
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").count(MARK) - 1


def fields_now(folder):
    """Control points of each head, by the steps and settings of the workflow."""
    from n4flow.steps.correct import correct_scan
    from n4flow.steps.demo import demo_dataset
    from n4flow.steps.mask import mask_scan

    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    demo_dataset(TISSUES, folder)
    found = {}
    for subject in SUBJECTS:
        anat = folder / f"sub-{subject}" / "anat"
        own, mask, field = anat / f"sub-{subject}_desc-brain_mask.nii.gz", anat / "mask.nii.gz", anat / "field.json"
        image = anat / f"sub-{subject}_T1w.nii.gz"
        mask_scan(image, own if own.exists() else None, mask, anat / "mask.json", **config["mask"])
        files = {"corrected": anat / "corrected.nii.gz", "sidecar": anat / "corrected.json", "field": field}
        correct_scan(image, mask, files, parameters=config["n4"], device="cpu")
        found[subject] = np.array(json.loads(field.read_text())["Lattice"])
    return found


def largest_move(stored, found):
    """The largest difference between control points; infinite where the lattice has another shape."""
    if stored.shape != found.shape:
        return np.inf
    return float(np.abs(stored - found).max())


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return fields_now(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_control_points_of_the_built_in_dataset_stay(golden, found, subject):
    moved = largest_move(np.array(golden["Lattices"][subject]), found[subject])
    assert moved <= TOLERANCE, f"control points moved by {moved:.2g}: this changes outputs, see the head of this file"


def test_the_fields_were_stored_since_the_changelog_last_told_of_a_change(golden):
    """Else the next change that moves them would need no line of its own."""
    assert golden["ChangesOfOutputs"] == marks()


def write():
    """Store the control points anew, if the changelog says that they were to change."""
    with tempfile.TemporaryDirectory() as folder:
        found = fields_now(Path(folder))
    if GOLDEN.exists():
        stored = json.loads(GOLDEN.read_text())
        moved = max(largest_move(np.array(stored["Lattices"][subject]), found[subject]) for subject in SUBJECTS)
        print(f"control points moved by {moved:.2g}")
        if moved > TOLERANCE and marks() <= stored["ChangesOfOutputs"]:
            sys.exit(f"CHANGELOG.md: no new line has the mark {MARK}; say there what changes, then run this again")
    lattices = {subject: np.round(points, 9).tolist() for subject, points in found.items()}
    GOLDEN.write_text(json.dumps({"ChangesOfOutputs": marks(), "Lattices": lattices}, indent=None) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "workflow" / "scripts"))
    write()
