"""OME-Zarr images for tests: small light-sheet-like stores with a known field, in every layout."""

import json

import numpy as np
import zarr


def sheet_volume(shape=(48, 80, 96), seed=0, top=3000.0):
    """A lens-shaped sample (z, y, x) of three intensities times a smooth field, with noise; and that field's log."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    texture = np.sin(7 * x + 2 * y) * np.cos(6 * y - 3 * z) * np.sin(5 * z + x)
    tissue = np.select([texture < -0.2, texture < 0.3], [0.7, 0.45], 1.0) * (radius < 0.9)
    log_bias = 0.25 * x - 0.2 * y + 0.15 * z - 0.2 * x * y
    values = top * tissue * np.exp(log_bias) + rng.normal(0, 0.01 * top, shape)
    return values.clip(0), log_bias


def binned(values, factors=(2, 2, 2)):
    """Averages of so many voxels along each space axis; what is left over at the end is left out."""
    for axis, factor in zip((-3, -2, -1), factors, strict=True):
        n = values.shape[axis] // factor * factor
        values = np.take(values, range(n), axis=axis)
        shape = list(values.shape)
        shape[axis : axis + 1 or None] = [n // factor, factor]
        split = np.moveaxis(values, axis, -1)
        values = np.moveaxis(split.reshape(*split.shape[:-1], n // factor, factor).mean(axis=-1), -1, axis)
    return values


def write_store(
    path,
    levels,
    *,
    version="0.5",
    axes="zyx",
    scale_um=(4.0, 4.0, 4.0),
    factors=(2, 2, 2),
    unit="micrometer",
    chunks=(32, 32, 32),
    shards=None,
    labels=(),
    translations=True,
    kind=None,
    root=True,
    **array,
):
    """Write levels (arrays, finest first) as an OME-Zarr image."""
    path.mkdir(parents=True, exist_ok=True)
    zarr_format = {"0.4": 2, "0.5": 3}[version]
    datasets = []
    extra = len(axes) - 3
    for number, values in enumerate(levels):
        options = dict(array)
        full = (1,) * extra + tuple(chunks)
        if shards and version == "0.5":
            options["shards"] = (1,) * extra + tuple(shards)
        if version == "0.5":
            options["dimension_names"] = list(axes)
        else:
            options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
        made = zarr.create_array(
            str(path / str(number)),
            shape=values.shape,
            dtype=options.pop("dtype", values.dtype),
            chunks=full if shards else tuple(min(c, n) for c, n in zip(full, values.shape, strict=True)),
            zarr_format=zarr_format,
            **options,
        )
        made[...] = values
        scale = [s * f**number for s, f in zip(scale_um, factors, strict=True)]
        steps = [{"type": "scale", "scale": [1.0] * extra + scale}]
        if translations:
            moved = [(a - b) / 2 for a, b in zip(scale, scale_um, strict=True)]
            steps.append({"type": "translation", "translation": [0.0] * extra + moved})
        datasets.append({"path": str(number), "coordinateTransformations": steps})
    types = {"t": "time", "c": "channel"}
    described = [{"name": name, "type": types.get(name, "space")} for name in axes]
    for axis in described:
        if axis["type"] == "space" and unit:
            axis["unit"] = unit
    multiscale = {"axes": described, "datasets": datasets, "name": "sample"}
    if kind:
        multiscale["type"] = kind
    ome = {"multiscales": [multiscale]}
    if labels:
        window = {"min": 0, "max": 65535, "start": 0, "end": 4000}
        ome["omero"] = {"channels": [{"label": label, "color": "FFFFFF", "window": window} for label in labels]}
    if not root:
        return path
    if version == "0.5":
        content = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"version": "0.5", **ome}}}
        (path / "zarr.json").write_text(json.dumps(content))
    else:
        multiscale["version"] = "0.4"
        (path / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
        (path / ".zattrs").write_text(json.dumps(ome))
    return path
