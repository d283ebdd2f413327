"""Names of scans, and which scans a BIDS folder holds."""

import json
from pathlib import Path

import pytest

from n4flow.bids import DATATYPE_OF, Scan, dataset_root, describe_dataset, index_dataset
from n4flow.errors import InputError


@pytest.mark.parametrize(
    ("subject", "session", "modality", "folder", "name"),
    [
        ("01", "", "T1w", "sub-01/anat", "sub-01_T1w"),
        ("A7", "pre", "T2w", "sub-A7/ses-pre/anat", "sub-A7_ses-pre_T2w"),
        ("01", "1", "run-1_T1w", "sub-01/ses-1/anat", "sub-01_ses-1_run-1_T1w"),
        ("01", "", "acq-a_run-02_FLAIR", "sub-01/anat", "sub-01_acq-a_run-02_FLAIR"),
        ("01", "", "task-rest_bold", "sub-01/func", "sub-01_task-rest_bold"),
        ("01", "", "asl", "sub-01/perf", "sub-01_asl"),
        ("01", "", "dwi", "sub-01/dwi", "sub-01_dwi"),
        ("01", "", "sample-A_stain-DAPI_SPIM", "sub-01/micr", "sub-01_sample-A_stain-DAPI_SPIM"),
    ],
)
def test_folder_and_name_follow_bids(subject, session, modality, folder, name):
    scan = Scan(subject, session, modality, "image.nii")
    assert scan.problems() == []
    assert (scan.folder, scan.name) == (folder, name)
    assert f"{scan.entities}_{scan.suffix}" == name


@pytest.mark.parametrize("suffix", DATATYPE_OF)
def test_every_known_suffix_is_a_modality(suffix):
    scan = Scan("01", "", suffix, "image.nii")
    assert scan.problems() == []
    assert scan.folder == f"sub-01/{DATATYPE_OF[suffix]}"


@pytest.mark.parametrize(
    ("subject", "session", "modality", "words"),
    [
        ("", "", "T1w", "subject ''"),
        ("0 1", "", "T1w", "subject '0 1'"),
        ("sub-01", "", "T1w", "subject 'sub-01'"),
        ("../01", "", "T1w", "subject '../01'"),
        ("01\n", "", "T1w", "subject '01\\n'"),
        ("ä", "", "T1w", "subject 'ä'"),
        ("01", "a_b", "T1w", "session 'a_b'"),
        ("01", "", "T1", "does not end in a known suffix"),
        ("01", "", "", "does not end in a known suffix"),
        ("01", "", "t1w", "does not end in a known suffix"),
        ("01", "", "run-1_T1w-1", "does not end in a known suffix"),
        ("01", "", "run1_T1w", "'run1', which is no entity"),
        ("01", "", "run-_T1w", "'run-', which is no entity"),
        ("01", "", "_T1w", "'', which is no entity"),
        ("01", "", "run-1/x_T1w", "'run-1/x', which is no entity"),
        ("01", "", "sub-02_T1w", "'sub-02', which is no entity"),
        ("01", "", "ses-2_T1w", "'ses-2', which is no entity"),
        ("01", "", "desc-N4_T1w", "'desc-N4', which is no entity"),
    ],
)
def test_name_that_bids_does_not_know_is_one_problem(subject, session, modality, words):
    (problem,) = Scan(subject, session, modality, "image.nii").problems()
    assert words in problem


def test_every_problem_of_a_name_is_told():
    assert len(Scan("0_1", "a_b", "run1_T1", "image.nii").problems()) == 4


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def test_scans_are_found_in_order_with_sessions_and_entities(tmp_path):
    touch(
        tmp_path,
        "sub-02/anat/sub-02_run-2_T1w.nii",
        "sub-02/anat/sub-02_run-1_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-01/anat/sub-01_acq-x_T1w.nii.gz",
    )
    found = [(s.subject, s.session, s.modality, Path(s.image).name) for s in index_dataset(tmp_path, ["T1w"])]
    assert found == [
        ("01", "", "acq-x_T1w", "sub-01_acq-x_T1w.nii.gz"),
        ("01", "a", "T1w", "sub-01_ses-a_T1w.nii.gz"),
        ("01", "b", "T1w", "sub-01_ses-b_T1w.nii.gz"),
        ("02", "", "run-1_T1w", "sub-02_run-1_T1w.nii.gz"),
        ("02", "", "run-2_T1w", "sub-02_run-2_T1w.nii"),
    ]


def test_found_scans_have_no_problem_and_point_to_their_files(tmp_path):
    touch(tmp_path, "sub-01/ses-1/func/sub-01_ses-1_task-rest_run-1_bold.nii.gz", "sub-01/perf/sub-01_asl.nii")
    scans = index_dataset(tmp_path, ["bold", "asl"])
    assert [scan.problems() for scan in scans] == [[], []]
    assert all(Path(scan.image).is_file() for scan in scans)
    assert {Path(scan.image).name.partition(".")[0] for scan in scans} == {scan.name for scan in scans}


def test_only_the_asked_suffixes_in_their_own_folders_are_found(tmp_path):
    touch(
        tmp_path,
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_T2w.nii.gz",
        "sub-01/anat/sub-01_T1w.json",
        "sub-01/anat/sub-01_T1w.nii.gz.part",
        "sub-01/anat/sub-01_NOTT1w.nii.gz",
        "sub-01/anat/old/sub-01_T1w.nii.gz",
        "sub-01/fmap/sub-01_T1w.nii.gz",
        "derivatives/n4flow/sub-01/anat/sub-01_desc-N4_T1w.nii.gz",
        "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
        "sub-02.nii.gz",
    )
    assert [Path(scan.image) for scan in index_dataset(tmp_path, ["T1w"])] == [
        tmp_path / "sub-01/anat/sub-01_T1w.nii.gz"
    ]


def test_subjects_that_are_links_to_folders_are_found(tmp_path):
    touch(tmp_path, "store/anat/sub-01_T1w.nii.gz")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/sub-01").symlink_to(tmp_path / "store")
    assert [scan.name for scan in index_dataset(tmp_path / "raw", ["T1w"])] == ["sub-01_T1w"]


def test_image_that_was_not_fetched_is_left_out(tmp_path):
    touch(tmp_path, "sub-01/anat/sub-01_run-1_T1w.nii")
    (tmp_path / "sub-01/anat/sub-01_run-2_T1w.nii").symlink_to("../.git/annex/absent.nii")
    assert [scan.name for scan in index_dataset(tmp_path, ["T1w"])] == ["sub-01_run-1_T1w"]


@pytest.mark.parametrize(
    ("folder", "suffixes", "words"),
    [
        ("absent", ["T1w"], "there is no such folder"),
        (".", ["T1w"], "holds no scan with the suffix T1w;"),
        (".", ["T1w", "T2w"], "holds no scan with the suffix T1w or T2w;"),
        (".", ["t1w"], "is no suffix that n4flow knows"),
    ],
)
def test_folder_or_suffix_that_gives_no_scan_is_an_error(tmp_path, folder, suffixes, words):
    with pytest.raises(InputError, match=words) as error:
        index_dataset(tmp_path / folder, suffixes)
    assert "\n" not in str(error.value)


def test_dataset_root_is_the_nearest_folder_with_a_description(tmp_path):
    touch(
        tmp_path, "a/dataset_description.json", "a/derivatives/b/dataset_description.json", "a/derivatives/b/sub/x.nii"
    )
    assert dataset_root(tmp_path / "a/derivatives/b/sub/x.nii") == (tmp_path / "a/derivatives/b").resolve()
    assert dataset_root(tmp_path / "a/derivatives/x.nii") == (tmp_path / "a").resolve()


def test_two_datasets_of_one_name_have_a_link_each(tmp_path):
    roots = [tmp_path / "site1/rawdata", tmp_path / "site2/rawdata"]
    for root in roots:
        touch(root, "dataset_description.json", "sub-01/anat/sub-01_T1w.nii.gz")
    results = tmp_path / "results"
    results.mkdir()
    images = [root / "sub-01/anat/sub-01_T1w.nii.gz" for root in roots]
    describe_dataset(images, results / "dataset_description.json", results / ".bidsignore")
    links = json.loads((results / "dataset_description.json").read_text())["DatasetLinks"]
    assert {(results / place).resolve() for place in links.values()} == {path.resolve() for path in roots}


def test_what_is_no_scan_of_its_own_is_left_out_and_named(tmp_path, caplog):
    names = [
        "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T1w.nii", "sub-01/anat/sub-02_T1w.nii.gz",
        "sub-01/anat/sub-01_part-phase_T1w.nii.gz", "sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
        "sub-01/anat/._sub-01_run-1_T1w.nii.gz",
    ]  # fmt: skip
    touch(tmp_path, *names)
    assert [scan.image for scan in index_dataset(tmp_path, ["T1w"])] == [str(tmp_path / names[0])]
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        str(tmp_path / name) for name in sorted(names[1:5])
    ]
