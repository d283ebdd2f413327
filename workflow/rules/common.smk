# What the rules share: the package, the checked config and sample sheet, and input functions.
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from snakemake.exceptions import WorkflowError

# Every file of the package, by name: Snakemake fetches what is named where the workflow is a module from elsewhere.
PACKAGE_FILES = Path(workflow.source_path("../scripts/n4flow/files.txt")).read_text(encoding="utf-8").split()
PACKAGE = [Path(workflow.source_path(f"../scripts/n4flow/{name}")) for name in PACKAGE_FILES]
sys.path.insert(0, str(PACKAGE[0].parent.parent))

from n4flow.worker import begin_run
from n4flow.errors import InputError
from n4flow.images.files import header_file, remove_abandoned, voxels_of_frame, why_not_writable
from n4flow.study.bids import CARRIED, CARRIED_WITH, beside_image
from n4flow.study.config import config_problems, grid_combinations, load_schema, tune_problems, with_defaults
from n4flow.study.sheet import place_problem, read_sheet, results_problem, with_least_hash
from n4flow.parameters import MOST_SAMPLES, N4Parameters
from n4flow.study.failures import failed_scans
from n4flow.study.outputs import NAMES, WILDCARDS, entities_pattern, output_of
from n4flow.study.provenance import package_digest
from n4flow.study.ratings import read_ratings

CONFIG_SCHEMA = load_schema(workflow.source_path("../schemas/config.schema.yaml"))
SHEET_SCHEMA = load_schema(workflow.source_path("../schemas/samples.schema.yaml"))

# Index, table and pages once more (as links, where the file system has them): what --report packs.
BUNDLE = "<results>/qc/bundle"

RUN_START = time.time()

# The jobs of this run have this copy of the package, and a worker that ends with this process.
begin_run()

# In a job of a cluster Snakemake runs twice beside the script, with 140 MB each.
SNAKEMAKE_MB = 300

DEMO_ROOT = "resources/demo"
DEMO_ANAT = f"{DEMO_ROOT}/sub-{{subject}}/anat/sub-{{subject}}"
DEMO_IMAGES = expand(f"{DEMO_ANAT}_T1w.nii.gz", subject=["01", "02", "03", "04"])
DEMO_TRUTH = expand(
    f"{DEMO_ANAT}_desc-truth_{{what}}.nii.gz", subject=["01", "02", "03", "04"], what=["T1w", "biasfield"]
)
DEMO_MASK = f"{DEMO_ROOT}/sub-03/anat/sub-03_desc-brain_mask.nii.gz"

if problems := config_problems(config, CONFIG_SCHEMA):
    raise WorkflowError("\n".join(problems))
config.update(with_defaults(config, CONFIG_SCHEMA))

try:
    # a workflow that imports this one for its rules alone has no sheet
    SCANS = read_sheet(config["samples"], SHEET_SCHEMA, [*DEMO_IMAGES, DEMO_MASK]) if config["samples"] else []
except InputError as error:
    raise WorkflowError(str(error)) from None

for name in ("results", "logs", "benchmarks"):
    if problem := place_problem(name, workflow.pathvars.apply(f"<{name}>")):
        raise WorkflowError(problem)
if problem := results_problem(workflow.pathvars.apply("<results>"), SCANS):
    raise WorkflowError(problem)
if problems := tune_problems(config["tune"], SCANS):
    raise WorkflowError("\n".join(problems))

SCAN_OF = {scan.name: scan for scan in SCANS}

# Names of the scans that SimpleITK corrects too.
WITH_REFERENCE = with_least_hash([s.name for s in SCANS if not s.field_from], config["reference"]["scans"])

TUNED = [scan for scan in SCANS if scan.subject in config["tune"]["subjects"] and not scan.field_from]
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
        raise WorkflowError(f"{name}: no such scan in {config['samples']}; add a line for it")
    return SCAN_OF[name]


def page_settings():
    """Config of the pages: what of qc does not concern the index alone."""
    limits = {name: limit for name, limit in config["qc"]["flags"].items() if name != "outlier_z"}
    return {key: config["qc"][key] for key in ("field_window_log", "viewer_mb")} | {"flags": limits}


def image_of(wildcards):
    return scan_of(wildcards).image


def own_mask_of(wildcards):
    """The mask that the sheet gives, if it gives one."""
    return scan_of(wildcards).mask or []


def mask_image_of(wildcards):
    """The image that the mask is found on, if it is another one."""
    return scan_of(wildcards).mask_image or []


def beside_of(wildcards):
    """Files whose change counts as one of what the row names: headers apart from their voxels, b values."""
    scan = scan_of(wildcards)
    return [str(header_file(path)) for path in scan.paths if path.endswith(".img")] + carried(scan).get("bval", [])


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
    return {role: made_of(scan, role) for role in roles}


def qc_inputs(wildcards):
    """What the page of a scan shows; SimpleITK's field for the scans that have one."""
    scan = scan_of(wildcards)
    made = products(scan)
    shown = ("mask", "mask_sidecar", "corrected", "sidecar", "field", "reference_field", "reference_sidecar")
    of_scan = {"image": scan.image, "beside": beside_of(wildcards)}
    return of_scan | {role: made[role] for role in shown if role in made}


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
        "images": [scan.image for scan in TUNED],
        "masks": [made_of(scan, "mask") for scan in TUNED],
        # of all of them: whom a dataset's own choice hits says nothing here
        "references": [made_of(scan, "reference_field") for scan in TUNED if config["reference"]["scans"]],
        "corrected": of_all("corrected.nii.gz"),
        "sidecars": of_all("corrected.json"),
        "fields": of_all("biasfield.json"),
    }


def memory_mb(baseline, per_voxel, per_sample=0):
    """Memory of a job: a baseline, and so many bytes for each voxel of the image (of the largest).

    `per_sample` counts for each voxel that is a sample: for fewer where n4.shrink_factor thins them out. Memory
    grows with each attempt, for executors that end a job that exceeds it.
    """
    thinned = N4Parameters.from_mapping(config["n4"]).shrink_factor

    def resource(wildcards, input, attempt):
        voxels = max(map(voxels_of_frame, input.get("images") or [input.image]))
        samples = voxels / thinned**3 if thinned else min(voxels, MOST_SAMPLES)
        return int(SNAKEMAKE_MB + baseline + (per_voxel * voxels + per_sample * samples) / 1e6) * attempt

    return resource


def jobs_on_gpu():
    """Jobs of this run whose rule asks for a GPU (a job's own resources are not known before its input is)."""
    return [job for job in workflow.dag.needrun_jobs() if "gpu" in job.rule.resources]


def check_places():
    """Before the first job, and so before Snakemake removes what is to be made anew: can be written, is there a GPU?

    What a run that was killed left half-written is removed.
    """
    places = [*map(workflow.pathvars.apply, ("<results>", "<logs>", "<benchmarks>"))]
    for place in places:
        remove_abandoned(place)
    # a folder in them may be another user's, of a container say
    made = (os.path.dirname(path) for job in workflow.dag.needrun_jobs() for path in job.output)
    unwritable = {}
    for place in dict.fromkeys([*places, *made]):
        if problem := why_not_writable(place):
            unwritable.setdefault(problem, place)
    where = {place: " (pathvars in the config)" for place in places}
    problems = [f"{problem}: {place} is to be there{where.get(place, '')}" for problem, place in unwritable.items()]
    # a cluster's login node has no GPU, nor has Snakemake's own environment CuPy where the rules have theirs
    may_ask = workflow.local_exec and not workflow.deployment_settings.deployment_method
    if config["device"] == "gpu" and workflow.global_resources["gpu"] != 0 and may_ask and jobs_on_gpu():
        # in a process of its own: who asks holds some of the GPU's memory until it ends
        ask = "from n4flow.device import select_device; select_device('gpu')"
        done = subprocess.run([sys.executable, "-c", ask], stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            problems.append(done.stderr.strip().rpartition("InputError: ")[2])
    if problems:
        raise WorkflowError("\n".join(problems))


def report_failures():
    """After a run that failed: the index over the scans that are done, with the failed ones named."""
    place = lambda path: Path(workflow.pathvars.apply(path))
    failed = failed_scans(SCANS, place("<logs>"), place("<results>"), since=RUN_START)
    if not failed:  # of no scan: the rule's own line says all
        return
    done = [
        place(made_of(scan, "metrics"))
        for scan in SCANS
        if scan.name not in failed and all(place(made_of(scan, role)).is_file() for role in ("metrics", "corrected"))
    ]
    qc = place("<results>/qc")
    try:
        from n4flow.qc.dataset import make_index

        qc.mkdir(parents=True, exist_ok=True)
        make_index(
            done,
            qc / "index.html",
            qc / "metrics.tsv",
            failed=list(failed.items()),
            ratings=RATINGS_FILE or None,
            outlier_z=config["qc"]["flags"]["outlier_z"],
            limits=page_settings()["flags"],
            groups={scan.name: dict(scan.groups) for scan in SCANS},
        )
    # the workflow's own environment need not hold the QC's packages; a disk may be full
    except (ImportError, InputError) as error:
        logger.error(f"No index over the scans that are done: {error}")
    else:
        logger.error(f"{len(done)} of {len(SCANS)} scans are done, {len(failed)} failed: see {qc / 'index.html'}")
    # without it the rule index is not done, and makes the index anew when all scans are
    shutil.rmtree(place(BUNDLE), ignore_errors=True)
    for name, error in failed.items():
        logger.error(f"{name}: {error}")
