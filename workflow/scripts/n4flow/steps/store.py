"""One OME-Zarr image on one machine, from store to store: the steps of the workflow, one after the other."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from n4flow.device import DeviceChoice, available_cores
from n4flow.errors import InputError
from n4flow.images.fields import load_field, save_field
from n4flow.images.files import read_json
from n4flow.images.ngff import is_store, read_image
from n4flow.images.remote import is_remote
from n4flow.parameters import N4Parameters
from n4flow.steps.correct import correct_scan
from n4flow.steps.derivatives import CorrectionFiles
from n4flow.steps.mask import MaskMethod, mask_scan
from n4flow.steps.pyramid import coarse_scan, describe_store, divide_part, finish_store, place_mask, plan_store
from n4flow.study.bids import source_uri
from n4flow.study.stores import check_offset


def files_beside(output: Path, indices: Iterable[int]) -> tuple[Path, dict[int, Path]]:
    """Sidecar of a corrected store, and the field of each channel that has one."""
    stem = output.name.removesuffix(".zarr").removesuffix(".ome")
    fields = {index: output.with_name(f"{stem}_channel-{index}_biasfield.json") for index in indices}
    return output.with_name(f"{stem}.json"), fields


def correct_store(
    store: str | Path,
    output: str | Path,
    *,
    channels: Sequence[str] = (),
    field_from: str = "",
    mask: str | Path | None = None,
    mask_method: MaskMethod = "otsu",
    percentile: float = 50.0,
    plane_gains: str | None = None,
    parameters: N4Parameters | Mapping[str, Any] | None = None,
    device: DeviceChoice = "auto",
    level: int | str = "auto",
    level_voxels: int = 16_000_000,
    offset: float | str | Mapping[str, float | str] = 0.0,
    dtype: str = "same",
    saturated: str = "keep",
    pyramid_origin: str = "auto",
    job_gb: float = 64.0,
    threads: int | None = None,
) -> None:
    """Estimate the field of each channel of an OME-Zarr image, and write the image divided by it.

    Beside the output lie its sidecar (``out.json``) and a field for each channel (``out_channel-0_biasfield.json``).
    A store that is there under the name of the output stays, and is an error: it would be gone long before the new one
    is complete.

    Parameters
    ----------
    store, output : path-like
        ``.ome.zarr``; the input may lie in a bucket (``s3://``), the output is a folder on this machine, of the version
        of NGFF of the input, and must not be there yet.
    channels : sequence of str
        Labels or indices of those that are corrected; all by default. The others are copied.
    field_from : str, optional
        The channel whose field all are divided by.
    mask : path-like, optional
        See `pyramid.place_mask`; found in each channel by default.
    mask_method, percentile
        See `mask.find_foreground`.
    plane_gains : {"i", "j", "k"}, optional
        The axis along which single planes are levelled before all else, see `images.planes`.
    parameters : N4Parameters or mapping, optional
    device : {"auto", "gpu", "cpu"}
    level, level_voxels, offset, dtype, saturated, pyramid_origin, job_gb
        As config's ``zarr`` has them, see config/README.md.
    threads : int, optional
        All cores by default; the result does not depend on it.

    Raises
    ------
    InputError
        The store, the mask or a channel is unusable, the output is there, or something cannot be written.
    """
    if is_remote(output):
        raise InputError(output, "does not lie on this machine", "give a folder here")
    output = Path(output)
    if not is_store(output) or output.suffix != ".zarr":
        raise InputError(output, "is no name of an OME-Zarr folder", "give one that ends in .ome.zarr")
    image = read_image(store, pyramid_origin)
    here, there = output.resolve(), Path(store).resolve()
    if here in (there, *there.parents) or there in here.parents:
        raise InputError(output, "is the input, or lies in it", "give another place")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(output, "is there already", "remove it, or give another name")
    check_offset(offset, [image])
    wanted = list(channels) or list(map(str, range(image.channels)))
    indices = {name: image.channel_index(name) for name in wanted}
    source = image.channel_index(field_from) if field_from else None
    sidecar, fields = files_beside(output, indices.values() if source is None else [source])
    # the volumes that a field names as its sources are not kept
    sources = [source_uri(path, output) for path in (store, *([mask] if mask else []))]
    threads = threads or available_cores()
    with tempfile.TemporaryDirectory(prefix="n4flow_") as temporary:
        folder = Path(temporary)
        coarse: dict[int, Path] = {}
        estimated: dict[int, Path] = {}
        found: dict[int, Any] = {}
        masks: dict[int, Path] = {}
        for index in dict.fromkeys([*indices.values(), *fields]):
            place = folder / str(index)
            place.mkdir()
            coarse[index] = place / "coarse.json"
            coarse_scan(
                store,
                place / "coarse.nii.gz",
                coarse[index],
                channel=str(index) if image.channels > 1 else "",
                level=level,
                level_voxels=level_voxels,
                offset=offset,
                pyramid_origin=pyramid_origin,
            )
            if index not in fields:
                continue
            own = None
            if mask:
                own = place / "given.nii.gz"
                place_mask(place / "coarse.nii.gz", mask, own, pyramid_origin=pyramid_origin)
            inside = masks[index] = place / "mask.nii.gz"
            how: dict[str, Any] = {"method": mask_method, "percentile": percentile}
            mask_scan(place / "coarse.nii.gz", own, inside, place / "mask.json", **how, plane_gains=plane_gains)
            made = CorrectionFiles(place / "n4.nii.gz", place / "n4_SPIM.json", place / "field.json")
            correct_scan(
                place / "coarse.nii.gz",
                inside,
                made,
                parameters=parameters or {},
                device=device,
                threads=threads,
                plane_gains=plane_gains,
            )
            estimated[index] = made.field
            found[index] = {"Mask": {"Given": sources[1]} if mask else how, **read_json(made.sidecar)["N4"]}
        field_of = [index if source is None else source for index in indices.values()]
        common: dict[str, Any] = {
            "channels": {name: (index, None) for name, index in indices.items()},
            "coarse": [coarse[index] for index in indices.values()],
            "pyramid_origin": pyramid_origin,
        }
        notes = {"N4": {f"channel {index}": facts for index, facts in found.items()}}
        beside: list[Path] = []
        try:
            plan_store(store, output, folder / "plan.json", job_gb=job_gb, dtype=dtype, pyramid_origin=pyramid_origin)
            parts = []
            for number, each in enumerate(image.levels):
                for part in range(each.parts(job_gb)):
                    parts.append(folder / f"level-{number}_part-{part}.json")
                    divide_part(
                        store,
                        output,
                        folder / "plan.json",
                        parts[-1],
                        level=number,
                        part=part,
                        keep_saturated=saturated == "keep",
                        threads=threads,
                        fields=[estimated[index] for index in field_of],
                        **common,
                    )
            describe_store(
                store,
                parts,
                sidecar,
                notes=notes,
                fields=[fields[index] for index in field_of],
                masks=[masks[index] for index in field_of],
                **common,
            )
            beside.append(sidecar)
            for index, path in fields.items():
                save_field(load_field(estimated[index]), path, Sources=sources)
                beside.append(path)
            finish_store(store, output, sidecar, output / image.root, pyramid_origin=pyramid_origin)
        except BaseException:  # by hand, too: half a store is of no use
            shutil.rmtree(output, ignore_errors=True)
            for path in beside:
                path.unlink(missing_ok=True)
            raise
