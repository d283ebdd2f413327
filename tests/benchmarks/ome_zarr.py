"""What an OME-Zarr image costs beside a plain copy: the section "OME-Zarr" of RESULTS.md.

    python tests/benchmarks/ome_zarr.py --gb 1 8 [--folder FOLDER]

Makes stores like a light-sheet microscope's (uint16, blosc with zstd 5) in two layouts: chunks of 128 voxels along an
edge in NGFF 0.4, shards of 256 in 0.5. Each step is done in a process of its own: a copy of level 0 through zarr, the
same units divided, the read of the coarse level, and that as a volume. CPU time is user and system time; memory is the
largest resident set of the process, less that of one which has imported the same and done nothing.

    python tests/benchmarks/ome_zarr.py --plan 1000

Times how long Snakemake takes to plan a store of so many GB, of which there is the metadata alone.

    python tests/benchmarks/ome_zarr.py --picture workflow/report/crops.webp

Corrects a simulated light-sheet image, and draws the picture of README.md.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numcodecs
import numpy as np
import zarr

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "workflow" / "scripts"), str(REPOSITORY)]

from n4flow.core.field import BiasField, Mesh  # noqa: E402
from n4flow.images.arrays import ChannelDivision, divide_units, open_level, read_coarse  # noqa: E402
from n4flow.images.ngff import choose_coarse, read_image  # noqa: E402
from n4flow.qc.crops import draw_crops  # noqa: E402
from n4flow.steps.correct import correct_scan  # noqa: E402
from n4flow.steps.derivatives import CorrectionFiles  # noqa: E402
from n4flow.steps.mask import mask_scan  # noqa: E402
from n4flow.steps.pyramid import coarse_scan, describe_store, divide_part, finish_store, plan_store  # noqa: E402
from tests.phantoms import light_sheet  # noqa: E402
from tests.pyramids import binned, write_store  # noqa: E402

LAYOUTS = {
    "0.4, chunks of 128³": {
        "version": "0.4",
        "chunks": (128, 128, 128),
        "compressors": numcodecs.Blosc(cname="zstd", clevel=5, shuffle=1),
    },
    "0.5, shards of 256³": {
        "version": "0.5",
        "chunks": (64, 64, 64),
        "shards": (256, 256, 256),
        "compressors": zarr.codecs.BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=2),
    },
}
THREADS, REPEATS = 1, 5


def brick(edge=256, seed=0):
    """A cube of an object's texture with noise of a camera."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(0, 6, edge, dtype=np.float32)] * 3, indexing="ij", sparse=True)
    texture = np.sin(axes[0] + 2 * axes[1]) * np.cos(axes[1] - axes[2]) * np.sin(axes[2] + axes[0])
    return (800 + 500 * texture + rng.normal(0, 40, texture.shape)).astype(np.uint16)


def make(path, gb, layout):
    """A store of so many GB at level 0, whose levels are halved until one has 16 million voxels or fewer."""
    edge = 256
    bricks = max(1, round(gb * 1e9 / 2 / edge**3))
    counts = [1, 1, 1]
    while np.prod(counts) < bricks:
        counts[int(np.argmin(counts))] += 1
    shape = [edge * n for n in counts]
    levels = []
    while True:
        levels.append(shape)
        if np.prod(shape) <= 16e6:
            break
        shape = [n // 2 for n in shape]
    empty = [np.broadcast_to(np.uint16(0), shape) for shape in levels]
    write_store(path, empty, scale_um=(2, 2, 2), **LAYOUTS[layout])
    first = brick(edge)
    for number in range(len(levels)):
        array = zarr.open_array(path / str(number), mode="r+")
        here = binned(first, (2**number,) * 3).astype(np.uint16)
        n = edge >> number
        for place in np.ndindex(*counts):
            array[tuple(slice(p * n, (p + 1) * n) for p in place)] = here
    return path


def a_field(image):
    """A field of seven control points along each axis over the whole of an image."""
    shape, affine = image.grid(image.levels[-1])
    lattice = np.random.default_rng(0).normal(0, 0.1, (7, 7, 7))
    return BiasField(lattice, Mesh.of_grid(shape, (4, 4, 4)), shape, np.array(affine))


def nothing(store, target, threads):
    read_image(store)


def copy(store, target, threads):
    image = read_image(store)
    level = image.levels[0]
    with zarr.config.set({"threading.max_workers": threads}):
        source, out = open_level(image, level), zarr.open_array(target / level.path, mode="r+")
        for place in np.ndindex(*level.unit_grid):
            region = tuple(
                slice(a * n, min((a + 1) * n, m)) for a, n, m in zip(place, level.unit, level.shape, strict=True)
            )
            out[region] = source[region]


def divide(store, target, threads):
    image = read_image(store)
    level = image.levels[0]
    shape, affine = image.grid(level)
    field = a_field(image).on_grid(shape, np.array(affine))
    units = range(int(np.prod(level.unit_grid)))
    divide_units(image, level, target / level.path, {(0, None): ChannelDivision(field)}, units, threads=threads)


def read(store, target, threads):
    image = read_image(store)
    chosen = choose_coarse(image, "auto", 16_000_000)
    open_level(image, image.levels[chosen.level])[...]


def coarse(store, target, threads):
    image = read_image(store)
    chosen = choose_coarse(image, "auto", 16_000_000)
    read_coarse(image, image.levels[chosen.level], chosen.factors, 0, None, 0.0)


def measured(step, *arguments):
    """Wall time in s, CPU time in s and memory in MB of a step, in a process of its own."""

    def run(connection):
        start = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_SELF)
        step(*arguments)
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        connection.send((time.perf_counter() - start, cpu, after.ru_maxrss / 1024))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=run, args=(theirs,))
    process.start()
    result = ours.recv()
    process.join()
    return result


def table(gbs, folder):
    """A row for each size and layout."""
    print("| store | copy, CPU s/GB | divide, CPU s/GB | ÷ copy | ns a voxel beside it | memory, MB ", end="")
    print("| coarse ÷ read | its memory, MB |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
    for gb in gbs:
        for layout in LAYOUTS:
            store, target = folder / "in.ome.zarr", folder / "out.ome.zarr"
            measured(make, store, gb, layout)
            image = read_image(store)
            size = np.prod(image.levels[0].shape) * 2 / 1e9
            plan = {"job_gb": 64, "dtype": "same", "pyramid_origin": "auto"}
            _, _, base = measured(nothing, store, target, THREADS)
            plan_store(store, target, folder / "plan.json", **plan)
            _, copied, _ = measured(copy, store, target, THREADS)
            shutil.rmtree(target)
            plan_store(store, target, folder / "plan.json", **plan)
            wall, divided, memory = measured(divide, store, target, THREADS)
            # tenths of a second: the least of some counts
            reading, making = (
                min(measured(step, store, target, THREADS)[1] for _ in range(REPEATS)) for step in (read, coarse)
            )
            _, _, coarse_memory = measured(coarse, store, target, THREADS)
            level = image.levels[choose_coarse(image, "auto", 16_000_000).level]
            beside = (divided - copied) / (size / 2) if size else 0
            print(
                f"| {size:.2g} GB, {layout} | {copied / size:.1f} | {divided / size:.1f} | {divided / copied:.2f} "
                f"| {beside:.1f} | {memory - base:.0f} (unit {image.levels[0].unit_bytes / 1e6:.0f}) "
                f"| {making / reading:.2f} | {coarse_memory - base:.0f} (level {image.voxels(level) * 2 / 1e6:.0f}) |",
                flush=True,
            )
            print(f"  wall {wall:.0f} s of divide; level read in {reading:.1f} s", file=sys.stderr)
            shutil.rmtree(store)
            shutil.rmtree(target)


def plan(gb, folder):
    """Seconds that Snakemake takes to plan a store of so many GB."""
    edge = round((gb * 1e9 / 2) ** (1 / 3) / 256) * 256
    shapes = [edge]
    while shapes[-1] ** 3 > 16e6:
        shapes.append(shapes[-1] // 2)
    small = [np.zeros((1, 1, 1), np.uint16)] * len(shapes)
    store = write_store(
        folder / "raw/big.ome.zarr", small, scale_um=(1, 1, 1), chunks=(64, 64, 64), shards=(256, 256, 256)
    )
    for number, n in enumerate(shapes):
        file = store / f"{number}/zarr.json"
        array = json.loads(file.read_text())
        array["shape"] = [n] * 3
        file.write_text(json.dumps(array))
    (folder / "config").mkdir()
    shutil.copy(REPOSITORY / "config/config.yaml", folder / "config")
    (folder / "config/samples.tsv").write_text("subject\timage\n01\traw/big.ome.zarr\n")
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "-s",
        REPOSITORY / "Snakefile",
        "--directory",
        folder,
        "--cores",
        "2",
        "-n",
    ]
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    jobs = next((line.split()[1] for line in done.stdout.splitlines() if line.startswith("divide")), "?")
    wall = time.perf_counter() - start
    print(f"{edge**3 * 2 / 1e12:.2g} TB: {jobs} jobs divide it, planned in {wall:.1f} s (CPU {cpu:.1f} s)")


def picture(output, folder):
    """Crops of a simulated image before and after, as on the page of a scan."""
    scan = light_sheet(1, 0.24, 1)
    levels = [np.rint(values.T).astype(np.uint16) for values in (scan.image, binned(scan.image))]
    store, target = (
        write_store(folder / "a.ome.zarr", levels, scale_um=(40, 40, 40), chunks=(64, 64, 64)),
        folder / "out",
    )
    names = {
        name: folder / name for name in ("c.nii.gz", "c.json", "m.nii.gz", "m.json", "n.nii.gz", "n.json", "f.json")
    }
    coarse, told, mask, mask_told, corrected, sidecar, field = names.values()
    settings = {"level": 1, "level_voxels": 16_000_000, "offset": 0, "pyramid_origin": "auto"}
    coarse_scan(store, coarse, told, channel="", **settings)
    mask_scan(coarse, None, mask, mask_told, method="otsu", percentile=50)
    correct_scan(coarse, mask, CorrectionFiles(corrected, sidecar, field), parameters={}, device="cpu")
    job_gb = levels[0].nbytes / 4e9
    plan_store(store, target, folder / "plan.json", job_gb=job_gb, dtype="same", pyramid_origin="auto")
    common = {"channels": {"a": (0, None)}, "fields": [field], "coarse": [told], "pyramid_origin": "auto"}
    image, parts = read_image(store), []
    for number, level in enumerate(image.levels):
        for part in range(level.parts(job_gb)):
            parts.append(folder / f"level-{number}_part-{part}.json")
            places = {"level": number, "part": part, "keep_saturated": True}
            divide_part(store, target, folder / "plan.json", parts[-1], **places, **common)
    describe_store(store, parts, folder / "out.json", masks=[mask], **common)
    finish_store(store, target, folder / "out.json", target / image.root, pyramid_origin="auto")
    draw_crops(
        store, target, folder / "plan.json", mask, told, folder / "out.json", output, channel="", pyramid_origin="auto"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, nargs="+", default=[1.0])
    parser.add_argument("--plan", type=float, metavar="GB")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    parser.add_argument("--folder", type=Path, default=None, help="where the stores lie; a temporary one by default")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        if given.picture:
            picture(given.picture, Path(folder))
        elif given.plan:
            plan(given.plan, Path(folder))
        else:
            table(given.gb, Path(folder))


if __name__ == "__main__":
    main()
