"""Names of scans, and which scans a BIDS folder holds."""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from n4flow.errors import InputError
from n4flow.images.files import of_other_format
from n4flow.study.bids import (
    DATATYPE_OF,
    Scan,
    check_magnitude,
    dataset_root,
    describe_dataset,
    index_dataset,
    sidecars_of,
)
from tests.pyramids import write_store


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


@pytest.mark.parametrize("part", ["part-phase", "part-real", "part-imag"])
@pytest.mark.parametrize(
    ("modality", "image"),
    [
        ("{}_MEGRE", "a.nii"),
        ("echo-1_{}_MEGRE", "a.nii"),
        ("T1w", "sub-01_{}_T1w.nii.gz"),
        ("T1w", "x/sub-01_{}_T1w.nii"),
    ],
)
def test_phase_real_and_imaginary_part_are_no_scan(modality, image, part):
    scan = Scan("01", "", modality.format(part), image.format(part))
    assert scan.problems() == [f"image {scan.image} is a part of a complex image ({part}), give its magnitude"]
    assert replace(scan, field_from="T2w").problems() == scan.problems()


@pytest.mark.parametrize(
    ("image", "fits"), [("mprage_e2_ph.nii.gz", False), ("x_imaginary.nii", False), ("p/ph/a.nii", True)]
)
def test_names_that_dcm2niix_gives_to_phases_are_known(image, fits):
    assert (Scan("01", "", "T1w", image).problems() == []) == fits


def test_magnitude_of_a_complex_image_is_a_scan():
    assert Scan("01", "", "part-mag_MEGRE", "sub-01_part-mag_MEGRE.nii").problems() == []


@pytest.mark.parametrize(
    ("image_type", "fits"),
    [
        (["ORIGINAL", "PRIMARY", "M", "ND", "NORM"], True),
        (["ORIGINAL", "PRIMARY", "M_FFE", "M", "FFE"], True),
        (["DERIVED", "PRIMARY", "M", "ND", "MAGNITUDE"], True),
        (["ORIGINAL", "PRIMARY", "OTHER"], True),
        ("P", True),
        (None, True),
        (["ORIGINAL", "PRIMARY", "P", "ND", "PHASE"], False),
        (["ORIGINAL", "PRIMARY", "PHASE MAP", "P", "FFE"], False),
        (["ORIGINAL", "PRIMARY", "OTHER", "REAL"], False),
        (["original", "primary", "other", "imaginary"], False),
    ],
)
@pytest.mark.parametrize("sidecar", ["MEGRE.json", "sub-01/anat/sub-01_MEGRE.json"])
def test_parts_of_a_complex_image_are_known_by_their_sidecar(tmp_path, sidecar, image_type, fits):
    image = tmp_path / "sub-01/anat/sub-01_MEGRE.nii"
    touch(tmp_path, "dataset_description.json", image)
    (tmp_path / sidecar).write_text(json.dumps({"ImageType": image_type}))
    if fits:
        check_magnitude(image)
    else:
        with pytest.raises(InputError, match=r"is a part of a complex image .*; give its magnitude$"):
            check_magnitude(image)


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


@pytest.mark.parametrize(
    ("suffix", "folders"), [("sbref", ["dwi", "func", "perf"]), ("m0scan", ["fmap", "perf"]), ("T1w", ["anat"])]
)
def test_what_lies_in_several_folders_is_found_alone_and_stays_there(tmp_path, suffix, folders):
    touch(
        tmp_path,
        *(f"sub-1/{place}/sub-1_acq-{place}_{suffix}.nii" for place in ("anat", "dwi", "fmap", "func", "perf")),
    )
    scans = index_dataset(tmp_path, [suffix])
    assert [scan.folder for scan in scans] == [f"sub-1/{place}" for place in folders]
    assert [f"sub-1/{Path(scan.image).parent.name}" for scan in scans] == [scan.folder for scan in scans]
    assert [replace(scan, image="else/where.nii").folder for scan in scans] == [f"sub-1/{DATATYPE_OF[suffix]}"] * len(
        scans
    )


def test_scans_of_another_session_than_their_folders_are_left_out_and_named(tmp_path, caplog):
    good = ["sub-1/anat/sub-1_T1w.nii", "sub-1/ses-a/anat/sub-1_ses-a_T1w.nii"]
    bad = ["sub-1/anat/sub-1_ses-a_T1w.nii", "sub-1/ses-a/anat/sub-1_ses-b_T1w.nii", "sub-1/ses-a/anat/sub-1_T1w.nii"]
    touch(tmp_path, *good, *bad)
    assert [scan.image for scan in index_dataset(tmp_path, ["T1w"])] == [str(tmp_path / name) for name in good]
    said = [record.getMessage() for record in caplog.records]
    assert sorted(said) == sorted(
        f"{tmp_path / name}: left out, its name is of {named}, and it lies in {place}"
        for name, named, place in zip(
            bad, ("ses-a", "ses-b", "no session"), ("the folder of no session", "ses-a", "ses-a"), strict=True
        )
    )


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


def test_files_that_are_all_but_named_as_scans_are_named(tmp_path, caplog):
    near = ["sub-1_T1w.NII.GZ", "sub-1_run-2_t1w.nii.gz", "sub-1_run-3_T1w copy.nii.gz"]
    other = ["sub-1_PDT2.nii.gz", "sub-1_T2w.nii", "sub-1_defacemask.nii.gz", "sub-1_T1w.json"]
    touch(tmp_path, *(f"sub-1/anat/{name}" for name in (*near, *other, "sub-1_run-1_T1w.nii.gz", "sub-1_PD.nii.gz")))
    assert len(index_dataset(tmp_path, ["T1w", "PD"])) == 2
    said = [record.getMessage() for record in caplog.records]
    assert sorted(Path(line.split(": left out")[0]).name for line in said) == sorted(near)
    assert all(line.endswith("does not end in _T1w.nii.gz (or .nii); rename it") for line in said)


def test_scan_whose_label_is_none_is_left_out_so_that_the_others_are_done(tmp_path, caplog):
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-bad-label/anat/sub-bad-label_T1w.nii.gz")
    assert [scan.subject for scan in index_dataset(tmp_path, ["T1w"])] == ["01"]
    assert "left out, subject 'bad-label' is no BIDS label, use letters and digits only" in caplog.text


@pytest.fixture
def study(tmp_path):
    """Sessions, runs, echoes and a contrast that not all have."""
    names = [f"sub-0{n}/ses-{s}/anat/sub-0{n}_ses-{s}" for n in (1, 2, 3) for s in ("pre", "post")]
    touch(tmp_path, *(f"{name}_acq-{acq}_run-1_T1w.nii.gz" for name in names for acq in ("mprage", "fast")))
    touch(
        tmp_path, *(f"{name}_run-{run}_echo-{echo}_MEGRE.nii.gz" for name in names for run in (1, 2) for echo in (1, 2))
    )
    touch(tmp_path, f"{names[0]}_FLAIR.nii.gz")
    touch(tmp_path, "sub-04/anat/sub-04_acq-mprage_T1w.nii.gz")
    return tmp_path


@pytest.mark.parametrize(
    ("suffixes", "filters", "count"),
    [
        (["T1w"], {}, 13),
        (["T1w"], {"participants": ["01", "sub-03"]}, 8),
        (["T1w"], {"sessions": ["pre"]}, 6),
        (["T1w"], {"sessions": ["ses-pre", "post"], "entities": ["acq-fast"]}, 6),
        (["T1w", "MEGRE"], {"participants": ["02"], "sessions": ["post"], "entities": ["run-1"]}, 4),
        (["MEGRE"], {"entities": ["run-1", "run-2", "echo-2"]}, 12),
        (["T1w"], {"entities": ["acq-mprage"]}, 7),
    ],
)
def test_filters_choose_scans(study, suffixes, filters, count):
    found = index_dataset(study, suffixes, **filters)
    assert len(found) == count
    assert len({scan.name for scan in found}) == count
    if "sessions" in filters:
        assert {f"ses-{scan.session}" for scan in found} == {
            f"ses-{s.removeprefix('ses-')}" for s in filters["sessions"]
        }


@pytest.mark.parametrize(
    ("filters", "line"),
    [
        ({"participants": ["01", "9", "10"]}, "holds no participant 10 9; there are "),
        ({"sessions": ["x"]}, "holds no scan with the suffix T1w and x; check the folder and the filters"),
        ({"entities": ["acq-x", "run-7"]}, "holds no scan with the suffix T1w and acq-x and run-7; check the folder"),
        (
            {"entities": ["mprage"]},
            "mprage: is no entity of a BIDS name; write it as names have it, such as acq-mprage",
        ),
        ({"participants": ["../.."]}, "holds no participant ../..; there are "),
    ],
)
def test_filter_that_leaves_nothing_is_an_error_of_one_line(study, filters, line):
    with pytest.raises(InputError) as error:
        index_dataset(study, ["T1w"], **filters)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


OTHER_FORMATS = ["img.gz", "nrrd", "nhdr", "mha", "mhd", "HEAD", "mnc", "dcm", "IMA", "PAR"]


@pytest.mark.parametrize("end", OTHER_FORMATS)
def test_scans_in_other_formats_are_named_with_what_converts_them(tmp_path, caplog, end):
    touch(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", f"sub-1/anat/sub-1_T1w.{end}", f"sub-2/anat/sub-2_T1w.{end}")
    touch(tmp_path, f"sub-2/anat/sub-2_aseg.{end}", f"sub-2/anat/sub-2_acq-x_T2w.{end}")
    assert [scan.subject for scan in index_dataset(tmp_path, ["T1w"])] == ["1"]
    (record,) = caplog.records
    image = tmp_path / f"sub-2/anat/sub-2_T1w.{end}"
    assert record.getMessage().startswith(f"{image}: left out, is no NIfTI image; convert it: ")
    command = shlex.split(record.getMessage())
    assert str(image) in command
    to_folder = ["-f", "sub-2_T1w", "-o", str(image.parent)]  # as dcm2niix has it
    assert str(tmp_path / "sub-2/anat/sub-2_T1w.nii.gz") in command or command[-5:-1] == to_folder
    with pytest.raises(InputError, match="holds no scan with the suffix T2w; convert those in other formats"):
        index_dataset(tmp_path, ["T2w"])


def test_a_folder_of_dicom_is_named_as_a_scan(tmp_path, caplog):
    touch(tmp_path, "sub-1/anat/sub-1_T1w.nii", "sub-2/anat/sub-2_T1w/1.dcm", "sub-2/anat/other/1.dcm")
    index_dataset(tmp_path, ["T1w"])
    (record,) = caplog.records
    place = tmp_path / "sub-2/anat"
    assert record.getMessage() == (
        f"{place}/sub-2_T1w: left out, is no NIfTI image; convert it: "
        f"dcm2niix -z y -f sub-2_T1w -o {place} {place}/sub-2_T1w"
    )


def test_what_converts_does_so(tmp_path):
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nib.save(nib.Nifti1Pair(array, np.diag([2.0, 3, 4, 1])), tmp_path / "a b.img.gz")
    stem, command = of_other_format(tmp_path / "a b.img.gz")
    program, *arguments = shlex.split(command)
    subprocess.run([Path(sys.executable).with_name(program), *arguments], check=True)
    assert np.array_equal(nib.load(f"{stem}.nii.gz").dataobj, array)


def test_subjects_without_a_contrast_are_named(study, caplog):
    index_dataset(study, ["T1w", "FLAIR"])
    assert [record.getMessage() for record in caplog.records] == [f"{study}: 3 of 4 subjects have no FLAIR: 02 03 04"]


def test_5000_subjects_are_indexed_in_5_seconds(tmp_path):
    for number in range(5000):
        anat = tmp_path / f"sub-{number:04d}" / "anat"
        anat.mkdir(parents=True)
        (anat / f"sub-{number:04d}_T1w.nii.gz").touch()
    start = time.process_time()  # the machine may have other things to do
    assert len(index_dataset(tmp_path, ["T1w", "FLAIR"])) == 5000
    assert time.process_time() - start < 5


def test_link_of_datalad_that_leads_nowhere_is_named_with_what_fetches_it(tmp_path, caplog):
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    image = tmp_path / "sub-02/anat/sub-02_T1w.nii.gz"
    image.parent.mkdir(parents=True)
    image.symlink_to("../../.git/annex/objects/Xx/Yy/MD5E-s1--0.nii.gz/MD5E-s1--0.nii.gz")
    assert len(index_dataset(tmp_path, ["T1w"])) == 1
    assert caplog.records[0].getMessage() == (
        f"{image}: left out, is a link to a file that is not there; fetch it: datalad get {image}"
    )


def test_links_that_lead_to_themselves_are_left_out_and_named(tmp_path, caplog):
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    (tmp_path / "sub-02").mkdir()
    loops = [tmp_path / path for path in ("sub-01/anat/sub-01_run-1_T1w.nii", "sub-02/anat", "sub-03", "sub-01/ses-1")]
    for loop in loops:
        loop.symlink_to(loop.name)
    (tmp_path / "sub-04").symlink_to(".")  # leads up: what it holds is of others
    assert [scan.name for scan in index_dataset(tmp_path, ["T1w"])] == ["sub-01_T1w"]
    said = {record.getMessage().split(": left out")[0] for record in caplog.records[:-1]}
    assert said == {str(loop) for loop in loops}


def test_sidecars_are_those_that_bids_lets_an_image_inherit(tmp_path):
    image = "sub-01/ses-a/func/sub-01_ses-a_task-rest_run-1_bold"
    wanted = [
        "bold.json", "task-rest_bold.json", "sub-01/sub-01_bold.json", "sub-01/ses-a/sub-01_ses-a_task-rest_bold.json",
        "sub-01/ses-a/func/sub-01_ses-a_task-rest_bold.json", f"{image}.json",
    ]  # fmt: skip
    others = [
        "task-nback_bold.json", "T1w.json", "sub-01/ses-b/bold.json", "sub-01/sub-02_bold.json", "../bold.json",
        "sub-01/ses-a/func/sub-01_ses-a_task-rest_run-2_bold.json", "sub-01/ses-a/func/sub-01_ses-a_bold.tsv",
    ]  # fmt: skip
    root = tmp_path / "study"
    touch(root, "dataset_description.json", f"{image}.nii.gz", *wanted, *others)
    assert sidecars_of(root / f"{image}.nii.gz") == [root / path for path in wanted]
    (root / "dataset_description.json").unlink()  # no dataset, nothing inherited
    assert sidecars_of(root / f"{image}.nii.gz") == [root / wanted[-1]]


def test_ome_zarr_images_are_found_and_have_a_row_for_each_channel(tmp_path, caplog):
    folder = tmp_path / "sub-01/micr"
    values = np.ones((4, 8, 8), np.uint16)
    write_store(
        folder / "sub-01_sample-A_SPIM.ome.zarr", [np.stack([values] * 2)], axes="czyx", labels=("GFP", "c Fos")
    )
    write_store(folder / "sub-01_sample-B_SPIM.ome.zarr", [values])
    write_store(folder / "sub-01_sample-C_SPIM.ome.zarr", [np.stack([values] * 2)], axes="czyx")
    write_store(folder / "sub-01_sample-D_SPIM.ome.zarr", [values], root=False)
    touch(tmp_path, "sub-01/micr/sub-01_sample-B_SPIM.ome.zarr/sub-01_sample-X_SPIM.nii.gz")  # not looked into
    found = [(scan.modality, scan.channel) for scan in index_dataset(tmp_path, ["SPIM"])]
    assert found == [
        ("sample-A_stain-GFP_SPIM", "GFP"),
        ("sample-A_stain-cFos_SPIM", "c Fos"),
        ("sample-B_SPIM", ""),
        ("sample-C_stain-0_SPIM", "0"),
        ("sample-C_stain-1_SPIM", "1"),
    ]
    assert "sub-01_sample-D_SPIM.ome.zarr: holds neither zarr.json nor .zattrs" in caplog.text


UNIFORM = "sub-1/anat/sub-1_acq-a_UNIT1.nii.gz"


@pytest.mark.parametrize(
    ("beside", "found"),
    [
        ("sub-1_acq-a_inv-2_MP2RAGE.nii.gz", True),
        ("sub-1_acq-a_inv-2_part-mag_MP2RAGE.nii", True),
        ("sub-1_acq-a_inv-2_part-phase_MP2RAGE.nii.gz", False),
        ("sub-1_acq-a_inv-1_MP2RAGE.nii.gz", False),
        ("sub-1_acq-b_inv-2_MP2RAGE.nii.gz", False),
        ("sub-1_inv-2_MP2RAGE.nii.gz", False),
        ("sub-1_acq-a_inv-2_MP2RAGE.json", False),
    ],
)
def test_the_mask_of_a_uniform_image_is_found_on_its_second_inversion_image(tmp_path, beside, found):
    touch(tmp_path, UNIFORM, f"sub-1/anat/{beside}")
    (scan,) = index_dataset(tmp_path, ["UNIT1"])
    assert (scan.image, scan.mask) == (str(tmp_path / UNIFORM), "")
    assert scan.mask_image == (str(tmp_path / "sub-1/anat" / beside) if found else "")


def test_collections_of_quantitative_mri_are_found(tmp_path):
    names = ["echo-1_flip-1_mt-on_part-mag_MPM", "flip-1_mt-off_MTS", "inv-2_MP2RAGE", "acq-a_UNIT1", "flip-2_VFA"]
    touch(tmp_path, *(f"sub-1/anat/sub-1_{name}.nii.gz" for name in names))
    found = index_dataset(tmp_path, ["MPM", "MTS", "MP2RAGE", "UNIT1", "VFA"])
    assert sorted(scan.modality for scan in found) == sorted(names)


@pytest.mark.parametrize("name", ["phase", "Phase", "e1_ph", "x_imaginary", "sub-1_phasediff", "sub-1_phase1"])
def test_a_name_that_ends_in_phase_is_refused_in_the_sheet(name):
    (problem,) = Scan("01", "", "T1w", f"raw/{name}.mgz").problems()
    assert "is a part of a complex image" in problem


def test_a_mask_and_an_image_for_it_are_one_too_many():
    (problem,) = Scan("01", "", "UNIT1", "a.nii", mask="m.nii", mask_image="i.nii").problems()
    assert problem == "mask and mask_image are two ways to the mask, leave one empty"
