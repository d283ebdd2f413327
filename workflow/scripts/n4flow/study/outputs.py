"""What everything that is made of a scan is called: from scan and role to path, and back.

A role is one word for one file, in rules, steps, manifest and pages alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from n4flow.study.bids import DATATYPE_OF, Scan
from n4flow.study.stores import Store

#: What the wildcards stand for, as regular expressions.
WILDCARDS = {
    "folder": r"sub-[A-Za-z0-9]+(/ses-[A-Za-z0-9]+)?/[a-z]+",
    "entities": r"sub-[A-Za-z0-9_+-]+?",
    "suffix": "|".join(DATATYPE_OF),
}

#: By role, in the folder of the results; the wildcards are those of the rules, and attributes of a `Scan`.
NAMES = {
    "coarse": "{folder}/{entities}_desc-original_{suffix}.nii.gz",
    "coarse_sidecar": "{folder}/{entities}_desc-original_{suffix}.json",
    "given_mask": "{folder}/{entities}_desc-given{suffix}_mask.nii.gz",
    "mask": "{folder}/{entities}_desc-foreground{suffix}_mask.nii.gz",
    "mask_sidecar": "{folder}/{entities}_desc-foreground{suffix}_mask.json",
    "corrected": "{folder}/{entities}_desc-N4_{suffix}.nii.gz",
    "sidecar": "{folder}/{entities}_desc-N4_{suffix}.json",
    # by BIDS' inheritance principle they are those of all that is made of the scan
    "bval": "{folder}/{entities}_{suffix}.bval",
    "bvec": "{folder}/{entities}_{suffix}.bvec",
    "aslcontext": "{folder}/{entities}_{suffix}context.tsv",
    "field": "{folder}/{entities}_desc-N4{suffix}_biasfield.json",
    "field_image": "{folder}/{entities}_desc-N4{suffix}_biasfield.nii.gz",
    "reference": "{folder}/{entities}_desc-N4sitk_{suffix}.nii.gz",
    "reference_sidecar": "{folder}/{entities}_desc-N4sitk_{suffix}.json",
    "reference_field": "{folder}/{entities}_desc-N4sitk{suffix}_biasfield.json",
    "page": "qc/{entities}_{suffix}.html",
    "metrics": "qc/data/{entities}_{suffix}.json",
    "pictures": "qc/data/{entities}_{suffix}.webp",
    "viewer": "qc/data/{entities}_{suffix}.js",
    "crops": "qc/data/{entities}_{suffix}_crops.webp",
}

#: Of an OME-Zarr image, whose rows in the sheet are its channels; level and part are numbers, root is its metadata, and
#: finished a copy of that, of a store that is written elsewhere (zarr.write_to).
STORE_NAMES = {
    "store": "{folder}/{entities}_desc-N4_{suffix}.ome.zarr",
    "root": "{folder}/{entities}_desc-N4_{suffix}.ome.zarr/{root}",
    "store_sidecar": "{folder}/{entities}_desc-N4_{suffix}.json",
    "plan": "parts/{folder}/{entities}_{suffix}/plan.json",
    "finished": "parts/{folder}/{entities}_{suffix}/finished_{root}",
    "part": "parts/{folder}/{entities}_{suffix}/level-{level}_part-{part}.json",
}


def output_of(scan: Scan, role: str) -> str:
    """Path of one of the files that are made of a scan, in the folder of the results.

    Parameters
    ----------
    scan : Scan
    role : str
        One of `NAMES`.

    Returns
    -------
    str
    """
    return NAMES[role].format(folder=scan.folder, entities=scan.entities, suffix=scan.suffix)


def store_output(store: Store, role: str, **numbers: int) -> str:
    """Path of what is made of an OME-Zarr image, in the folder of the results.

    Parameters
    ----------
    store : Store
    role : str
        One of `STORE_NAMES`.
    **numbers : int
        Level and part.

    Returns
    -------
    str
    """
    return STORE_NAMES[role].format(
        folder=store.folder, entities=store.entities, suffix=store.suffix, root=store.image.root, **numbers
    )


def store_of_root(path: str) -> dict[str, str]:
    """Paths of what is made of an OME-Zarr image, by role, if this is its root metadata or a copy; else nothing.

    Parameters
    ----------
    path : str
        In the folder of the results.
    """
    found = _ROOT.fullmatch(path) or _FINISHED.fullmatch(path)
    return {role: STORE_NAMES[role].format(**found.groupdict()) for role in _OF_ROOT} if found else {}


def beside(path: str | Path, role: str) -> str:
    """Path of another file that is made of the same scan, in the same folder.

    Parameters
    ----------
    path : path-like
        A file of that scan, called as `NAMES` has it.
    role : str

    Returns
    -------
    str

    Raises
    ------
    ValueError
        The file is no scan's.
    """
    found, _ = _parts_of(path)
    if not found:
        raise ValueError(f"{path}: no file that is made of a scan")
    name = NAMES[role].rpartition("/")[2].format(folder="", **found.groupdict())
    return Path(path).with_name(name).as_posix()


def scan_and_role(path: str | Path) -> tuple[str, str] | None:
    """Of which scan a file is made, and as what: the way back from `output_of`.

    Parameters
    ----------
    path : path-like
        Only the file's name counts.

    Returns
    -------
    (str, str) or None
        Name of the scan, and role; None for what is no scan's.
    """
    found, role = _parts_of(path)
    return (f"{found['entities']}_{found['suffix']}", role) if found else None


def _parts_of(path: str | Path) -> tuple[re.Match[str] | None, str]:
    for role, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(Path(path).name):
            return found, role
    return None, ""


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"({\w+})", name)
    wildcards = WILDCARDS | {"root": r"zarr\.json|\.zattrs"}
    groups = {f"{{{word}}}": f"(?P<{word}>{pattern})" for word, pattern in wildcards.items()}
    return re.compile("".join(groups.get(part) or re.escape(part) for part in parts))


_PATTERNS = {role: _pattern(name.rpartition("/")[2]) for role, name in NAMES.items()}
_ROOT, _FINISHED = _pattern(STORE_NAMES["root"]), _pattern(STORE_NAMES["finished"])
_OF_ROOT = ("store", "store_sidecar", "plan")


def entities_pattern(scans: Iterable[Scan | Store]) -> str:
    """A regular expression of the entities of some scans in the paths of what corrects them; of none, nothing matches.

    The entities do not tell a scan without its suffix, so that it looks ahead at the rest of the file's name.
    """
    entities: dict[str, list[str]] = {}
    for scan in scans:
        entities.setdefault(scan.suffix, []).append(scan.entities)
    found = [rf"{_any_of(words)}(?=_desc-N4_?{suffix}[._])" for suffix, words in entities.items()]
    return "|".join(found) or "(?!)"


def _any_of(words: Iterable[str]) -> str:
    """A regular expression of exactly these words, as a tree: thousands of them cost hardly more than one."""
    tails: dict[str, list[str]] = {}
    for word in words:
        tails.setdefault(word[:1], []).append(word[1:])
    branches = [re.escape(head) + _any_of(tails[head]) if head else "" for head in tails]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
