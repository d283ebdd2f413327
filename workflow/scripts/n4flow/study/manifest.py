"""What a run made, by hashes: so that anyone can tell whether a reprocessing came to the same."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from isal import igzip

from n4flow import __version__
from n4flow.core.field import BiasField
from n4flow.errors import InputError
from n4flow.images.fields import load_field
from n4flow.images.files import atomic_text
from n4flow.study.failures import Failure
from n4flow.study.outputs import beside, scan_and_role, store_of_root

log = logging.getLogger(__name__)

FORMAT = "n4flow manifest, version 1"

#: What is made with a field, by roles.
MADE_WITH = {"field": ("corrected", "sidecar", "field_image"), "reference_field": ("reference", "reference_sidecar")}

#: Largest difference of two log fields that are called equal within it.
CLOSE_LOG = 1e-5

#: Keys of the outputs' JSON, at any depth, that hang on the clock, the machine or where folders lie.
VOLATILE = {
    "Provenance",
    "GeneratedBy",
    "Sources",
    "Store",
    "DatasetLinks",
    "Device",
    "DeviceReason",
    "WallTimeSeconds",
}
VOLATILE |= {"wall_time_s", "reference_wall_time_s"}

#: Decimals of the control points in the manifest: far below `CLOSE_LOG`.
DECIMALS = 9

READ_BYTES = 2**20


def content_sha256(path: str | Path) -> str:
    """SHA-256 of what an output says, whatever it was packed with, and when.

    Parameters
    ----------
    path : path-like
        Of a ``.nii.gz``, header and voxels count, not the compression; of a ``.json``, all keys that are not in
        `VOLATILE`, in any order; of any other file, its bytes.

    Returns
    -------
    str

    Raises
    ------
    InputError
        The file cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".json":
            content = _lasting(json.loads(path.read_text(encoding="utf-8")))
            return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        digest = hashlib.sha256()
        with igzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
        return digest.hexdigest()
    except (OSError, EOFError, ValueError, RecursionError, igzip.isal_zlib.error) as error:  # type: ignore[attr-defined]
        raise InputError(path, f"cannot be read ({error})", "make it again") from None


def _lasting(content: Any) -> Any:
    """JSON without the keys in `VOLATILE`."""
    if isinstance(content, dict):
        return {key: _lasting(value) for key, value in content.items() if key not in VOLATILE}
    return [_lasting(value) for value in content] if isinstance(content, list) else content


def hashes(folder: Path, files: Sequence[str], threads: int) -> dict[str, str]:
    """`content_sha256` of files by their paths in a folder; those that are not there are left out."""
    there = [file for file in files if (folder / file).is_file()]
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(there, pool.map(content_sha256, [folder / file for file in there]), strict=True))


def write_manifest(
    output: Path,
    scans: Mapping[str, Sequence[Path]],
    dataset: Iterable[Path],
    failed: Sequence[Failure] = (),
    *,
    threads: int = 1,
) -> None:
    """Write the hashes of all outputs, with the parameters and versions that made them.

    Parameters
    ----------
    output : Path
        In the folder of the results.
    scans : mapping of str to sequence of Path
        The outputs of each scan, by its name.
    dataset : iterable of Path
        The outputs over all scans.
    failed : sequence of Failure
        Scans that failed; a copy of the log of each is one of the outputs over all scans.
    threads : int

    Raises
    ------
    InputError
        An output cannot be read.
    """
    folder = output.parent
    files = {name: [path.relative_to(folder).as_posix() for path in paths] for name, paths in scans.items()}
    common = [path.relative_to(folder).as_posix() for path in dataset]
    found = hashes(folder, [*common, *(file for of_scan in files.values() for file in of_scan)], threads)
    content = {
        "Format": FORMAT,
        "n4flow": __version__,
        "Dataset": {"Files": {file: found[file] for file in sorted(common)}},
        "Failed": {f.scan: {"Step": f.step, "Error": f.error, "Log": f"qc/data/{f.scan}.log"} for f in sorted(failed)},
        "Scans": {
            name: {**_made_with(folder, files[name]), "Files": {file: found[file] for file in sorted(files[name])}}
            for name in sorted(files)
        },
    }
    with atomic_text(output) as file:
        file.writelines(_lines(content))


def _made_with(folder: Path, files: Sequence[str]) -> dict[str, Any]:
    """What the sidecars of a scan say of how it was made, and its fields."""
    found: dict[str, Any] = {}
    for file in files:
        if file.endswith(".json") and not file.startswith("qc/"):
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            if "Lattice" in content:
                found.setdefault("Fields", {})[file] = _field(load_field(folder / file))
            elif "N4" in content:
                known = ("Parameters", "PlaneGains", "FieldFrom", "Device")
                found.setdefault("Made", {})[file] = {
                    **{key: content["N4"][key] for key in known if key in content["N4"]},
                    **content["Provenance"],
                }
    return found


def _field(field: BiasField) -> dict[str, Any]:
    """The field as the manifest holds it: what two fields must share to be compared, and the rounded control points."""
    content = field.to_mapping()
    if field.gains is not None:
        content["PlaneGains"] = {"Axis": field.gains.axis, "LogGains": field.gains.log_gains.round(DECIMALS).tolist()}
    return {**content, "Lattice": np.round(field.lattice, DECIMALS).tolist()}


def _lines(content: Any, depth: int = 0) -> Iterator[str]:
    """JSON with a line for each key, down to those of a scan's files and fields: so that diff shows what differs."""
    if not isinstance(content, dict) or depth == 4 or not content:
        yield json.dumps(content, allow_nan=False)
        return
    yield "{\n"
    for number, (key, value) in enumerate(content.items()):
        yield f"{' ' * (depth + 1)}{json.dumps(key)}: "
        yield from _lines(value, depth + 1)
        yield ",\n" if number < len(content) - 1 else "\n"
    yield " " * depth + "}" + ("\n" if depth == 0 else "")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest, perhaps of another machine.

    Parameters
    ----------
    path : Path
        The file, or the folder of results that holds it as ``manifest.json``.

    Returns
    -------
    dict
        Its ``Scans``, and as one of them ``dataset``, what is over all scans. A scan that failed has as ``Failed`` in
        which step and why; its ``Files`` are those that were made all the same.

    Raises
    ------
    InputError
        It cannot be read, is none, or names files outside of the folder of results.
    """
    path = path / "manifest.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["Format"] != FORMAT:
            raise ValueError(f"format {content['Format']!r}")
        scans = {"dataset": content["Dataset"], **content["Scans"]}
        for name, failed in content.get("Failed", {}).items():
            scans[name] = {"Files": {}, **scans.get(name, {}), "Failed": f"{failed['Step']}: {failed['Error']}"}
        for scan in scans.values():
            for file in [*scan["Files"], *scan.get("Fields", {})]:
                place = PurePosixPath(file)
                if place.is_absolute() or ".." in place.parts or "\0" in file:
                    raise ValueError(f"it names {file!r}, which is outside of the results")
            for field in scan.get("Fields", {}).values():
                field["Lattice"] = np.array(field["Lattice"], dtype=np.float64)
                if not np.isfinite(field["Lattice"]).all():  # the difference to NaN is not larger than anything
                    raise ValueError("a field has a control point that is no finite number")
        return scans
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(path, f"is no n4flow manifest ({error})", "give the manifest.json of a run") from None


class Verdict(NamedTuple):
    """What came of the comparison of a scan."""

    scan: str
    verdict: str  # equal, equal within 1e-5, different, or failed: in both runs
    reason: str  # why, in words; empty where all is equal


EQUAL, CLOSE, DIFFERENT = "equal", f"equal within {CLOSE_LOG:.0e}".replace("e-0", "e-"), "different"
FAILED = "failed"


def verify(folder: Path, manifest: Path, *, threads: int = 1) -> list[Verdict]:
    """Compare the results in a folder with the manifest of another run.

    Everything that the manifest names must be there. What lies under ``qc`` shows times, so that it is not compared
    with another run's; but no file may have changed since the folder's own manifest was written.

    Two log fields on one mesh differ nowhere by more than their control points do, since the weights of these are not
    negative and sum to 1. So a scan is equal within 1e-5 if its control points are, the masks are equal, and the
    folder's own manifest shows that its images are what the run made of that field.

    Parameters
    ----------
    folder : Path
        Results.
    manifest : Path
        See `read_manifest`.
    threads : int

    Returns
    -------
    list of Verdict
        One for each scan that is in the manifest or the folder's own, and one for the files over all scans.

    Raises
    ------
    InputError
        A manifest cannot be read.
    """
    wanted = read_manifest(manifest)
    own = read_manifest(folder) if (folder / "manifest.json").is_file() else None
    files = {file for scans in (wanted, own or {}) for scan in scans.values() for file in scan["Files"]}
    there = [file for file in sorted(files) if (folder / file).is_file()]
    with ThreadPoolExecutor(threads) as pool:
        found = {}
        for file, digest in zip(there, pool.map(_hash_or_error, [folder / file for file in there]), strict=True):
            found[file] = digest
            log.info("%d of %d files read", len(found), len(there))
    names = dict.fromkeys([*wanted, *(own or {})])
    return [Verdict(name, *_verdict(folder, name, wanted.get(name), own, found)) for name in names]


def _hash_or_error(path: Path) -> str:
    try:
        return content_sha256(path)
    except InputError:  # damaged: it equals nothing
        return "damaged"


def _verdict(
    folder: Path, name: str, wanted: dict[str, Any] | None, own: dict[str, Any] | None, found: Mapping[str, str]
) -> tuple[str, str]:
    if wanted is None:
        return DIFFERENT, "the manifest has no such scan"
    own = own or {}
    here: dict[str, Any] = own.get(name, {"Files": {}})
    left = here["Files"]
    if changed := [file for file in left if found.get(file) != left[file]]:
        return DIFFERENT, f"changed since the run: {_list(changed)}"
    if "Failed" in wanted and not wanted["Files"]:
        if "Failed" in here and not left:
            return FAILED, wanted["Failed"]
        return DIFFERENT, f"failed when the manifest was made: {wanted['Failed']}"
    compared = [file for file in wanted["Files"] if not file.startswith("qc/")]
    if missing := [file for file in compared if file not in found]:
        if "Failed" in here:
            return DIFFERENT, f"failed when the run was made: {here['Failed']}"
        return DIFFERENT, f"not there: {_list(missing)}"
    other = [file for file in compared if found[file] != wanted["Files"][file]]
    if not other:
        return EQUAL, ""
    largest = 0.0
    explained = set()
    for file, field in wanted.get("Fields", {}).items():
        difference = _largest_difference(folder / file, field)
        if difference is None:
            return DIFFERENT, f"the field has another mesh or image: {file}"
        if difference > CLOSE_LOG:
            return DIFFERENT, f"the log field differs by up to {difference:.1e}: {file}"
        if file in other:  # it is what the corrected image, its sidecar and the field as an image are made with
            largest = max(largest, difference)
            explained |= {file, *_of_field(file), *_of_store(other)}
    if unexplained := [file for file in other if file not in explained]:
        return DIFFERENT, f"differs by more than its field: {_list(unexplained)}"
    if not left:
        return DIFFERENT, "without a manifest.json of its own, nothing shows that the images are those of the field"
    if _image_hashes(wanted) != _image_hashes(here):
        return DIFFERENT, "made of another image file, of whose field the manifest tells, but not of its intensities"
    return CLOSE, f"the log field differs by up to {largest:.1e}"


def _largest_difference(path: Path, wanted: Mapping[str, Any]) -> float | None:
    """How far control points are from those of the manifest; None if they are no two fields of one mesh and image."""
    try:
        here = _field(load_field(path))
    except InputError:
        return None
    for key, value in here.items():
        if key not in ("Lattice", "PlaneGains") and not _same_numbers(value, wanted.get(key)):
            return None
    if np.shape(here["Lattice"]) != wanted["Lattice"].shape:
        return None
    difference = float(np.abs(here["Lattice"] - wanted["Lattice"]).max())
    gains, others = (each.get("PlaneGains") or {"Axis": None, "LogGains": [0.0]} for each in (here, wanted))
    if gains["Axis"] != others["Axis"] or len(gains["LogGains"]) != len(others["LogGains"]):
        return None
    of_gains = float(np.abs(np.subtract(gains["LogGains"], others["LogGains"])).max())
    return max(difference, of_gains) if np.isfinite(of_gains) else None


def _same_numbers(first: Any, second: Any) -> bool:
    """Whether two values of a field's geometry are the same; numbers may be rounded otherwise."""
    if not isinstance(first, list):
        return bool(first == second)
    return np.shape(first) == np.shape(second) and np.allclose(first, second, rtol=1e-9, atol=1e-9)


def _image_hashes(scan: Mapping[str, Any]) -> list[str]:
    """Hashes of the images that went in, by sidecar."""
    return [facts["InputSHA256"]["image"] for _, facts in sorted(scan.get("Made", {}).items())]


def _of_field(file: str) -> list[str]:
    """The other files that are made with a field, by its own file."""
    _, role = scan_and_role(file) or ("", "")
    return [beside(file, other) for other in MADE_WITH.get(role, ())]


def _of_store(files: Sequence[str]) -> set[str]:
    """Of these files those of a corrected OME-Zarr image: root metadata, and the sidecar with the voxels' digests."""
    made = {file: store_of_root(file) for file in files}
    return {name for file, names in made.items() if names for name in (file, names["store_sidecar"])}


def _list(files: Sequence[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
