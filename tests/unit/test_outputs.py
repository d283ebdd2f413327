"""What is made of a scan has one name, which tells the scan and the role again."""

import pytest

from n4flow.study.bids import DATATYPE_OF, Scan
from n4flow.study.outputs import NAMES, beside, output_of, scan_and_role

SCANS = [
    Scan("01", "", "T1w", "a.nii"),
    Scan("01", "pre", "task-rest_run-1_echo-2_bold", "a.nii"),
    Scan("m1", "", "sample-A_SPIM", "a.nii"),
    *(Scan("x", "", suffix, "a.nii") for suffix in DATATYPE_OF),
]


@pytest.mark.parametrize("role", NAMES)
@pytest.mark.parametrize("scan", SCANS, ids=lambda scan: scan.name)
def test_a_path_leads_back_to_scan_and_role(scan, role):
    path = output_of(scan, role)
    assert scan_and_role(f"/somewhere/{path}") == (scan.name, role)


@pytest.mark.parametrize("scan", SCANS, ids=lambda scan: scan.name)
def test_no_two_files_have_one_name(scan):
    assert len({output_of(scan, role) for role in NAMES}) == len(NAMES)


def test_what_lies_beside_a_file_of_a_scan():
    scan = SCANS[1]
    assert beside(output_of(scan, "reference_field"), "corrected") == output_of(scan, "corrected")
    with pytest.raises(ValueError, match=r"x\.json: no file that is made of a scan"):
        beside("x.json", "corrected")


@pytest.mark.parametrize("name", ["a.nii", "metrics.tsv", "index.html", "sub-01_T1w.nii.gz", "sub-01_desc-N4_x.nii.gz"])
def test_what_is_no_scans_leads_nowhere(name):
    assert scan_and_role(name) is None
