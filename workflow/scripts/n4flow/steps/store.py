"""One OME-Zarr image on one machine, from store to store: the steps of the workflow, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from n4flow.device import DeviceChoice, available_cores
from n4flow.errors import InputError
from n4flow.images.ngff import is_store, read_image
from n4flow.parameters import N4Parameters
from n4flow.steps.correct import correct_scan
from n4flow.steps.derivatives import CorrectionFiles
from n4flow.steps.mask import MaskMethod, mask_scan
from n4flow.steps.pyramid import coarse_scan, describe_store, divide_part, finish_store, place_mask, plan_store
from n4flow.study.stores import check_offset


def correct_store(
    store: str | Path,
    output: str | Path,
    *,
    channels: Sequence[str] = (),
    field_from: str = "",
    mask: str | Path | None = None,
    mask_method: MaskMethod = "otsu",
    percentile: float = 50.0,
    parameters: N4Parameters | Mapping[str, Any] | None = None,
    device: DeviceChoice = "auto",
    level: int | str = "auto",
    level_voxels: int = 16_000_000,
    offset: float | str | Mapping[str, float | str] = 0.0,
    dtype: str = "same",
    saturated: str = "keep",
    pyramid_origin: str = "auto",
    threads: int | None = None,
) -> None:
    """Estimate the field of each channel of an OME-Zarr image, and write the image divided by it.

    Beside the output lie its sidecar (``out.json``) and a field for each channel (``out_channel-0_biasfield.json``).

    Parameters
    ----------
    store, output : path-like
        ``.ome.zarr``; the output is a folder, of the version of NGFF of the input, and is replaced if it is there.
    channels : sequence of str
        Labels or indices of those that are corrected; all by default. The others are copied.
    field_from : str, optional
        The channel whose field all are divided by.
    mask : path-like, optional
        See `pyramid.place_mask`; found in each channel by default.
    mask_method, percentile
        See `mask.find_foreground`.
    parameters : N4Parameters or mapping, optional
    device : {"auto", "gpu", "cpu"}
    level, level_voxels, offset, dtype, saturated, pyramid_origin
        As config's ``zarr`` has them, see config/README.md.
    threads : int, optional
        All cores by default; the result does not depend on it.

    Raises
    ------
    InputError
        The store, the mask or a channel is unusable, or something cannot be written.
    """
    output = Path(output)
    if not is_store(output) or output.suffix != ".zarr":
        raise InputError(output, "is no name of an OME-Zarr folder", "give one that ends in .ome.zarr")
    image = read_image(store, pyramid_origin)
    if output.resolve() in (place := Path(store).resolve(), *place.parents) or place in output.resolve().parents:
        raise InputError(output, "is the input, or lies in it", "give another place")
    check_offset(offset, [image])
    threads = threads or available_cores()
    wanted = list(channels) or list(map(str, range(image.channels)))
    indices = {name: image.channel_index(name) for name in wanted}
    source = image.channel_index(field_from) if field_from else None
    stem = output.name.removesuffix(".zarr").removesuffix(".ome")
    fields: dict[int, Path] = {}
    with tempfile.TemporaryDirectory(prefix="n4flow_") as folder:
        coarse: dict[int, Path] = {}
        for index in dict.fromkeys([*indices.values(), *([] if source is None else [source])]):
            place = Path(folder, str(index))
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
            if source not in (None, index):
                continue
            own = None
            if mask:
                own = place / "given.nii.gz"
                place_mask(place / "coarse.nii.gz", mask, own)
            found = place / "mask.nii.gz"
            how: dict[str, Any] = {"method": mask_method, "percentile": percentile}
            mask_scan(place / "coarse.nii.gz", own, found, place / "mask.json", **how)
            fields[index] = output.with_name(f"{stem}_channel-{index}_biasfield.json")
            correct_scan(
                place / "coarse.nii.gz",
                found,
                CorrectionFiles(place / "n4.nii.gz", place / "n4_SPIM.json", fields[index]),
                parameters=parameters or {},
                device=device,
                threads=threads,
            )
        plan = Path(folder, "plan.json")
        plan_store(store, output, plan, job_gb=64.0, dtype=dtype, pyramid_origin=pyramid_origin)
        common: dict[str, Any] = {
            "channels": indices,
            "fields": [fields[index if source is None else source] for index in indices.values()],
            "coarse": [coarse[index] for index in indices.values()],
            "pyramid_origin": pyramid_origin,
        }
        parts = []
        for number, each in enumerate(image.levels):
            for part in range(each.parts(64.0)):
                parts.append(Path(folder, f"level-{number}_part-{part}.json"))
                divide_part(
                    store,
                    output,
                    plan,
                    parts[-1],
                    level=number,
                    part=part,
                    keep_saturated=saturated == "keep",
                    threads=threads,
                    **common,
                )
        sidecar = output.with_name(f"{stem}.json")
        describe_store(store, parts, sidecar, **common)
        finish_store(store, sidecar, output / image.root, pyramid_origin=pyramid_origin)
