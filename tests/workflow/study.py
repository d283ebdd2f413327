"""What the tests of the workflow share: small heads in all kinds of files, sheets, configs, and runs of Snakemake."""

import csv
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import asdict, fields
from pathlib import Path

import nibabel as nib
import numpy as np
import yaml

from n4flow.study.bids import Scan
from tests.workflow.started import run_started

ROOT = Path(__file__).resolve().parents[2]

#: 4 mm voxels: large enough for a field, small enough for a second per job.
SHAPE = (40, 44, 36)
AFFINE = np.array([[4.0, 0, 0, -80], [0, 4, 0, -90], [0, 0, 4, -70], [0, 0, 0, 1]])


def head(shape=SHAPE, seed=0):
    """Intensities of a head of four tissues times a smooth field, with Rician noise; air around it."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in (*shape, 1)[:3]]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2) * (1 + 0.08 * np.sin(5 * x + 3 * y) * np.cos(4 * z - y))
    tissue = np.select([radius < 0.45, radius < 0.65, radius < 0.72, radius < 0.85], [1000, 720, 280, 900], 0)
    field = np.exp(0.3 * x - 0.2 * y + 0.15 * z - 0.2 * x * y)
    real, imaginary = rng.normal(0, 15, (2, *tissue.shape))
    return np.hypot(tissue * field + real, imaginary).reshape(shape)


def save(
    path,
    values,
    *,
    affine=AFFINE,
    dtype=np.float32,
    kind=nib.Nifti1Image,
    endianness="<",
    scaling=None,
    units=("mm", "sec"),
    qform=1,
    sform=1,
    frame_time=None,
):
    """Write an image; integers hold ``(values - inter) / slope`` where a scaling (slope, inter) is given."""
    slope, inter = scaling or (1, 0)
    dtype = np.dtype(dtype)
    if dtype.kind in "iu":
        values = np.rint((values - inter) / slope).clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    image = kind(values.astype(dtype), affine, kind.header_class(endianness=endianness), dtype=dtype)
    image.header.set_xyzt_units(*units)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    if frame_time:
        image.header.set_zooms((*image.header.get_zooms()[:3], frame_time))
    if scaling:
        image.header.set_slope_inter(slope, inter)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def edit_header(path, **fields):
    """Overwrite header fields of an uncompressed little-endian NIfTI-1 file, past all that nibabel would mend."""
    with open(path, "r+b") as file:
        header = nib.Nifti1Header(file.read(348), endianness="<", check=False)
        for name, value in fields.items():
            header[name] = value
        file.seek(0)
        file.write(header.binaryblock)


def raw_scan(subject, modality="T1w", session="", extension=".nii.gz", mask=""):
    """A row of the sheet, the image where BIDS puts it in the folder ``raw``."""
    scan = Scan(subject, session, modality, "")
    return Scan(subject, session, modality, f"raw/{scan.folder}/{scan.name}{extension}", mask)


def describe_raw(folder):
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    (folder / "raw" / "dataset_description.json").write_text(json.dumps({"Name": "raw", "BIDSVersion": "1.10.0"}))


def write_sheet(path, scans):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        scans = list(scans)
        groups = list(dict.fromkeys(f"group_{name}" for scan in scans for name, _ in scan.groups))
        columns = [field.name for field in fields(Scan) if field.name != "groups"] + groups
        writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(asdict(scan) | {f"group_{name}": value for name, value in scan.groups} for scan in scans)


def write_config(folder, changes=None, *, guide=False):
    """The repository's config with some sections changed, as config/config.yaml of a working directory.

    Unless a test is about the guide, a page is put in its place: it depends on no scan, and takes most of the time of a
    run over a few small heads.
    """
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    for key, value in (changes or {}).items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    (folder / "config").mkdir(parents=True, exist_ok=True)
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    if not guide:
        give_guide(folder, config.get("pathvars", {}).get("results", "results"))


def give_guide(folder, results="results"):
    """A page in place of the guide, which Snakemake then takes for made."""
    page = folder / results / "qc" / "guide.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    if not page.exists():
        page.write_text("<!doctype html><title>A guide</title></html>", encoding="utf-8")


def snakemake(folder, *arguments, threads=1, path_first=None, workflow=ROOT, python=sys.executable):
    """Run the workflow in a working directory; what it says on the terminal is in ``stdout``."""
    path = os.pathsep.join(filter(None, [path_first and str(path_first), os.environ.get("PATH", "")]))
    environment = {**os.environ, "NO_COLOR": "1", "PATH": path, "OMP_NUM_THREADS": str(threads)}
    arguments = ["-s", str(workflow / "Snakefile"), "--directory", str(folder), *map(str, arguments)]
    if python == sys.executable:
        return run_started(arguments, environment)
    return subprocess.run(
        [python, "-m", "snakemake", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def environment_over_this(folder):
    """The Python of a new environment in which everything is installed that is in this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "here.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return folder / "bin" / "python", packages


def results_of(scan, results="results"):
    """The files that the chain makes of a scan, by what they are (those of SimpleITK too)."""
    stem = f"{results}/{scan.folder}/{scan.entities}"
    suffix = scan.suffix
    return {
        "mask": f"{stem}_desc-foreground{suffix}_mask.nii.gz",
        "mask sidecar": f"{stem}_desc-foreground{suffix}_mask.json",
        "corrected": f"{stem}_desc-N4_{suffix}.nii.gz",
        "sidecar": f"{stem}_desc-N4_{suffix}.json",
        "field_image": f"{stem}_desc-N4{suffix}_biasfield.nii.gz",
        "field": f"{stem}_desc-N4{suffix}_biasfield.json",
        "reference": f"{stem}_desc-N4sitk_{suffix}.nii.gz",
        "reference sidecar": f"{stem}_desc-N4sitk_{suffix}.json",
        "reference field": f"{stem}_desc-N4sitk{suffix}_biasfield.json",
        "page": f"{results}/qc/{scan.name}.html",
        "metrics": f"{results}/qc/data/{scan.name}.json",
        "pictures": f"{results}/qc/data/{scan.name}.webp",
        "viewer": f"{results}/qc/data/{scan.name}.js",
    }


REFERENCE_ROLES = {"reference", "reference sidecar", "reference field"}


def log_of(scan, step):
    return f"logs/{step}/{scan.name}.log" if step == "qc" else f"logs/{step}/{scan.folder}/{scan.name}.log"


def load(path):
    """An image's real values as float64."""
    return np.asarray(nib.load(path).dataobj, dtype=np.float64)


def partial_files(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".partial")]
