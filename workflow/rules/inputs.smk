# Which rows are channels of one OME-Zarr image, and input functions of single steps: of what divides these (zarr.smk), and of
# what compares settings (tune.smk). No rules.
from n4flow.images.ngff import file_of, files_of
from n4flow.images.remote import is_remote
from n4flow.study.outputs import STORE_NAMES, store_output
from n4flow.study.stores import check_offset, check_write_to, metadata_digest, stores_of

# Where corrected stores are written, if not into the results; what is declared then is a copy of their root metadata.
WRITE_TO = config["zarr"]["write_to"].rstrip("/")
ROOT = "finished" if WRITE_TO else "root"


# asked for by every part of a store
files_of = cache(files_of)


@cache
def metadata_of(path):
    """What a job depends on in place of files, if the store does not lie on this machine."""
    return metadata_digest(path, config["zarr"]["pyramid_origin"])


try:
    STORES = stores_of(SHEET, config["zarr"]["pyramid_origin"], config["zarr"]["other_channels"])
    read = {scan for store in STORES for scan in store.scans}
    damaged = [scan.image for scan in SHEET if scan.is_store and scan not in read]
    check_offset(config["zarr"]["offset"], [store.image for store in STORES], damaged)
    check_write_to(WRITE_TO, [store.image for store in STORES])
    for store in STORES if WRITE_TO else []:
        before = Path(workflow.pathvars.apply(f"<results>/{store_output(store, 'root')}"))
        if before.exists():
            raise InputError(
                before, "is from before zarr.write_to was set, and would stay as it is", "remove the store"
            )
    for scan in SHEET:
        metadata_of(scan.mask)  # in time for a line of its own, if it cannot be reached
except InputError as error:
    raise WorkflowError(str(error)) from None

# What is written for the OME-Zarr image of a scan: the sidecar, the root metadata, by which it is complete, and crops for the
# scan's page.
STORE_FILES = {
    scan.name: {
        "store_sidecar": f"<results>/{store_output(store, 'store_sidecar')}",
        "store": f"<results>/{store_output(store, ROOT)}",
        "crops": f"<results>/{output_of(scan, 'crops')}",
    }
    for store in STORES
    for scan in store.scans
}

STORE_OUTPUT = {role: f"<results>/{name}" for role, name in STORE_NAMES.items()}
STORE_OF = {(store.folder, store.name): store for store in STORES}
STORE_OF_SCAN = {scan.name: store for store in STORES for scan in store.scans}


def store_of(wildcards):
    """The store that a job works on."""
    key = (wildcards.folder, f"{wildcards.entities}_{wildcards.suffix}")
    if key not in STORE_OF:
        raise WorkflowError(f"{key[1]}: no such OME-Zarr image in {SHEET_FILE}; add a line for it")
    return STORE_OF[key]


def parts_of(store):
    """What is seen of each part of each level."""
    return [
        f"<results>/{store_output(store, 'part', level=number, part=part)}"
        for number, level in enumerate(store.image.levels)
        for part in range(level.parts(config["zarr"]["job_gb"]))
    ]


def target_of(wildcards):
    """Folder of the corrected store."""
    return target_of_store(store_of(wildcards))


def target_of_store(store):
    return f"{WRITE_TO or workflow.pathvars.apply('<results>')}/{store_output(store, 'store')}"


def fields_of(wildcards):
    """By what its channels are divided, and what the coarse volumes say of them."""
    scans = store_of(wildcards).scans
    return {
        "fields": [made_of(SCAN_OF[scan.field_source], "field") for scan in scans],
        "coarse": [made_of(scan, "coarse_sidecar") for scan in scans],
    }


def crops_inputs(wildcards):
    """The image and its coarse volume, which tells where the mask lies."""
    scan = scan_of(wildcards)
    store = STORE_OF_SCAN[scan.name]
    return {
        "store": STORE_FILES[scan.name]["store"],
        "plan": f"<results>/{store_output(store, 'plan')}",
        "mask": made_of(scan, "mask"),
        "sidecar": made_of(scan, "coarse_sidecar"),
        "told": STORE_FILES[scan.name]["store_sidecar"],
    }


def crops_of(wildcards):
    """Where the crops for the page of a scan will be, if it is a channel of an OME-Zarr image."""
    scan = scan_of(wildcards)
    return workflow.pathvars.apply(made_of(scan, "crops")) if scan.name in STORE_FILES else None


def divide_mb(wildcards, attempt, threads):
    level = store_of(wildcards).image.levels[int(wildcards.level)]
    return int(SNAKEMAKE_MB + 400 + threads * 5 * level.unit_bytes / 1e6) * attempt


def divide_minutes(wildcards, attempt, threads):
    """By a minute for each GB of a core, which is twice what was measured."""
    level = store_of(wildcards).image.levels[int(wildcards.level)]
    share = level.units_per_part(config["zarr"]["job_gb"]) * level.unit_bytes / 1e9
    return int(15 + share / threads) * attempt


def tune_settings(wildcards):
    """The keys of n4 that a combination means."""
    if wildcards.combination not in COMBINATIONS:
        raise WorkflowError(f"{wildcards.combination}: no such combination in config's tune.grid; name the target tune")
    return config["n4"] | COMBINATIONS[wildcards.combination]


def tune_inputs(wildcards):
    """What the page shows: scan by scan, and of each scan every combination."""
    if not TUNED:
        raise WorkflowError("tune: there is nothing to compare; give tune.subjects and tune.grid, see config/README.md")
    of_all = lambda name: [
        f"<results>/tune/{scan.folder}/{scan.name}/{combination}/{name}"
        for scan in TUNED
        for combination in COMBINATIONS
    ]
    return {
        "images": [volume_of(scan) for scan in TUNED],
        "masks": [made_of(scan, "mask") for scan in TUNED],
        "references": [made_of(SCAN_OF[name], "reference_field") for name in TUNED_BESIDE],
        "corrected": of_all("corrected.nii.gz"),
        "sidecars": of_all("corrected.json"),
        "fields": of_all("biasfield.json"),
    }
