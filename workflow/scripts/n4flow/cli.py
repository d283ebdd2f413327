"""The command n4flow: what is typed becomes a call of the workflow's own steps, or a run of the workflow.

Whatever takes time to load is imported where it is used, so that ``--help`` comes at once.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Thread, Timer
from typing import TYPE_CHECKING, Any, NoReturn

from n4flow import __version__
from n4flow.console import PARTICIPANTS, PREFIX, STOPPED, TYPED, commanding
from n4flow.errors import InputError

if TYPE_CHECKING:
    from n4flow.study.sheet import Addition

log = logging.getLogger("n4flow.cli")

#: Where the sheet, the config, the logs and Snakemake's records lie in the folder of a dataset: BIDS passes it over.
WORKING_FOLDER = "code"

#: The scans that are sought unless others are named.
SUFFIXES = ["T1w"]

ONE_FIELD = (
    "One field for several contrasts or echoes: add a column field_from, and name there the modality of the scan whose "
    "field they take, such as echo-1_MEGRE."
)

#: What `run` adds to the config of its working folder.
RESULTS_ABOVE = "\n# Written by n4flow run: the results are the folder above.\npathvars:\n  results: ..\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is asked for on the command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for_snakemake: list[str] = []
    if arguments[:1] == ["run"] and "--" in arguments:
        place = arguments.index("--")
        arguments, for_snakemake = arguments[:place], arguments[place + 1 :]
    given = _parser().parse_args(arguments, argparse.Namespace(for_snakemake=for_snakemake))
    with commanding():
        given.do(given)


def program() -> NoReturn:
    """As `main`, for a process of its own, which ends at once: Python takes long to take apart what it has loaded."""
    signal.signal(signal.SIGINT, _interrupted)
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _interrupted(*_: object) -> NoReturn:
    """End in any case: threads that wait for one another after Ctrl-C would keep the process for ever."""
    last_resort = Timer(5, os._exit, [STOPPED])
    last_resort.daemon = True
    last_resort.start()
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="n4flow", description="N4 bias correction of one image, or of a whole dataset."
    )
    parser.add_argument("--version", action="version", version=f"n4flow {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, do: Any, says: str, more: str = "") -> argparse.ArgumentParser:
        text = f"{says}. {more}".strip()
        added = commands.add_parser(name, help=says, description=text, formatter_class=_Formatter)
        added.set_defaults(do=do)
        return added

    added = command(
        "correct",
        correct,
        "Correct one image",
        "Beside OUT (x.nii.gz) lie its sidecar (x.json) and the control points of the field (x_biasfield.json), "
        "which n4flow apply takes.",
    )
    added.add_argument("image", metavar="IN", type=_place, help="the image: .nii, .nii.gz, .mgz, .img, .ome.zarr")
    added.add_argument("output", metavar="OUT", type=_place, help="the corrected image, .nii, .nii.gz or .ome.zarr")
    added.add_argument("--mask", metavar="M", type=_place, help="where to estimate; found in the image by default")
    added.add_argument("--weights", metavar="W", type=Path, help="confidence of each voxel: an image of values from 0")
    added.add_argument(
        "--bias-field", metavar="F", type=Path, help="write the field as an image, and its control points beside it"
    )
    added.add_argument("--report", metavar="PAGE", type=Path, help="write a page (.html) to look at, in one file")
    added.add_argument("--preset", help="default, itk (SimpleITK's defaults), fixed or linumpy")
    added.add_argument("--device", help="auto (a GPU if there is one), gpu or cpu")
    _add_config(added)

    added = command(
        "apply",
        apply,
        "Divide an image by the field of another one of the same space",
        "The field is taken as it is, so that ratios between images that are divided by it (echoes) stay.",
    )
    added.add_argument("field", metavar="FIELD", type=Path, help="control points of the field, .json")
    added.add_argument("image", metavar="IN", type=Path, help="the image: .nii, .nii.gz, .mgz, .img")
    added.add_argument(
        "output", metavar="OUT", type=Path, help="the divided image; its sidecar and field lie beside it"
    )
    _add_config(added)

    added = command("sheet", sheet, "Turn a BIDS folder into a sample sheet", ONE_FIELD)
    added.add_argument("folder", metavar="BIDS", type=Path, help="the dataset: the folder that holds sub-*")
    _add_suffixes(added)
    added.add_argument("--participant", nargs="+", default=[], metavar="LABEL", help="these alone, such as 01 02")
    added.add_argument("--session", nargs="+", default=[], metavar="LABEL", help="these alone, such as baseline")
    added.add_argument(
        "--entity",
        nargs="+",
        default=[],
        metavar="ENTITY",
        help="what names must hold, such as acq-mprage run-1 run-2: one of those with the same key",
    )
    added.add_argument("--output", metavar="SHEET", type=Path, help="where to write it; standard output by default")

    added = command(
        "verify",
        verify,
        "Compare results with the manifest of another run, or of another machine",
        "Prints a line per scan, and ends with 1 if any is different.",
    )
    added.add_argument("results", metavar="RESULTS", type=Path, help="the folder of results to check")
    added.add_argument(
        "manifest", metavar="MANIFEST", type=Path, help="manifest.json of the other run, or its folder of results"
    )
    added.add_argument(
        "--deep", action="store_true", help="read all voxels of OME-Zarr images again, which takes as long as a copy"
    )

    added = command(
        "run",
        run,
        "Correct a BIDS dataset with the workflow, as a BIDS App",
        "Sheet, config and logs lie in OUT/code. A second run adds what is new in BIDS, does what is not done "
        "yet, and leaves what you wrote into sheet and config. What follows -- goes to Snakemake, such as -- -n.",
    )
    added.add_argument("bids", metavar="BIDS", type=Path, help="the dataset: the folder that holds sub-*")
    added.add_argument("output", metavar="OUT", type=Path, help="folder of the results, a BIDS derivative dataset")
    added.add_argument("level", metavar="participant", choices=["participant"], help="the report over all is made too")
    _add_suffixes(added)
    added.add_argument(
        "--participant-label",
        "--participant_label",
        nargs="+",
        default=[],
        metavar="LABEL",
        help="find and correct these alone, such as 01 02",
    )
    added.add_argument("--cores", metavar="N", help="how many to use, a number or all; a cluster's profile needs none")
    return parser


class _Formatter(argparse.HelpFormatter):
    """Help of an option stands beside it: so all of it fits a screen."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


def _place(text: str) -> str | Path:
    """A path, or an address such as s3://…, of which a path would lose a slash."""
    from n4flow.images.remote import is_remote

    return text if is_remote(text) else Path(text)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", type=Path, help="further settings: a config file of the workflow")


def _add_suffixes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suffix",
        nargs="+",
        default=SUFFIXES,
        metavar="SUFFIX",
        help="which scans: T1w (default), T2w, FLAIR, bold, …",
    )


# ---------------------------------------------------------------- one image


def correct(given: argparse.Namespace) -> None:
    """Do the steps mask, n4 and, for a report, qc, with outputs by their own names."""
    from n4flow.images.ngff import is_store
    from n4flow.images.remote import is_remote

    for path in filter(is_remote, (given.image, given.output, given.mask)):
        if path is given.output or not is_store(path):
            raise InputError(path, "does not lie on this machine", "give a path here (OME-Zarr may lie in a bucket)")
    if is_store(given.image):
        _correct_store(given)
        return
    start = time.perf_counter()
    stem = _stem(given.output)
    points = given.output.with_name(f"{stem}_biasfield.json")
    if given.bias_field:
        points = given.bias_field.with_name(f"{_stem(given.bias_field)}.json")
    files = {"corrected": given.output, "sidecar": given.output.with_name(f"{stem}.json"), "field": points}
    if given.bias_field:
        files["field_image"] = given.bias_field
    inputs = [path for path in (given.mask, given.weights, given.config) if path]
    _check_places([*files.values(), *([given.report] if given.report else [])], given.image, inputs)
    config = _config(given)
    if given.report:
        if given.report.suffix.lower() not in (".html", ".htm"):
            raise InputError(given.report, "is no name for a page", "let it end in .html")
        _need("matplotlib", "jinja2", "PIL", extra="qc", what="--report")

    from n4flow.device import available_cores
    from n4flow.images.files import voxels_of_frame
    from n4flow.kernels import COMPILED_VOXELS, preload
    from n4flow.steps.correct import correct_scan
    from n4flow.steps.mask import mask_scan

    if voxels_of_frame(given.image) >= COMPILED_VOXELS:  # compiled code is loaded while the mask is found
        Thread(target=preload).start()
    with tempfile.TemporaryDirectory(prefix="n4flow-") as folder:
        mask, mask_sidecar = Path(folder, "mask.nii.gz"), Path(folder, "mask.json")
        levelled = {"plane_gains": config["plane_gains"]}
        mask_scan(given.image, given.mask, mask, mask_sidecar, **config["mask"], **levelled)
        correct_scan(
            given.image,
            mask,
            files,
            parameters=config["n4"],
            device=config["device"],
            threads=available_cores(),
            weights=given.weights,
            keep_dtype=config["output"]["keep_dtype"],
            sources=[path for path in (given.mask, given.weights) if path],
            **levelled,
        )
        if given.report:
            flags = _report(given, {"mask": mask, **files}, config["qc"], Path(folder))
        else:
            mask_voxels = _json(mask_sidecar).get("Mask", {}).get("Voxels")
            flags = _flags_of_run(_json(files["sidecar"]), config, mask_voxels)
        _tell_flags(given.image, flags)
    _tell(start, [*files.values(), *([given.report] if given.report else [])])


def _correct_store(given: argparse.Namespace) -> None:
    """From store to store; each channel gets a field of its own."""
    start = time.perf_counter()
    for option in ("weights", "bias_field", "report"):
        if getattr(given, option):
            raise InputError(
                given.image,
                f"is an OME-Zarr image, for which there is no --{option.replace('_', '-')}",
                "leave it out, or correct the image with the workflow (docs/microscopy.md)",
            )
    from n4flow.images.ngff import read_image
    from n4flow.steps.store import correct_store, files_beside

    config = _config(given)
    settings = dict(config["zarr"])
    image = read_image(given.image, settings["pyramid_origin"])
    sidecar, fields = files_beside(given.output, range(image.channels))
    made = [given.output, sidecar, *fields.values()]
    _check_places(made, given.image, [path for path in (given.mask, given.config) if path])
    if settings.pop("other_channels") == "copy":
        log.warning(
            "%s: zarr.other_channels: copy counts for sheets alone: every channel is corrected here", given.config
        )
    if settings.pop("write_to"):
        log.warning("%s: zarr.write_to counts for sheets alone: OUT is what is written here", given.config)
    correct_store(
        given.image,
        given.output,
        mask=given.mask,
        mask_method=config["mask"]["method"],
        percentile=config["mask"]["percentile"],
        plane_gains=config["plane_gains"],
        parameters=config["n4"],
        device=config["device"],
        **settings,
    )
    for channel, facts in _json(sidecar)["N4"].items():
        _tell_flags(f"{given.image}: {channel}", _flags_of_run({"N4": facts}, config))
    _tell(start, made)


def _report(given: argparse.Namespace, made: dict[str, Path], settings: dict[str, Any], folder: Path) -> list[str]:
    """Write the page of a scan, in one file; its flags."""
    from n4flow.qc.pages import make_subject
    from n4flow.study.config import page_settings

    metrics = folder / "metrics.json"
    make_subject(
        name=re.sub(r"\.nii(\.gz)?$", "", given.image.name, flags=re.IGNORECASE),
        image=given.image,
        mask=made["mask"],
        corrected=made["corrected"],
        sidecar=made["sidecar"],
        field=made["field"],
        page=given.report,
        metrics=metrics,
        pictures=folder / "pictures.webp",
        alone=True,
        **page_settings(settings),
    )
    return _json(metrics)["flags"]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _flags_of_run(facts: Mapping[str, Any], config: Mapping[str, Any], mask_voxels: int | None = None) -> list[str]:
    """The flags that are raised by what a sidecar says, without a look at the images: a page has more."""
    from n4flow.qc.flags import find_flags
    from n4flow.qc.metrics import run_metrics

    return find_flags(run_metrics(facts, {}, mask_voxels), config["qc"]["flags"])


def _tell_flags(image: str | Path, flags: Iterable[str]) -> None:
    for flag in flags:
        log.warning("%s: flagged: %s", image, flag)


def apply(given: argparse.Namespace) -> None:
    """Do the step apply."""
    start = time.perf_counter()
    stem = _stem(given.output)
    files = {
        "corrected": given.output,
        "sidecar": given.output.with_name(f"{stem}.json"),
        "field": given.output.with_name(f"{stem}_biasfield.json"),
    }
    _check_places(files.values(), given.image, [given.field, *([given.config] if given.config else [])])
    config = _config(given)

    from n4flow.steps.apply import apply_scan

    apply_scan(given.image, given.field, files, keep_dtype=config["output"]["keep_dtype"])
    _tell_flags(given.image, _flags_of_run(_json(files["sidecar"]), config))
    _tell(start, files.values())


def _tell(start: float, made: Iterable[Path]) -> None:
    print(f"{PREFIX}done in {time.perf_counter() - start:.1f} s: {', '.join(map(str, made))}", file=sys.stderr)


def _config(given: argparse.Namespace) -> dict[str, Any]:
    """The workflow's own defaults, what a config file says otherwise, and what the command line does."""
    from n4flow.study.config import load_config, load_schema, problems_by_file, with_defaults

    schema = load_schema(workflow_folder() / "workflow/schemas/config.schema.yaml")
    config: Any = load_config(given.config) if given.config else {}
    if given.config and (problems := problems_by_file(config, schema, [given.config])):
        raise InputError.of_lines(problems)
    config = with_defaults(config, schema)
    if getattr(given, "device", None):
        config["device"] = given.device
    if getattr(given, "preset", None):
        config["n4"] = {**config["n4"], "preset": given.preset}
    return config


def _stem(path: Path) -> str:
    """The name of an image to be written, without its extension."""
    for end in (".nii.gz", ".nii"):
        if path.name.endswith(end) and path.name != end:
            return path.name.removesuffix(end)
    raise InputError(path, "is no name for a NIfTI image", "let it end in .nii.gz or .nii")


def _check_places(outputs: Iterable[Path], image: str | Path, inputs: Iterable[str | Path]) -> None:
    """See before any work whether all can be written, and nothing that goes in would be overwritten."""
    from n4flow.study.bids import sidecars_of

    taken = {os.path.realpath(path): "goes in" for path in (image, *sidecars_of(image), *inputs)}
    for path in outputs:
        if said := taken.get(os.path.realpath(path)):
            raise InputError(path, f"would be overwritten, and {said}", "give another name")
        taken[os.path.realpath(path)] = "is written already"
        _check_folder(path)


def _check_folder(path: Path) -> None:
    """Refuse a file in a folder that is not there: it may be a slip of the pen."""
    if not path.parent.is_dir():
        raise InputError(path, "cannot be written (its folder is not there)", f"make it: mkdir -p {path.parent}")


def _need(*modules: str, extra: str, what: str) -> None:
    """Refuse what needs packages that are not there."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise InputError(
            what, f"needs {' and '.join(missing)}", f"install what it needs: pip install '.[{extra}]' in the clone"
        )


# ---------------------------------------------------------------- a dataset


def sheet(given: argparse.Namespace) -> None:
    """Index a BIDS folder and write its sheet to a file or to standard output."""
    from n4flow.images.files import atomic_text
    from n4flow.study.sheet import sheet_of

    if given.output:
        _check_folder(given.output)
    scans = _index(
        given.folder,
        given.suffix,
        participants=given.participant,
        sessions=given.session,
        entities=given.entity,
    )
    if not given.output:
        sys.stdout.write(sheet_of(scans))
        return
    with atomic_text(given.output) as file:
        file.write(sheet_of(scans))
    _tell_of_echoes(scans)
    # what works in this folder, be it the clone or any other
    root = workflow_folder()
    words = ["snakemake", "--cores", "8", "--config", f"samples={given.output}"]
    # somebody else's may lie here
    if not (Path("Snakefile").exists() and Path("Snakefile").samefile(root / "Snakefile")):
        words[1:1] = ["--snakefile", str(root / "Snakefile")]
    if not Path("config/config.yaml").exists():
        words += ["--configfile", str(root / "config/config.yaml")]
    print(f"{len(scans)} scans; next: {shlex.join(words)}", file=sys.stderr)


def _tell_of_echoes(scans: Sequence[Any]) -> None:
    if any("echo-2" in scan.entities.split("_") for scan in scans):
        print(f"Each echo gets a field of its own, which changes their ratios. {ONE_FIELD}", file=sys.stderr)


def _index(folder: Path, suffixes: Sequence[str], **filters: Sequence[str]) -> list[Any]:
    from n4flow.study.bids import index_dataset

    try:
        return index_dataset(folder, suffixes, **filters)
    except OSError as error:
        raise InputError(error.filename, f"cannot be read ({error.strerror})", "check its permissions") from None


def verify(given: argparse.Namespace) -> None:
    """Print a line per scan; end with 1 if any is different."""
    from collections import Counter

    from n4flow.device import available_cores
    from n4flow.study.manifest import CLOSE, DIFFERENT, EQUAL, FAILED
    from n4flow.study.manifest import verify as compare

    verdicts = compare(given.results, given.manifest, threads=available_cores())
    wrong: list[str] = []
    notes: list[str] = []
    if given.deep:
        from n4flow.study.voxels import verify_voxels

        wrong, notes = verify_voxels(given.results, given.manifest)
    table = csv.writer(sys.stdout, delimiter="\t", lineterminator="\n")
    table.writerow(["scan", "verdict", "reason"])
    table.writerows(verdicts)
    counts = Counter(verdict.verdict for verdict in verdicts if verdict.scan != "dataset")
    always = (EQUAL, CLOSE, DIFFERENT)
    said = [f"{counts[verdict]} {verdict}" for verdict in (*always, FAILED) if verdict in always or counts[verdict]]
    print(", ".join(said), file=sys.stderr)
    for line in [*notes, *wrong]:
        print(line, file=sys.stderr)
    sys.exit(bool(wrong) or any(verdict.verdict == DIFFERENT for verdict in verdicts))


def run(given: argparse.Namespace) -> None:
    """Write sheet and config into the folder of the results, and become Snakemake there."""
    _need("snakemake", extra="workflow", what="n4flow run")

    from n4flow.images.files import atomic_text
    from n4flow.study.config import load_schema
    from n4flow.study.sheet import add_to_sheet, found_file

    if os.path.realpath(given.output) == os.path.realpath(given.bids):
        raise InputError(
            given.output, "is the dataset itself", f"give a folder of its own: {given.bids}/derivatives/n4flow"
        )
    if given.cores not in (None, "all") and not (given.cores.isdecimal() and int(given.cores)):
        raise InputError("--cores", f"{given.cores!r} is no number of cores", "give one from 1 on, or all")
    root = workflow_folder()
    scans = _index(Path(os.path.abspath(given.bids)), given.suffix, participants=given.participant_label)
    folder = Path(os.path.abspath(given.output), WORKING_FOLDER)
    path, settings = folder / "config/samples.tsv", folder / "config/config.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(path.parent, f"cannot be made ({error.strerror})", "give another folder") from None
    with contextlib.chdir(folder):  # where relative paths of the sheet begin
        sheet = add_to_sheet(path, scans, load_schema(root / "workflow/schemas/samples.schema.yaml"))
    if not settings.exists():
        with atomic_text(settings) as file:
            file.write((root / "config/config.yaml").read_text(encoding="utf-8") + RESULTS_ABOVE)
    if sheet.added:
        _tell_of_echoes(scans)
    if sheet.removed:
        back = f"to have one back, remove it from {found_file(path)}, too"
        log.warning("%d left out whose rows were removed from the sheet; %s", len(sheet.removed), back)
    if sheet.taken:
        scan, row = sheet.taken[0]
        more = f" (and {len(sheet.taken) - 1} more of this kind)" if len(sheet.taken) > 1 else ""
        log.warning(
            "%s is left out: its name, %s, is taken by the row of %s: rename that row%s",
            *(scan.image, scan.name, row.image, more),
        )
    subjects = _subjects(sheet, given.participant_label, path)
    alone = subjects and {row.subject for row in sheet.rows} > set(subjects)
    to_do = f"; this run is for {' '.join(subjects)} alone" if alone else ""
    counts = f"{len(sheet.rows)} scans, {len(sheet.added)} of them new"
    print(f"{PREFIX}{path}: {counts}{to_do}", file=sys.stderr, flush=True)
    # what the workflow says of this command
    typed = ["n4flow", "run", str(given.bids), str(given.output), given.level]
    typed += ["--suffix", *given.suffix] if given.suffix != SUFFIXES else []
    os.environ |= {TYPED: shlex.join(typed), PARTICIPANTS: " ".join(subjects)}
    cores = ["--cores", given.cores] if given.cores else []
    command = ["-m", "snakemake", "--snakefile", str(root / "Snakefile"), "--directory", str(folder)]
    # -P: the folder that somebody is in holds no modules
    os.execv(sys.executable, [sys.executable, "-P", *command, *cores, *given.for_snakemake])


def _subjects(sheet: Addition, labels: Sequence[str], path: Path) -> list[str]:
    """The subjects of a sheet, as it calls them, that a run with these labels is for; none without labels.

    Whether these are all, the workflow sees by the sheet that it reads: another run may have added rows until then.
    """
    if not labels:
        return []
    named = {label.removeprefix("sub-") for label in labels} | {row.subject for row in sheet.of_found}
    there = {row.subject for row in sheet.rows}
    if not named & there:
        raise InputError(path, f"holds no row of {' '.join(labels)}", "add one, or give other labels")
    return sorted(named & there)


def workflow_folder() -> Path:
    """The folder that holds the Snakefile: the clone that this package lies in, or what the wheel put beside it."""
    package = Path(__file__).parent
    return next(
        root for root in (package.with_name("n4flow_workflow"), package.parents[2]) if (root / "Snakefile").is_file()
    )


if __name__ == "__main__":
    program()
