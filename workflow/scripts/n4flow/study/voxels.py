"""The voxels of corrected OME-Zarr images, compared with what was written down when they were divided."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from n4flow.errors import InputError
from n4flow.images.arrays import level_digest, unit_digests
from n4flow.images.files import read_json
from n4flow.images.ngff import read_image
from n4flow.study.manifest import read_manifest
from n4flow.study.outputs import store_of_root


def verify_voxels(results: str | Path, manifest: str | Path) -> tuple[list[str], list[str]]:
    """Read all voxels of the corrected stores again, and compare them with what their sidecars say.

    The digest of a level stands in the sidecar, whose own hash is in the manifest. What the parts have written down
    tells which units have changed.

    Parameters
    ----------
    results : path-like
        Folder.
    manifest : path-like
        That of another run: the stores are those that it or the folder's own names.

    Returns
    -------
    wrong : list of str
        A line for each level whose voxels have changed or cannot be read, for what the parts say of other voxels than
        the sidecar, and for each store, sidecar, plan or part that cannot be read.
    notes : list of str
        A line for each level with parts of which nothing is written down.

    Raises
    ------
    InputError
        A manifest cannot be read.
    """
    results = Path(results)
    manifests = [read_manifest(Path(manifest))]
    if (results / "manifest.json").is_file():
        manifests.append(read_manifest(results))
    files = {file for scans in manifests for scan in scans.values() for file in scan["Files"]}
    wrong: list[str] = []
    notes: list[str] = []
    for root in sorted(filter(store_of_root, files)):
        try:
            _verify_store(results, root, wrong, notes)
        except InputError as error:
            wrong.append(str(error))
    return wrong, notes


def _verify_store(results: Path, root: str, wrong: list[str], notes: list[str]) -> None:
    names = store_of_root(root)
    sidecar, plan = (results / names[role] for role in ("store_sidecar", "plan"))
    # of one that was written elsewhere, the sidecar says where
    store = _told(sidecar, lambda told: {"Store": told.get("Store", results / names["store"])})["Store"]
    image = read_image(store)
    digests = _told(sidecar, lambda told: {level["Path"]: level["SHA256"] for level in told["Levels"]})
    parts = _told_if_there(plan, lambda told: {level["Path"]: int(level["Parts"]) for level in told["Levels"]}, wrong)
    if digests.keys() != {level.path for level in image.levels}:
        raise InputError(sidecar, f"tells of other levels than {store} has", "make it again")
    for number, level in enumerate(image.levels):
        places = [".".join(map(str, place)) for place in np.ndindex(*level.unit_grid)]
        found = dict(unit_digests(image, level, places))
        markers = [plan.with_name(f"level-{number}_part-{part}.json") for part in range(parts.get(level.path, 0))]
        written: dict[str, str] = {}
        for marker in markers:
            written |= _told_if_there(
                marker, lambda told: {place: pair.split()[1] for place, pair in told["Units"].items()}, wrong
            )
        changed = [place for place in places if place in written and found[place] != written[place]]
        if level_digest(found) != digests[level.path]:
            which = f"{len(changed)} units: {' '.join(changed[:3])}" if changed else "nothing says which units"
            wrong.append(f"{store}: the voxels of level {level.path} have changed ({which})")
        elif changed or written.keys() - found.keys():
            wrong.append(
                f"{plan.parent}: the parts of level {level.path} tell of other voxels than {sidecar.name} and the store"
            )
        if len(written) < len(places):
            notes.append(
                f"{plan.parent}: of {len(places) - len(written)} of {len(places)} units of level {level.path} no part "
                f"tells; they were compared by the digest of the level in {sidecar.name}"
            )


def _told(path: Path, of: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What a JSON file tells; an error if it is not there or tells something else."""
    if not path.exists():
        raise InputError(path, "is not there", "make it again")
    try:
        return of(read_json(path))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise InputError(path, "cannot be read", "make it again") from None


def _told_if_there(path: Path, of: Callable[[Any], dict[str, Any]], wrong: list[str]) -> dict[str, Any]:
    """The same of a file that may be gone: what its voxels are is told by the sidecar, too."""
    try:
        return _told(path, of) if path.exists() else {}
    except InputError as error:
        wrong.append(str(error))
        return {}
