"""OME-Zarr images of the sheet: which rows are channels of one, and what is written for it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from n4flow.errors import DamagedError, InputError, MachineError
from n4flow.images.ngff import Image, read_image
from n4flow.images.remote import is_remote
from n4flow.study.bids import Scan

#: So many time points without a row are named.
NAMED = 5

#: The metadata of a store, read once a run.
image_of_store = lru_cache(maxsize=None)(read_image)


@dataclass(frozen=True)
class Store:
    """An OME-Zarr image, and the rows of the sheet that are its channels.

    Parameters
    ----------
    image : Image
    scans : tuple of Scan
    entities, folder, suffix : str
        As of a `Scan`: what the rows have in common.
    """

    image: Image
    scans: tuple[Scan, ...]
    entities: str
    folder: str
    suffix: str

    @property
    def name(self) -> str:
        """What tells it from all others."""
        return f"{self.entities}_{self.suffix}"

    def channels(self) -> dict[str, tuple[int, int | None]]:
        """Which channel each of its rows is, and which time point of it (None for all), by their names."""
        return {scan.name: _place_of(self.image, scan) for scan in self.scans}


def stores_of(scans: Sequence[Scan], pyramid_origin: str, other_channels: str) -> list[Store]:
    """The OME-Zarr images of a sheet, but for those whose metadata are damaged: their first step says so.

    Parameters
    ----------
    scans : sequence of Scan
    pyramid_origin : {"auto", "declared"}
        See `ngff.read_image`.
    other_channels : {"error", "copy"}
        What becomes of channels that have no row.

    Returns
    -------
    list of Store

    Raises
    ------
    InputError
        A store cannot be used, or its rows do not go together: a line for each. What no store is at fault for (there is
        no network) is a line alone.
    """
    stores: dict[str, Store] = {}
    others = {scan.name: scan for scan in scans if not scan.is_store}
    problems = []
    for own in rows_of_stores(scans):
        try:
            store = _store_of(own, pyramid_origin, other_channels)
            if store.name in others:
                raise InputError(
                    own[0].image,
                    f"would be written under the names of {others[store.name].image}",
                    "tell them apart by session or modality (sample-1_SPIM, sample-2_SPIM)",
                )
            if store.name in stores:
                raise InputError(
                    own[0].image,
                    f"would be written to the same store as {stores[store.name].image.path}",
                    "tell them apart by session or modality (sample-1_SPIM, sample-2_SPIM)",
                )
            stores[store.name] = store
        except MachineError:  # no network, no credentials: the others would wait for the same
            raise
        except DamagedError:
            continue
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError.of_lines(problems)
    return list(stores.values())


def metadata_digest(path: str, pyramid_origin: str) -> str:
    """By what it is seen that a store has changed that does not lie on this machine.

    Empty for what lies on it, as its files have times, and for what is damaged: whoever reads it says so.

    Raises
    ------
    MachineError
        It cannot be reached, which says nothing of whether it has changed.
    """
    try:
        return image_of_store(path, pyramid_origin).digest if is_remote(path) else ""
    except MachineError:
        raise
    except InputError:
        return ""


def rows_of_stores(scans: Iterable[Scan]) -> list[tuple[Scan, ...]]:
    """Of the rows of a sheet those of each OME-Zarr image."""
    rows: dict[str, list[Scan]] = {}
    for scan in scans:
        if scan.is_store:
            rows.setdefault(scan.image if is_remote(scan.image) else os.path.realpath(scan.image), []).append(scan)
    return list(map(tuple, rows.values()))


def entities_of_store(scans: Sequence[Scan]) -> str:
    """The entities of an OME-Zarr image: those that its rows have in common."""
    first = scans[0]
    shared = set.intersection(*(set(scan.modality.split("_")[:-1]) for scan in scans))
    parts = [f"sub-{first.subject}", *([f"ses-{first.session}"] if first.session else [])]
    return "_".join([*parts, *(part for part in first.modality.split("_")[:-1] if part in shared)])


def _store_of(scans: Sequence[Scan], pyramid_origin: str, other_channels: str) -> Store:
    first = scans[0]
    image = image_of_store(first.image, pyramid_origin)
    if len({(scan.subject, scan.session, scan.suffix) for scan in scans}) > 1:
        raise InputError(
            first.image,
            "has rows of several subjects, sessions or suffixes, and is written as one",
            "give its channels one of each, and entities such as stain-LABEL to tell them apart",
        )
    times: dict[int, list[int | None]] = {}
    for scan in scans:
        index, time = _place_of(image, scan)
        times.setdefault(index, []).append(time)
    for index, own in times.items():
        if len(set(own)) < len(own):
            of = "one channel" if own[0] is None else f"one time point of channel {index}"
            raise InputError(first.image, f"has two rows of {of}", "remove one")
        if None in own and len(own) > 1:
            raise InputError(
                first.image,
                f"has rows of single time points of channel {index}, and one of all of them",
                "remove the one whose column t is empty, or the others",
            )
    remedy = "add one each, or set zarr.other_channels to copy"
    if other_channels == "error" and (left := sorted(set(range(image.channels)) - set(times))):
        raise InputError(first.image, f"has no row for its channels {' '.join(map(str, left))}", remedy)
    for index, own in times.items() if other_channels == "error" else ():
        if None not in own and (left := sorted(set(range(image.times)) - {*own})):
            named = " ".join(map(str, left[:NAMED])) + (" …" if len(left) > NAMED else "")
            raise InputError(first.image, f"has no row for the time points {named} of channel {index}", remedy)
    return Store(image, tuple(scans), entities_of_store(scans), first.folder, first.suffix)


def _place_of(image: Image, scan: Scan) -> tuple[int, int | None]:
    """Which channel of an image a row is, and which time point of it; None for all."""
    return image.channel_index(scan.channel), image.time_index(scan.t)


def check_write_to(write_to: str, images: Sequence[Image]) -> None:
    """Refuse a folder for what is written that holds an image that goes in.

    Parameters
    ----------
    write_to : str
        As config's ``zarr.write_to`` has it.
    images : sequence of Image

    Raises
    ------
    InputError
        It holds one.
    """
    for image in images:
        if write_to and image.path.startswith(f"{write_to.rstrip('/')}/"):
            raise InputError("zarr.write_to", f"{write_to} holds {image.path}, which goes in", "give another folder")


def check_offset(offset: object, images: Sequence[Image], damaged: Sequence[str] = ()) -> None:
    """Refuse pedestals of channels that no image has: a mistyped label would leave the pedestal in.

    Parameters
    ----------
    offset : object
        As config's ``zarr.offset`` has it: of all channels, or a mapping of labels and indices.
    images : sequence of Image
    damaged : sequence of str
        Images whose channels nobody knows: a key may be of theirs.

    Raises
    ------
    InputError
        A key is no channel's.
    """
    if not isinstance(offset, Mapping) or not images:
        return
    known = {name for image in images for name in (*image.labels, *map(str, range(image.channels)))}
    if unknown := [str(key) for key in offset if str(key) not in known]:
        raise InputError(
            "zarr.offset",
            f"names channels that no image has: {' '.join(unknown)}",
            f"give labels or numbers of theirs: {' '.join(sorted(known))}"
            + (f"; not known are those of {' '.join(damaged)}, which is damaged" if damaged else ""),
        )
