"""Files appear when they are complete; what a killed process had begun is found and removed."""

import errno
import fcntl
import gzip
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from n4flow.errors import InputError
from n4flow.images import files
from n4flow.images.files import (
    atomic_bytes,
    atomic_text,
    locked,
    missing_file,
    remove_abandoned,
    voxels_of_frame,
    why_not_writable,
)
from n4flow.study.provenance import PACKAGE


def test_file_is_there_when_it_is_complete(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_text(path) as file:
        file.write("begun")
        assert not path.exists()
    assert path.read_text() == "begun"
    assert list(tmp_path.iterdir()) == [path]


def test_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), atomic_text(path) as file:
        file.write("new, and no character: \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_an_error_for_the_user(tmp_path):
    path = tmp_path / "file"
    with (
        pytest.raises(InputError, match=r"cannot be written \(No space left on device\); make room"),
        atomic_bytes(path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_folder_that_another_run_has_removed_is_made(tmp_path, monkeypatch):
    """Snakemake removes folders for outputs that it finds empty at its end, at any moment for another run."""
    path = tmp_path / "qc/data/file"
    with atomic_text(path) as file:
        file.write("a")
    assert path.read_text() == "a"
    path.unlink()
    opened = []

    def open_later(*arguments, **how):
        if not opened:
            path.parent.rmdir()
        opened.append(arguments)
        return open(*arguments, **how)

    monkeypatch.setattr(files, "open", open_later, raising=False)
    with atomic_text(path) as file:
        file.write("b")
    assert path.read_text() == "b"
    assert len(opened) == 2


@pytest.mark.parametrize("folder", ["no", "no/deeper"])
def test_folder_that_cannot_be_made_is_an_error_for_the_user(tmp_path, folder):
    (tmp_path / "no").touch()
    with (
        pytest.raises(InputError, match=r"file: cannot be written \(Not a directory\); give a path in a folder that"),
        atomic_text(tmp_path / folder / "file"),
    ):
        pass


def test_where_there_are_no_locks_it_is_said_once(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with locked(tmp_path / "sheet.tsv"):
            pass
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}: files there cannot be locked (No locks available): start one run at a time")


def test_what_a_killed_process_had_begun_is_removed_and_what_is_being_written_is_not(tmp_path):
    (tmp_path / "deep").mkdir()
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from n4flow.images.files import atomic_text\n"
        "with atomic_text(sys.argv[2]) as file: file.write('begun'); file.flush(); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, PACKAGE.parent, tmp_path / "deep" / "killed.txt"], check=False)
    assert len(list((tmp_path / "deep").iterdir())) == 1
    with atomic_text(tmp_path / "written.txt") as file:
        remove_abandoned(tmp_path)
        file.write("all of it")
    assert list((tmp_path / "deep").iterdir()) == []
    assert (tmp_path / "written.txt").read_text() == "all of it"


def test_folder_that_would_be_made_can_be_written_to(tmp_path):
    assert why_not_writable(tmp_path / "not" / "there") == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(tmp_path):
    image = tmp_path / "my image.nii"
    image.write_bytes(b"")
    image.chmod(0)
    assert missing_file(image) == ("cannot be read (Permission denied)", f"allow it: chmod u+r '{image}'")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_cannot(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written (Permission denied)" in why_not_writable(tmp_path / "not" / "there")


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7), (5, 6, 7, 8)])
def test_voxels_of_a_frame_as_nibabel_has_them(tmp_path, kind, extension, order, shape):
    path = tmp_path / f"a{extension}"
    nib.save(kind(np.zeros(shape, dtype=np.uint8), np.eye(4), kind.header_class(endianness=order)), path)
    assert voxels_of_frame(path) == np.prod(shape[:3])


@pytest.mark.parametrize(
    "content", [b"", b"x" * 400, gzip.compress(b"x" * 400, mtime=0)[:30], (348).to_bytes(4, "little")]
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_what_is_no_image_has_no_voxels(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert voxels_of_frame(tmp_path / name) == 0
    assert voxels_of_frame(tmp_path / "not there.nii") == voxels_of_frame(tmp_path) == 0
