"""BIDS names: which folder a scan belongs to, and which scans a folder holds."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from n4flow import __version__
from n4flow.errors import InputError
from n4flow.images.files import (
    IMAGE_ENDS,
    atomic_text,
    header_file,
    missing_file,
    of_other_format,
    shortened,
    write_json,
)
from n4flow.images.ngff import is_store, read_image
from n4flow.images.remote import is_remote

log = logging.getLogger(__name__)

#: Suffixes that can be corrected, with the BIDS folder that they lie in.
DATATYPE_OF = {
    **dict.fromkeys(("T1w", "T2w", "T2star", "T2starw", "PDw", "PD", "PDT2", "FLAIR", "FLASH", "UNIT1"), "anat"),
    **dict.fromkeys(("MP2RAGE", "inplaneT1", "inplaneT2", "angio", "MEGRE", "MESE", "VFA", "MPM", "MTS"), "anat"),
    **dict.fromkeys(("bold", "cbv", "sbref"), "func"),
    **dict.fromkeys(("dwi",), "dwi"),
    **dict.fromkeys(("asl", "m0scan"), "perf"),
    **dict.fromkeys(("SPIM", "FLUO", "CONF", "2PE", "MPE", "BF", "DF", "PC", "DIC", "OCT", "PLI"), "micr"),
    **dict.fromkeys(("CARS", "NLO", "SEM", "TEM", "SR", "uCT"), "micr"),
}

#: Further folders of suffixes that lie in several.
FURTHER_DATATYPES = {"sbref": ("dwi", "perf"), "m0scan": ("fmap",)}

BIDS_VERSION = "1.10.0"

#: Files that BIDS has no name for yet, and those of the workflow.
BIDSIGNORE = "*_biasfield.*\n**/perf/*_mask.*\n**/micr/*_mask.*\n**/fmap/*_mask.*\n"
# masks have no flip-, inv- and mt-; of names with several stars the validator ignores none
BIDSIGNORE += "".join(f"*foreground{suffix}_mask.*\n" for suffix in ("MP2RAGE", "MPM", "MTS", "VFA"))
BIDSIGNORE += "manifest.json\nqc\ntune\nparts\n"

#: File systems hold names of 255 characters: what the outputs add must fit, too.
LONGEST_NAME = 200

#: So many subjects are named in a warning.
NAMED = 10

LABEL = re.compile(r"[A-Za-z0-9]+")
IMAGE = re.compile("|".join(f"{re.escape(end)}$" for end in (*IMAGE_ENDS, ".ome.zarr")), re.IGNORECASE)
ENTITY = re.compile(r"[a-z0-9]+-[A-Za-z0-9+]+")

#: How names say that a file holds a part of a complex image other than its magnitude: BIDS, and dcm2niix and others at
#: their end, in any case.
COMPLEX_PARTS = {"part-phase", "part-real", "part-imag"}
COMPLEX_ENDINGS = {"ph", "imaginary", "phase", "phase1", "phase2", "phasediff"}

#: What ImageType says of one in DICOM and its sidecar.
COMPLEX_TYPES = {"P", "PHASE", "PHASE MAP", "REAL", "IMAGINARY"}


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
    image, mask, mask_image, weights : str
        Paths; but for the image's they may be empty. Instead of a mask, the image that one is to be found on; weights
        are the confidence of each voxel.
    field_from : str
        Modality of the scan of the same subject and session whose field this one is divided by; empty for a scan
        that has a field of its own.
    groups : tuple of (str, str)
        What the report may split scans by, and to which part this one belongs: ``("site", "A")``.
    channel : str
        Of an OME-Zarr image: label or index of the channel that the row is; empty where there is one alone.
    t : str
        Of an OME-Zarr image: the time point that the row is; empty for all, which the mean over time stands for.
    """

    subject: str
    session: str
    modality: str
    image: str
    mask: str = ""
    mask_image: str = ""
    weights: str = ""
    field_from: str = ""
    groups: tuple[tuple[str, str], ...] = ()
    channel: str = ""
    t: str = ""

    @property
    def is_store(self) -> bool:
        """Whether the image is OME-Zarr: what goes through the chain is a coarse volume of it."""
        return is_store(self.image)

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
        if self.is_store:
            parts.append("res-coarse")
        return "_".join(parts)

    @cached_property
    def folder(self) -> str:
        """Where BIDS puts it: ``sub-01/ses-1/anat``; of several folders of a suffix, the one that its image lies in."""
        session = f"ses-{self.session}/" if self.session else ""
        there = os.path.basename(os.path.dirname(self.image))
        datatype = there if there in datatypes_of(self.suffix) else DATATYPE_OF[self.suffix]
        return f"sub-{self.subject}/{session}{datatype}"

    @property
    def name(self) -> str:
        """What tells it from all other scans: ``sub-01_ses-1_run-1_T1w``."""
        return f"{self.entities}_{self.suffix}"

    @property
    def field_source(self) -> str:
        """Name of the scan whose field this one is divided by: its own, unless the sheet says otherwise."""
        return replace(self, modality=self.field_from or self.modality).name

    @property
    def paths(self) -> list[str]:
        """The files that the row names."""
        return [path for path in (self.image, self.mask, self.mask_image, self.weights) if path]

    def problems(self) -> list[str]:
        """What is wrong with its names, in words; empty if nothing is."""
        found = [
            f"{what} {label!r} is no BIDS label, use letters and digits only"
            for what, label in (("subject", self.subject), ("session", self.session))
            if not LABEL.fullmatch(label) and (label or what == "subject")
        ]
        if not found and len(self.name) > LONGEST_NAME:
            found.append(
                f"subject, session and modality make a name of {len(self.name)} characters, more than {LONGEST_NAME}, "
                "shorten them"
            )
        *entities, suffix = self.modality.split("_")
        if suffix not in DATATYPE_OF:
            found.append(
                f"modality {self.modality!r} does not end in a known suffix, use one of {' '.join(DATATYPE_OF)}"
            )
        if self.mask and self.mask_image:
            found.append("mask and mask_image are two ways to the mask, leave one empty")
        if self.weights and self.field_from:
            found.append("weights count nothing beside field_from, give them in the row that the field is estimated on")
        if part := complex_part(self.modality) or complex_part(IMAGE.sub("", os.path.basename(self.image))):
            found.append(f"image {shortened(self.image)} is a part of a complex image ({part}), give its magnitude")
        found += [
            f"modality {self.modality!r} holds {entity!r}, which is no entity such as run-1"
            for entity in entities
            if not ENTITY.fullmatch(entity) or entity.partition("-")[0] in ("sub", "ses", "desc")
        ]
        return found


def datatypes_of(suffix: str) -> tuple[str, ...]:
    """The BIDS folders that scans of a suffix lie in."""
    return DATATYPE_OF[suffix], *FURTHER_DATATYPES.get(suffix, ())


def complex_part(name: str) -> str:
    """What in a name, without its extension, says that it is of a part of a complex image; empty if nothing does."""
    entities = name.split("_")
    found = [entity for entity in entities if entity in COMPLEX_PARTS]
    return next(iter([*found, *(end for end in entities[-1:] if end.lower() in COMPLEX_ENDINGS)]), "")


def index_dataset(
    folder: str | Path,
    suffixes: Sequence[str],
    *,
    participants: Sequence[str] = (),
    sessions: Sequence[str] = (),
    entities: Sequence[str] = (),
) -> list[Scan]:
    """Find the scans of a BIDS dataset, sorted by path; derivatives are left out.

    The log names what is left out, and the subjects that have no scan of one of the suffixes.

    Parameters
    ----------
    folder : path-like
        The dataset: holds ``sub-*`` folders.
    suffixes : sequence of str
        Which scans, such as ``["T1w", "bold"]``.
    participants, sessions : sequence of str
        Labels of those to be taken, with or without ``sub-`` and ``ses-``; all by default.
    entities : sequence of str
        What the names must hold, such as ``["acq-mprage", "run-1", "run-2"]``: one of the values given for each key.

    Raises
    ------
    InputError
        The folder is no dataset, a suffix is not known, a participant is not there, or no scan is found.
    """
    root = Path(folder)
    for suffix in suffixes:
        if suffix not in DATATYPE_OF:
            raise InputError(suffix, "is no suffix that n4flow knows", f"choose from {' '.join(DATATYPE_OF)}")
    for entity in entities:
        if not ENTITY.fullmatch(entity):
            raise InputError(entity, "is no entity of a BIDS name", "write it as names have it, such as acq-mprage")
    if not root.is_dir():
        raise InputError(folder, "there is no such folder", "give the folder that holds the sub-* folders")
    wanted: dict[str, set[str]] = {}
    for entity in entities:
        wanted.setdefault(entity.partition("-")[0], set()).add(entity)
    datatypes = sorted({name for suffix in suffixes for name in datatypes_of(suffix)})
    subjects = _chosen(root, "sub-", participants)
    scans = []
    unread: set[tuple[str, str]] = set()
    for subject in subjects:
        places = [] if sessions else [(subject, "")]
        places += [(path, path.name[4:]) for path in _chosen(subject, "ses-", sessions)]
        for place, session in places:
            for datatype in datatypes:
                files = sorted(_files(place / datatype))
                unread |= {(subject.name[4:], suffix) for suffix in _other_formats(files, suffixes, wanted)}
                for image in filter(_is_image, files):
                    *parts, suffix = IMAGE.sub("", image.name).split("_")
                    if not all(found & set(parts) for found in wanted.values()):
                        continue
                    if suffix in suffixes and datatype not in datatypes_of(suffix):
                        continue
                    if suffix not in suffixes or not image.name.endswith((*IMAGE_ENDS, ".ome.zarr")):
                        _name_near_miss(image, suffix, suffixes)
                        continue
                    file = header_file(image) if image.is_file() else image
                    if missing := None if is_store(image) else missing_file(file):
                        log.warning("%s: left out, %s; %s", file, *missing)
                    elif not _left_out(image, parts, subject.name, session and f"ses-{session}"):
                        kept = [part for part in parts if not part.startswith(("sub-", "ses-"))]
                        scan = Scan(
                            subject.name[4:],
                            session,
                            "_".join([*kept, suffix]),
                            str(image),
                            mask_image=_second_inversion(image, files) if suffix == "UNIT1" else "",
                        )
                        if problems := scan.problems():
                            log.warning("%s: left out, %s", image, problems[0])
                        else:
                            scans += _channels(scan) if scan.is_store else [scan]
    there = {subject.name[4:] for subject in subjects}
    if absent := sorted({label.removeprefix("sub-") for label in participants} - there):
        labels = [path.name[4:] for path in _folders(root, "sub-")]
        raise InputError(folder, f"holds no participant {' '.join(absent)}", f"there are {_a_few(labels) or 'none'}")
    if not scans:
        chosen = " and ".join(filter(None, [" or ".join(suffixes), *map(" or ".join, [*wanted.values(), sessions])]))
        remedy = "convert those in other formats" if unread else "check the folder and the filters"
        raise InputError(folder, f"holds no scan with the suffix {chosen}", remedy)
    for suffix in suffixes:
        named = {subject for subject, of_other in unread if of_other == suffix}
        if without := sorted(there - named - {scan.subject for scan in scans if scan.suffix == suffix}):
            of = (len(without), len(there), suffix)
            log.warning("%s: %d of %d subjects have no %s: %s", folder, *of, _a_few(without))
    return scans


def _a_few(labels: Sequence[str]) -> str:
    """The first of some labels in a line."""
    return " ".join(sorted(labels)[:NAMED]) + (" …" if len(labels) > NAMED else "")


def _channels(scan: Scan) -> list[Scan]:
    """The scan of each channel of an OME-Zarr image, told apart by its stain; none of one that cannot be read."""
    try:
        image = read_image(scan.image)
    except InputError as error:
        log.warning("%s: left out (it cannot be used)", error)
        return []
    if image.channels == 1:
        return [scan]
    *entities, suffix = scan.modality.split("_")
    found = []
    for index in range(image.channels):
        label = image.labels[index] if index < len(image.labels) else ""
        stain = re.sub(r"[^A-Za-z0-9]", "", label)
        known = stain and [re.sub(r"[^A-Za-z0-9]", "", other) for other in image.labels].count(stain) == 1
        modality = "_".join([*entities, f"stain-{stain if known else index}", suffix])
        found.append(replace(scan, modality=modality, channel=label if known else str(index)))
    return found


def _chosen(place: Path, prefix: str, labels: Sequence[str]) -> list[Path]:
    """The folders of subjects or sessions, sorted; of these labels alone, if there are any."""
    names = {prefix + label.removeprefix(prefix) for label in labels}
    return [path for path in sorted(_folders(place, prefix)) if not names or path.name in names]


def _left_out(image: Path, entities: list[str], subject: str, session: str) -> bool:
    """Whether a file is no scan of its own to correct; says so."""
    reason = ""
    named = next((entity for entity in entities if entity.startswith("ses-")), "")
    if subject not in entities:
        reason = f"its name is not of {subject}, whose folder it lies in"
    elif named != session:
        reason = f"its name is of {named or 'no session'}, and it lies in {session or 'the folder of no session'}"
    elif complex_part("_".join(entities)):
        reason = "a part of a complex image; only its magnitude can be corrected"
    elif any(entity.startswith("desc-") for entity in entities):
        reason = "a derivative, since its name has desc-"
    elif other := _same_scan(image):
        reason = f"the same scan is there as {other}"
    if reason:
        log.warning("%s: left out, %s", image, reason)
    return bool(reason)


def _second_inversion(image: Path, files: Sequence[Path]) -> str:
    """Of the files beside MP2RAGE's uniform image its second inversion image; empty if it is not there."""
    own = {*IMAGE.sub("", image.name).split("_")} - {"UNIT1"} | {"inv-2", "MP2RAGE"}
    fitting = [path for path in files if {*IMAGE.sub("", path.name).split("_")} - {"part-mag"} == own]
    return next((str(path) for path in fitting if path.name.endswith(IMAGE_ENDS) and not missing_file(path)), "")


def _same_scan(image: Path) -> str:
    """In which format that comes before it in `IMAGE_ENDS` a scan is there too; empty if in none."""
    if is_store(image):
        return ""
    stem, end = IMAGE.sub("", image.name), IMAGE_ENDS.index("".join(IMAGE.findall(image.name)))
    return next((other for other in IMAGE_ENDS[:end] if image.with_name(stem + other).exists()), "")


def _name_near_miss(image: Path, suffix: str, suffixes: Sequence[str]) -> None:
    """Say so of a file that is meant for one of the suffixes, as it seems, and not named so."""
    meant = next((name for name in suffixes if suffix.lower().startswith(name.lower())), None)
    if meant and (suffix == meant or suffix not in DATATYPE_OF):
        log.warning("%s: left out, its name does not end in _%s.nii.gz (or .nii); rename it", image, meant)


def _folders(place: Path, prefix: str) -> list[Path]:
    with os.scandir(place) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(prefix)]
    for path in found:
        if path.is_symlink() and not os.path.isdir(path):
            log.warning("%s: left out, is a link that leads nowhere; fetch it, or mend the link", path)
    return [path for path in found if os.path.isdir(path)]


def _other_formats(files: Sequence[Path], suffixes: Sequence[str], wanted: Mapping[str, set[str]]) -> Iterator[str]:
    """The suffixes of scans in a folder that are there in another format than NIfTI alone; names the files."""
    for image in files:
        if not (other := of_other_format(image)):
            continue
        stem, command = other
        *parts, suffix = os.path.basename(stem).split("_")
        if suffix not in suffixes or not all(found & set(parts) for found in wanted.values()):
            continue
        if not any(os.path.exists(f"{stem}{end}") for end in IMAGE_ENDS):
            log.warning("%s: left out, is no NIfTI image; convert it: %s", image, command)
            yield suffix


def _is_image(path: Path) -> bool:
    return bool(IMAGE.search(path.name))


def _files(place: Path) -> list[Path]:
    try:
        with os.scandir(place) as entries:
            names = [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:  # no permission, a link that leads to itself
        log.warning("%s: left out, cannot be read (%s); check it", place, error.strerror)
        return []
    return [place / name for name in names if not name.startswith(".")]


def dataset_root(path: str | Path) -> Path | None:
    """The BIDS dataset that a file lies in: the nearest folder with a dataset_description.json.

    Links are not followed: in a DataLad dataset they lead out of it.
    """
    if is_remote(path):
        return None
    for folder in Path(os.path.abspath(path)).parents:
        if (folder / "dataset_description.json").is_file():
            return folder
    return None


#: Files that say what the frames of a series are, carried along to its derivative: suffix and end of their names.
#: Without a suffix they have that of the image.
CARRIED = {"bval": ("", ".bval"), "bvec": ("", ".bvec"), "aslcontext": ("aslcontext", ".tsv")}

#: What of `CARRIED` images of a suffix can have.
CARRIED_WITH = {"dwi": ("bval", "bvec"), "asl": ("aslcontext",)}


def beside_image(image: str | Path, what: str) -> Path | None:
    """Of one of `CARRIED` the nearest file that says something of an image; None if there is none."""
    found = sidecars_of(image, *CARRIED[what])
    return found[-1] if found else None


def counted_beside(scan: Scan) -> list[str]:
    """Files whose change counts as one of what a row names: headers apart from their voxels, b values.

    The b values of a series count whatever it is called, as `series.low_b_frames` goes by them.
    """
    headers = [str(header_file(path)) for path in scan.paths if path.endswith(".img")]
    b_values = beside_image(scan.image, "bval")
    return [*headers, *([str(b_values)] if b_values else [])]


def sidecars_of(image: str | Path, suffix: str = "", end: str = ".json") -> list[Path]:
    """The files that say something of an image, from the most general to its own.

    By BIDS' inheritance principle these are, in its folder and those above it up to the dataset's, the files of its
    suffix whose entities are all among its own: ``task-rest_bold.json`` of the dataset, ``sub-01_task-rest_bold.json``.
    Outside of a dataset, only the one of its own name is; of an image that does not lie on this machine, none.

    Parameters
    ----------
    image : path-like
    suffix : str
        Of their names; that of the image by default.
    end : str
    """
    if is_remote(image):
        return []
    image = Path(image)
    *entities, own_suffix = IMAGE.sub("", image.name).split("_")
    suffix = suffix or own_suffix
    root = dataset_root(image)
    if root is None:
        own = image.with_name("_".join([*entities, suffix]) + end)
        return [own] if own.is_file() else []
    place = Path(os.path.abspath(image)).parent
    found: list[Path] = []
    for folder in [place, *place.parents][: len(place.relative_to(root).parts) + 1][::-1]:
        try:
            names = _names(folder, end, os.stat(folder).st_mtime_ns)
        except OSError:  # it may not be listed, or is not there: whoever reads the image says so
            continue
        parts = {name: name.removesuffix(end).split("_") for name in names}
        fitting = [name for name, (*own, last) in parts.items() if last == suffix and set(own) <= set(entities)]
        found += [folder / name for name in sorted(fitting, key=lambda name: (len(parts[name]), name))]
    return [path for path in found if path.is_file()]


@lru_cache(maxsize=64)
def _names(folder: Path, end: str, changed_ns: int) -> list[str]:
    """Files of a folder with an end; one of thousands of subjects is listed once while it stays as it is."""
    return [name for name in os.listdir(folder) if name.endswith(end)]


def metadata_of(image: Path) -> dict[str, Any]:
    """What the JSON files of an image say of it, its own before those that it inherits; a warning names a bad one."""
    metadata: dict[str, Any] = {}
    for path in sidecars_of(image):
        try:
            content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
            if not isinstance(content, dict):
                raise ValueError("it holds no object")
            metadata |= content
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s: left out of the sidecar, cannot be read (%s)", path, error)
    return metadata


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def is_called_magnitude(image: Path) -> bool:
    """Whether the name of an image or its sidecar says that it is a magnitude."""
    return "part-mag" in image.name.split("_") or bool(_image_type(image) & {"M", "MAGNITUDE"})


def _image_type(image: Path) -> set[str]:
    given = metadata_of(image).get("ImageType")
    return {str(word).upper() for word in given} if isinstance(given, list) else set()


def check_magnitude(image: Path) -> None:
    """Refuse a part of a complex image other than its magnitude, as its name or its sidecar has it.

    Raises
    ------
    InputError
        It is phase, real or imaginary part.
    """
    if named := complex_part(IMAGE.sub("", image.name)):
        raise InputError(image, f"is a part of a complex image ({named})", "give its magnitude")
    types = _image_type(image)
    if (part := types & COMPLEX_TYPES) and not types & {"M", "MAGNITUDE"}:
        raise InputError(
            image,
            f"is a part of a complex image (ImageType {' '.join(sorted(part))} in its sidecar)",
            "give its magnitude",
        )


def source_uri(path: str | Path, output: Path) -> str:
    """How a sidecar of an output names a file, raw or of the outputs: by its BIDS URI, without a dataset by its name.

    What does not lie on this machine is named by its address.

    Where the output lies in no dataset, no URI would lead anywhere: it is the path from the sidecar.
    """
    if is_remote(path):
        return str(path)
    path, root = Path(path), _output_root(output)
    if root is None:
        # of the folder that a link leads to, whose parent is another one
        return Path(os.path.relpath(os.path.realpath(path), os.path.realpath(output.parent))).as_posix()
    place = Path(os.path.abspath(path))
    if root in place.parents:
        return f"bids::{place.relative_to(root).as_posix()}"
    source = dataset_root(path)
    return f"bids:{_link_name(source, root)}:{place.relative_to(source).as_posix()}" if source else path.name


def _output_root(path: Path) -> Path | None:
    """The folder of derivatives that an output lies in: the parent of its ``sub-`` folder, or its own if described."""
    folders = Path(os.path.abspath(path)).parents
    described = folders[0] if (folders[0] / "dataset_description.json").is_file() else None
    return next((folder.parent for folder in folders if folder.name.startswith("sub-")), described)


def _link_name(root: Path, output_root: Path) -> str:
    """How DatasetLinks and URIs call a raw dataset: by the way to it, which no two datasets share."""
    return re.sub(r"[^A-Za-z0-9]+", "-", os.path.relpath(root, output_root)).strip("-") or "raw"


def describe_dataset(images: Iterable[str | Path], description: Path, bidsignore: Path) -> None:
    """Write dataset_description.json, with links to the raw datasets, and .bidsignore.

    Parameters
    ----------
    images : iterable of path-like
        All raw images, masks and weights.
    description, bidsignore : Path
        In the folder of the derivatives.
    """
    folder = Path(os.path.abspath(description.parent))
    roots = {root for image in images if (root := dataset_root(image))}
    write_json(
        description,
        {
            "Name": "N4 bias-corrected images",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "n4flow", "Version": __version__}],
            "DatasetLinks": {_link_name(root, folder): os.path.relpath(root, folder) for root in sorted(roots)},
        },
    )
    with atomic_text(bidsignore) as file:
        file.write(BIDSIGNORE)
