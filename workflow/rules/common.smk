# What the rules share: the checked config and sample sheet, and input functions.
import os
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError

from n4flow.console import PARTICIPANTS
from n4flow.errors import InputError
from n4flow.images.files import voxels_of_frame
from n4flow.study.bids import CARRIED, CARRIED_WITH, beside_image, counted_beside
from n4flow.study.config import grid_combinations, load_schema, page_settings, problems_by_file
from n4flow.study.config import tune_problems, with_defaults
from n4flow.study.sheet import place_problem, read_sheet, results_problem, with_least_hash
from n4flow.parameters import MOST_SAMPLES, N4Parameters
from n4flow.study.failures import read_failed, rows_of_failed
from n4flow.study.outputs import NAMES, WILDCARDS, entities_pattern, output_of
from n4flow.study.provenance import package_digest
from n4flow.study.ratings import read_ratings

CONFIG_SCHEMA = load_schema(workflow.source_path("../schemas/config.schema.yaml"))
SHEET_SCHEMA = load_schema(workflow.source_path("../schemas/samples.schema.yaml"))

# Index, table and pages once more (as links, where the file system has them): what --report packs.
BUNDLE = "<results>/qc/bundle"

# In a job of a cluster Snakemake runs twice beside the script, with 140 MB each.
SNAKEMAKE_MB = 300

DEMO_ROOT = "resources/demo"
DEMO_ANAT = f"{DEMO_ROOT}/sub-{{subject}}/anat/sub-{{subject}}"
DEMO_IMAGES = expand(f"{DEMO_ANAT}_T1w.nii.gz", subject=["01", "02", "03", "04"])
DEMO_TRUTH = expand(
    f"{DEMO_ANAT}_desc-truth_{{what}}.nii.gz", subject=["01", "02", "03", "04"], what=["T1w", "biasfield"]
)
DEMO_MASK = f"{DEMO_ROOT}/sub-03/anat/sub-03_desc-brain_mask.nii.gz"


def shown(path):
    """A path as the user can open it: in full where the working directory is not the one that the command was given in."""
    return Path(os.path.abspath(path)) if workflow.overwrite_workdir else Path(path)


if problems := problems_by_file(config, CONFIG_SCHEMA, [*map(shown, workflow.configfiles)]):
    raise WorkflowError("\n".join(problems))
config.update(with_defaults(config, CONFIG_SCHEMA))

SHEET_FILE = shown(config["samples"])
try:
    # a workflow that imports this one for its rules alone has no sheet
    SHEET = read_sheet(SHEET_FILE, SHEET_SCHEMA, [*DEMO_IMAGES, DEMO_MASK]) if config["samples"] else []
except InputError as error:
    raise WorkflowError(str(error)) from None

for name in ("results", "logs", "benchmarks"):
    if problem := place_problem(name, workflow.pathvars.apply(f"<{name}>")):
        raise WorkflowError(problem)
if problem := results_problem(workflow.pathvars.apply("<results>"), SHEET):
    raise WorkflowError(problem)
if problems := tune_problems(config["tune"], SHEET):
    raise WorkflowError("\n".join(problems))

SCAN_OF = {scan.name: scan for scan in SHEET}

# By name, what failed in earlier runs and would fail again: it is in nobody's way, and made only where it is asked for.
FAILED_FILE = Path(workflow.pathvars.apply("<results>/qc/failed.tsv"))
try:
    FAILED = read_failed(FAILED_FILE, SCAN_OF, config, workflow.pathvars.apply("<logs>"))
    # Who stands there and is no longer in the sheet.
    GONE = {row["scan"] for row in rows_of_failed(FAILED_FILE)} - SCAN_OF.keys()
except InputError as error:
    raise WorkflowError(str(error)) from None
WITHOUT_REFERENCE = {name for name, failure in FAILED.items() if failure.step == "reference"}
SCANS = [scan for scan in SHEET if scan.name not in FAILED.keys() - WITHOUT_REFERENCE]

# The subjects that n4flow run --participant-label is for, if the sheet holds others: then nothing is made that is over all
# scans.
SUBJECTS = os.environ.get(PARTICIPANTS, "").split()
if {scan.subject for scan in SHEET} <= set(SUBJECTS):
    SUBJECTS = []


def chosen(scan):
    """Whether a run is for a scan."""
    return not SUBJECTS or scan.subject in SUBJECTS


CHOSEN = [scan for scan in SHEET if chosen(scan)]
# What is made of the scans, but for those that failed before.
DONE_NOW = {scan for scan in SCANS if chosen(scan)}

# Names of the scans that SimpleITK corrects too.
WITH_REFERENCE = with_least_hash([s.name for s in SHEET if not s.field_from], config["reference"]["scans"])
WITH_REFERENCE -= WITHOUT_REFERENCE

TUNED = [scan for scan in SCANS if scan.subject in config["tune"]["subjects"] and not scan.field_from]
# Those that SimpleITK corrects too: all that it can, as whom a dataset's own choice hits says nothing here.
TUNED_BESIDE = [s.name for s in TUNED if config["reference"]["scans"] and s.name not in WITHOUT_REFERENCE]
COMBINATIONS = grid_combinations(config["tune"]["grid"])
# What reviewers said, if they have.
RATINGS_FILE = config["qc"]["ratings"] or []
try:
    if RATINGS_FILE:
        read_ratings(RATINGS_FILE, known=SCAN_OF.__contains__)
except InputError as error:
    raise WorkflowError(str(error)) from None

# Paths of everything that is made of a scan, by role, with the wildcards of the rules.
OUTPUT = {role: f"<results>/{name}" for role, name in NAMES.items()}

# The outputs of n4, and of apply, which takes its place where the field is another scan's.
CORRECTION = {role: OUTPUT[role] for role in ("corrected", "sidecar", "field")}
if config["output"]["bias_field"]:
    CORRECTION["field_image"] = OUTPUT["field_image"]

PAGE = {role: OUTPUT[role] for role in ("page", "metrics", "pictures")}
if config["qc"]["viewer_mb"]:
    PAGE["viewer"] = OUTPUT["viewer"]


wildcard_constraints:
    **WILDCARDS,


def scan_of(wildcards):
    """The row of the sheet that a job works on."""
    name = f"{wildcards.entities}_{wildcards.suffix}"
    if name not in SCAN_OF:
        raise WorkflowError(f"{name}: no such scan in {SHEET_FILE}; add a line for it")
    return SCAN_OF[name]


def volume_of(scan):
    """What goes through the chain: the image, or the coarse volume of an OME-Zarr image."""
    return made_of(scan, "coarse") if scan.is_store else scan.image


def image_of(wildcards):
    return volume_of(scan_of(wildcards))


def own_mask_of(wildcards):
    """The mask that the sheet gives, if it gives one."""
    scan = scan_of(wildcards)
    if scan.mask and scan.is_store:  # on the grid of the coarse volume
        return made_of(scan, "given_mask")
    return scan.mask or []


def mask_image_of(wildcards):
    """The image that the mask is found on, if it is another one."""
    return scan_of(wildcards).mask_image or []


# asked for by each job of a scan
counted_beside = cache(counted_beside)


def beside_of(wildcards):
    return counted_beside(scan_of(wildcards))


def carried(scan):
    """What says what the frames of a scan are, and goes along with it: a list of its path, by role."""
    return {role: [str(path)] for role in CARRIED_WITH.get(scan.suffix, ()) if (path := beside_image(scan.image, role))}


def carried_of(wildcards):
    scan = scan_of(wildcards)
    role = next(role for role in CARRIED if made_of(scan, role).endswith(wildcards.end))
    return carried(scan)[role]


def weights_of(wildcards):
    """The confidence of each voxel, if the sheet gives it."""
    return scan_of(wildcards).weights or []


def source_field_of(wildcards):
    """The field that the scan is divided by: that of another scan."""
    return made_of(SCAN_OF[scan_of(wildcards).field_source], "field")


def made_of(scan, role):
    """Path of what is made of a scan."""
    return f"<results>/{output_of(scan, role)}"


def products(scan):
    """Everything that is made of a scan, by role."""
    roles = ["mask", "mask_sidecar", *CORRECTION, *PAGE, *carried(scan)]
    if scan.name in WITH_REFERENCE:
        roles += ["reference", "reference_sidecar", "reference_field"]
    if scan.is_store:
        roles += ["coarse", "coarse_sidecar"]
    return {role: made_of(scan, role) for role in roles} | STORE_FILES.get(scan.name, {})


def qc_inputs(wildcards):
    """What the page of a scan shows; SimpleITK's field for the scans that have one."""
    scan = scan_of(wildcards)
    made = products(scan)
    shown = ("mask", "mask_sidecar", "corrected", "sidecar", "field", "reference_field", "reference_sidecar")
    of_scan = {"image": volume_of(scan), "beside": beside_of(wildcards)}
    return of_scan | {role: made[role] for role in shown if role in made}


def memory_mb(baseline, per_voxel, per_sample=0):
    """Memory of a job: a baseline, and so many bytes for each voxel of the image (of the largest).

    `per_sample` counts for each voxel that is a sample: for fewer where n4.shrink_factor thins them out. Memory
    grows with each attempt, for executors that end a job that exceeds it.
    """
    thinned = N4Parameters.from_mapping(config["n4"]).shrink_factor

    def resource(wildcards, input, attempt):
        # of the coarse volume of an OME-Zarr image no more is known before it is made
        most = config["zarr"]["level_voxels"] if STORES else 0
        voxels = max(voxels_of_frame(path) or most for path in input.get("images") or [input.image])
        samples = voxels / thinned**3 if thinned else min(voxels, MOST_SAMPLES)
        return int(SNAKEMAKE_MB + baseline + (per_voxel * voxels + per_sample * samples) / 1e6) * attempt

    return resource
