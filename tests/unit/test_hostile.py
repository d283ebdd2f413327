"""Files made to do harm: each is refused with one line, and memory stays bounded."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from n4flow.core.field import BiasField, Mesh
from n4flow.errors import InputError
from n4flow.images.fields import load_field
from n4flow.images.nifti import HELD_VOXELS
from n4flow.study.config import config_problems, load_schema
from n4flow.study.sheet import read_sheet

ROOT = Path(__file__).resolve().parents[2]
SHEET_SCHEMA = load_schema(ROOT / "workflow/schemas/samples.schema.yaml")
CONFIG_SCHEMA = load_schema(ROOT / "workflow/schemas/config.schema.yaml")

#: Beside the interpreter and its libraries: a job on an image that is made to do harm takes no more.
MEMORY_MB = 100

ZEROS = bytes(2**20)


def image_of(shape, dtype=np.uint8, kind=nib.Nifti2Image, **fields):
    """The beginning of an image up to its data: what its header claims need not be there."""
    header = kind.header_class()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_zooms([1.0] * len(shape))
    header["vox_offset"] = 544 if kind is nib.Nifti2Image else 352
    header["magic"] = header.single_magic
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + bytes(4)


def claims_a_plane_of_10_to_the_12(path):
    path.write_bytes(gzip.compress(image_of((10**6, 10**6, 1), np.float32)))


def claims_it_uncompressed(path):
    path.write_bytes(image_of((10**6, 10**6, 1), np.float32))


def holes(path):
    """A file that has the size that its header claims, and takes no room."""
    path.write_bytes(image_of((10**5, 10**5, 1), np.float32))
    os.truncate(path, 544 + 4 * 10**10)


def large_frames(path):
    path.write_bytes(image_of((2000, 2000, 1000, 2)))
    os.truncate(path, 544 + 8 * 10**9)


def bomb(path, megabytes=500, start=None):
    """Zeros, of which the file holds no more than a thousandth."""
    with gzip.open(path, "wb", 1) as file:
        file.write(start or image_of((1024, 1024, megabytes)))
        for _ in range(megabytes):
            file.write(ZEROS)


def extension_of_2_gb(path):
    """Its size is claimed, and the file is large enough."""
    size = 2**31 - 128  # as a float32 holds it
    start = image_of((8, 8, 8), kind=nib.Nifti1Image, vox_offset=size)
    start = start[:348] + b"\1\0\0\0" + (size - 352).to_bytes(4, "little") + (6).to_bytes(4, "little")
    path.write_bytes(start)
    os.truncate(path, size + 512)


def extension_of_less_than_nothing(path):
    """Nibabel reads the rest of the file for it."""
    start = image_of((8, 8, 8), kind=nib.Nifti1Image, vox_offset=1024)[:348] + b"\1\0\0\0" + b"\xf0\xff\xff\xff" * 2
    bomb(path, 500, start)


HOSTILE = {
    "a plane of a million times a million voxels": ("x.nii.gz", claims_a_plane_of_10_to_the_12, "cannot hold"),
    "the same, not compressed": ("x.nii", claims_it_uncompressed, "is cut off: 544 of 4000000000544 bytes"),
    "a file of holes": ("x.nii", holes, f"voxels in a plane (or in a frame of a series), more than {HELD_VOXELS}"),
    "frames that cannot be held": ("x.nii", large_frames, "has 4000000000 voxels in a plane (or in a frame"),
    "a gz bomb": ("x.nii.gz", bomb, "no voxel is above 0"),
    "an extension of 2 GB": ("x.nii", extension_of_2_gb, "no voxel is above 0"),
    "an extension of -16 bytes and a bomb": ("x.nii.gz", extension_of_less_than_nothing, "no voxel is above 0"),
}

#: Make a mask, as the first job on an image does, and tell how much memory that took at most.
JOB = """
import resource, sys
from n4flow.errors import InputError
from n4flow.steps.mask import make_mask
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
try:
    make_mask(sys.argv[1], sys.argv[2])
    print("taken")
except InputError as error:
    print(error)
print(peak() - before)
"""


@pytest.mark.parametrize("kind", HOSTILE)
def test_image_that_claims_much_is_refused_with_one_line_in_little_memory(tmp_path, kind):
    name, make, words = HOSTILE[kind]
    make(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", JOB, tmp_path / name, tmp_path / "mask.nii"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "workflow" / "scripts")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    said, peak_mb = done.stdout.splitlines()
    assert said.startswith(f"{tmp_path / name}: ")
    assert words in said
    assert int(peak_mb) < MEMORY_MB
    assert [path.name for path in tmp_path.iterdir()] == [name]


class Evil:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch was_run",)


def array_of_objects(path):
    with open(path, "wb") as file:  # np.save adds .npy to a name
        np.save(file, np.array([Evil()], dtype=object), allow_pickle=True)


LATTICES = {
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "NumPy's file of objects": array_of_objects,
    "code in JSON": lambda path: path.write_text(
        '{"Format": {"py/reduce": [{"py/function": "os.system"}, ["touch x"]]}}'
    ),
    "brackets": lambda path: path.write_bytes(b"[" * 10**6),
    "2 GB": lambda path: (path.touch(), os.truncate(path, 2**31)),
}


@pytest.mark.parametrize("kind", LATTICES)
def test_lattice_file_that_is_none_is_refused_with_one_line_and_nothing_runs(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    LATTICES[kind](tmp_path / "field.json")
    with pytest.raises(
        InputError, match=r"is no n4flow bias field \(.*; give the control points, .* beside the corrected image$"
    ) as error:
        load_field("field.json")
    assert len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["field.json"]


#: Paths of the sheet that are no files, and what is said of them.
PATHS = {
    "a".ljust(4000, "b") + ".nii": "…" + "b" * 96 + ".nii is not there; check the path",
    "deep/" * 2000 + "x.nii": "/x.nii is not there; check the path",
    "loop.nii": "loop.nii is a link to a file that is not there (loop.nii); fetch it, or mend the link",
    "annexed file.nii": "is a link to a file that is not there; fetch it: datalad get 'annexed file.nii'",
    "$(touch was_run).nii": "$(touch was_run).nii is not there; check the path",
    "a\0.nii": "a\0.nii is not there; check the path",
    "/dev/zero/.nii": "/dev/zero/.nii is not there; check the path",
    "../../../../../../etc/passwd.nii": "passwd.nii is not there; check the path",
    "pipe.nii": "pipe.nii is not there; check the path",
    "folder.nii": "folder.nii is a folder; give a .nii or .nii.gz file",
}


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_path_that_leads_to_no_file_is_one_line(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    Path("loop.nii").symlink_to("loop.nii")
    Path("annexed file.nii").symlink_to("../.git/annex/objects/absent.nii")
    Path("folder.nii").mkdir()
    os.mkfifo("pipe.nii")  # whoever opens it waits for ever
    Path("sheet.tsv").write_text(f"subject\timage\n01\t{path}\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_sheet("sheet.tsv", SHEET_SCHEMA)
    (line,) = str(error.value).splitlines()
    assert line.startswith("sheet.tsv, line 2: image ")
    assert PATHS[path] in line
    assert len(line) < 400


@pytest.mark.parametrize("column", ["subject", "session", "modality"])
def test_name_of_thousands_of_characters_is_one_short_line(tmp_path, monkeypatch, column):
    monkeypatch.chdir(tmp_path)
    Path("a.nii").touch()
    row = {"subject": "01", "session": "a", "modality": "T1w", "image": "a.nii"}
    row[column] = "acq-" + "a" * 4000 + "_T1w" if column == "modality" else "a" * 4000
    Path("sheet.tsv").write_text("\t".join(row) + "\n" + "\t".join(row.values()) + "\n")
    with pytest.raises(InputError) as error:
        read_sheet("sheet.tsv", SHEET_SCHEMA)
    (line,) = str(error.value).splitlines()
    assert "characters, more than 200, shorten them" in line
    assert len(line) < 400


@pytest.mark.parametrize("key", ["a\nb", "\u2028", "\x85x", "\r"])
def test_problem_of_a_key_with_line_ends_is_one_line(key):
    (problem,) = config_problems({key: 1}, CONFIG_SCHEMA)
    assert len(problem.splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MeshStartVoxel", [1e308, 0, 0]),
        ("SpanVoxels", [5e-324, 10, 10]),
        ("SpanVoxels", [10, 1e300, 10]),
        ("VoxelToMesh", [[1e308, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        ("Affine", [[1e-200, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        ("Affine", [[1, 1, 0, 0], [1, 1 + 1e-15, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        ("Affine", [[1, 0, 0, -1e308], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    ],
)
def test_lattice_laid_beyond_any_image_is_refused_with_one_line(tmp_path, key, value):
    field = BiasField(np.zeros((4, 4, 4)), Mesh((1, 1, 1), (0, 0, 0), (9, 9, 9)), (10, 10, 10), np.eye(4))
    path = tmp_path / "field.json"
    path.write_text(json.dumps({**field.to_mapping(), key: value}))
    with pytest.raises(InputError, match="is no n4flow bias field") as error:
        load_field(path)
    assert len(str(error.value).splitlines()) == 1
