"""BIDS names: which folder a scan belongs to, and which scans a folder holds."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from n4flow.errors import InputError

log = logging.getLogger(__name__)

#: Suffixes that can be corrected, with the BIDS folder that they lie in.
DATATYPE_OF = {
    **dict.fromkeys(("T1w", "T2w", "T2star", "T2starw", "PDw", "PD", "PDT2", "FLAIR", "FLASH", "UNIT1"), "anat"),
    **dict.fromkeys(("MP2RAGE", "inplaneT1", "inplaneT2", "angio", "MEGRE", "MESE", "VFA"), "anat"),
    **dict.fromkeys(("bold", "cbv", "sbref"), "func"),
    **dict.fromkeys(("dwi",), "dwi"),
    **dict.fromkeys(("asl", "m0scan"), "perf"),
    **dict.fromkeys(("SPIM", "FLUO", "CONF", "2PE", "MPE", "BF", "DF", "PC", "DIC", "OCT", "PLI"), "micr"),
    **dict.fromkeys(("CARS", "NLO", "SEM", "TEM", "SR", "uCT"), "micr"),
}

LABEL = re.compile(r"[A-Za-z0-9]+")
ENTITY = re.compile(r"[a-z0-9]+-[A-Za-z0-9+]+")


@dataclass(frozen=True)
class Scan:
    """A row of the sample sheet.

    Parameters
    ----------
    subject, session : str
        BIDS labels without ``sub-`` and ``ses-``; the session may be empty.
    modality : str
        BIDS suffix, with further entities before it where a subject has several scans of one
        suffix: ``T1w``, ``run-1_T1w``, ``task-rest_bold``.
    image, mask : str
        Paths; the mask may be empty.
    """

    subject: str
    session: str
    modality: str
    image: str
    mask: str = ""

    @property
    def suffix(self) -> str:
        """The last part of the modality: ``T1w``."""
        return self.modality.rpartition("_")[2]

    @cached_property
    def entities(self) -> str:
        """The file name up to the suffix: ``sub-01_ses-1_run-1``."""
        parts = [f"sub-{self.subject}"]
        if self.session:
            parts.append(f"ses-{self.session}")
        if "_" in self.modality:
            parts.append(self.modality.rpartition("_")[0])
        return "_".join(parts)

    @cached_property
    def folder(self) -> str:
        """Where BIDS puts it: ``sub-01/ses-1/anat``."""
        session = f"ses-{self.session}/" if self.session else ""
        return f"sub-{self.subject}/{session}{DATATYPE_OF[self.suffix]}"

    @property
    def name(self) -> str:
        """What tells it from all other scans: ``sub-01_ses-1_run-1_T1w``."""
        return f"{self.entities}_{self.suffix}"

    def problems(self) -> list[str]:
        """What is wrong with its names, in words; empty if nothing is."""
        found = [
            f"{what} {label!r} is no BIDS label, use letters and digits only"
            for what, label in (("subject", self.subject), ("session", self.session))
            if not LABEL.fullmatch(label) and (label or what == "subject")
        ]
        *entities, suffix = self.modality.split("_")
        if suffix not in DATATYPE_OF:
            found.append(
                f"modality {self.modality!r} does not end in a known suffix, use one of {' '.join(DATATYPE_OF)}"
            )
        found += [
            f"modality {self.modality!r} holds {entity!r}, which is no entity such as run-1"
            for entity in entities
            if not ENTITY.fullmatch(entity) or entity.partition("-")[0] in ("sub", "ses", "desc")
        ]
        return found


def index_dataset(folder: str | Path, suffixes: Sequence[str]) -> list[Scan]:
    """Find the scans of a BIDS dataset, sorted by path; derivatives are left out.

    Parameters
    ----------
    folder : path-like
        The dataset: holds ``sub-*`` folders.
    suffixes : sequence of str
        Which scans, such as ``["T1w", "bold"]``.

    Raises
    ------
    InputError
        The folder is no dataset, a suffix is not known, or no scan is found.
    """
    root = Path(folder)
    for suffix in suffixes:
        if suffix not in DATATYPE_OF:
            raise InputError(suffix, "is no suffix that n4flow knows", f"choose from {' '.join(DATATYPE_OF)}")
    if not root.is_dir():
        raise InputError(folder, "there is no such folder", "give the folder that holds the sub-* folders")
    scans = []
    for subject in sorted(_folders(root, "sub-")):
        sessions = sorted(_folders(subject, "ses-"))
        for place, session in [(subject, ""), *((path, path.name[4:]) for path in sessions)]:
            for datatype in sorted({DATATYPE_OF[suffix] for suffix in suffixes}):
                for image in sorted(_images(place / datatype)):
                    stem = image.name.removesuffix(".gz").removesuffix(".nii")
                    *entities, suffix = stem.split("_")
                    if suffix in suffixes:
                        kept = [e for e in entities if not e.startswith(("sub-", "ses-"))]
                        scans.append(Scan(subject.name[4:], session, "_".join([*kept, suffix]), str(image)))
    if not scans:
        raise InputError(folder, f"holds no scan with the suffix {' or '.join(suffixes)}", "check the folder")
    return scans


def _folders(place: Path, prefix: str) -> list[Path]:
    with os.scandir(place) as entries:
        return [Path(entry.path) for entry in entries if entry.name.startswith(prefix) and entry.is_dir()]


def _images(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    with os.scandir(place) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.endswith((".nii", ".nii.gz"))]
    for path in found:
        if not path.is_file():
            log.warning("%s: left out, a link to a file that is not there; fetch it", path)
    return [path for path in found if path.is_file()]


def dataset_root(path: str | Path) -> Path | None:
    """The BIDS dataset that a file lies in: the nearest folder with a dataset_description.json.

    Links are not followed: in a DataLad dataset they lead out of it.
    """
    for folder in Path(os.path.abspath(path)).parents:
        if (folder / "dataset_description.json").is_file():
            return folder
    return None
