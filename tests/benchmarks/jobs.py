"""What a job costs beside its work: the section "The cost of a job" of RESULTS.md.

    python tests/benchmarks/jobs.py --subjects 20 [--folder FOLDER] [--by-rule]

A study of links to the four heads of the built-in dataset at 1 mm runs without SimpleITK's reference on 2 cores. The
work is what two warm processes take for the same calls (those of the rules' scripts) on 4 of the subjects, scaled to
all; a job's cost is what the run takes beyond that. CPU time is user and system time of all processes: on a machine
that others use too, it says more than wall time.

    python tests/benchmarks/jobs.py --subjects 16 --slurm 4

The same through `workflow/profiles/slurm` and a SLURM on this machine (see tests/slurm), with so many scans a
submission. Its jobs are no children of this process: CPU time is that of the whole machine, which may have nothing
else to do.

    python tests/benchmarks/jobs.py --graph 5000

Times how long Snakemake takes to plan a study of so many subjects (images and outputs are empty files): nothing
done yet, and everything done.
"""

import argparse
import base64
import contextlib
import csv
import ctypes
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

import nibabel as nib
import numpy as np
import yaml

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "workflow" / "scripts"
sys.path.insert(0, str(SCRIPTS))

from n4flow.steps.demo import demo_dataset, load_tissues  # noqa: E402
from n4flow.study.bids import Scan  # noqa: E402
from n4flow.study.manifest import write_manifest  # noqa: E402

TISSUES = REPOSITORY / "workflow" / "resources" / "mni152" / "tissues_2mm.nii.gz.base64"
SNAKEMAKE = [sys.executable, "-m", "snakemake", "-s", REPOSITORY / "Snakefile"]
CORES = 2
MEASURED = 4  # subjects that the work is measured on: one of each head


#: Of Linux's ``prctl``: orphans become children of this process.
PR_SET_CHILD_SUBREAPER = 36


def cpu_seconds(who=resource.RUSAGE_CHILDREN):
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def heads_of_1mm(folder):
    """The built-in dataset on the grid of 1 mm, made once."""
    if not (folder / "dataset_description.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        coarse = load_tissues(TISSUES)
        fine = np.asarray(coarse.dataobj).repeat(2, 0).repeat(2, 1).repeat(2, 2)
        affine = coarse.affine @ np.diag([0.5, 0.5, 0.5, 1.0])
        nib.save(nib.Nifti1Image(fine, affine), folder / "tissues.nii.gz")
        encoded = folder / "tissues.nii.gz.base64"
        encoded.write_bytes(base64.encodebytes((folder / "tissues.nii.gz").read_bytes()))
        demo_dataset(encoded, folder)
    return [folder / f"sub-0{n}" / "anat" / f"sub-0{n}_T1w.nii.gz" for n in (1, 2, 3, 4)]


def make_study(folder, images, subjects):
    """A BIDS folder of links to the images, a sheet and a config."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "config").mkdir(parents=True)
    scans = []
    for number in range(subjects):
        scan = Scan(f"{number + 1:05d}", "", "T1w", "")
        path = folder / "raw" / scan.folder / f"{scan.name}.nii.gz"
        path.parent.mkdir(parents=True)
        os.symlink(images[number % len(images)], path)
        scans.append(Scan(scan.subject, "", "T1w", str(path.relative_to(folder))))
    (folder / "raw" / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
    with open(folder / "config" / "samples.tsv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["subject", "image", "modality"])
        writer.writerows([scan.subject, scan.image, scan.modality] for scan in scans)
    config = yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text())
    config |= {"reference": {"scans": 0}}
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    return scans


def snakemake(folder, *arguments):
    """Wall and CPU seconds of a run."""
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "-s",
        REPOSITORY / "Snakefile",
        "--directory",
        folder,
        "--cores",
        CORES,
    ]
    start, before = time.perf_counter(), cpu_seconds()
    with open(folder / "terminal.log", "ab") as log:
        subprocess.run(
            [*map(str, command), *map(str, arguments)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            check=True,
        )
    end = time.perf_counter()
    # the worker is an orphan by then, and ends at once: its CPU time counts
    with contextlib.suppress(ChildProcessError):
        while time.perf_counter() < end + 1 and not os.waitpid(-1, os.WNOHANG)[0]:
            time.sleep(0.01)
    return end - start, cpu_seconds() - before


def calls_of(scan, config, folder):
    """The calls of the three scripts for a scan, writing elsewhere."""
    at = folder / "work" / scan.folder
    at.mkdir(parents=True, exist_ok=True)
    stem, suffix = scan.entities, scan.suffix
    mask, mask_sidecar = at / f"{stem}_mask.nii.gz", at / f"{stem}_mask.json"
    corrected = {
        "corrected": at / f"{stem}_desc-N4_{suffix}.nii.gz",
        "sidecar": at / f"{stem}_desc-N4_{suffix}.json",
        "field": at / f"{stem}_biasfield.json",
        "field_image": at / f"{stem}_biasfield.nii.gz",
    }
    flags = {name: limit for name, limit in config["qc"]["flags"].items() if name != "outlier_z"}

    def run_mask():
        from n4flow.steps.mask import mask_scan

        mask_scan(Path(scan.image), None, mask, mask_sidecar, **config["mask"])

    def run_n4():
        from n4flow.parameters import N4Parameters
        from n4flow.steps.correct import correct_scan
        from n4flow.steps.derivatives import CorrectionFiles

        correct_scan(
            Path(scan.image),
            mask,
            CorrectionFiles(**corrected),
            parameters=N4Parameters.from_mapping(config["n4"]),
            device=config["device"],
        )

    def run_qc():
        from n4flow.qc.pages import make_subject

        make_subject(
            name=scan.name,
            image=Path(scan.image),
            mask=mask,
            corrected=corrected["corrected"],
            field=corrected["field"],
            sidecar=corrected["sidecar"],
            page=at / "page.html",
            metrics=at / "metrics.json",
            pictures=at / "pictures.webp",
            viewer=str(at / "viewer.js"),
            field_window_log=config["qc"]["field_window_log"],
            viewer_mb=config["qc"]["viewer_mb"],
            flags=flags,
        )

    return {"mask": run_mask, "n4": run_n4, "qc": run_qc}


def work_of(scans, config, folder, barrier, answer):
    """In a process of its own: every call once to warm up, then wall and CPU seconds of each step."""
    os.chdir(folder)
    for call in calls_of(scans[0], config, folder).values():
        call()
    spent = {}
    barrier.wait()
    for scan in scans:
        for step, call in calls_of(scan, config, folder).items():
            start, before = time.perf_counter(), cpu_seconds(resource.RUSAGE_SELF)
            call()
            wall, cpu = spent.get(step, (0, 0))
            spent[step] = wall + time.perf_counter() - start, cpu + cpu_seconds(resource.RUSAGE_SELF) - before
    answer.put(spent)


def work(scans, config, folder):
    """Wall seconds (of two processes side by side) and CPU seconds that a subject takes in each step."""
    context = multiprocessing.get_context("spawn")
    barrier, answer = context.Barrier(CORES), context.Queue()
    parts = [scans[n:MEASURED:CORES] for n in range(CORES)]
    workers = [context.Process(target=work_of, args=(part, config, folder, barrier, answer)) for part in parts]
    for worker in workers:
        worker.start()
    spent = [answer.get() for _ in workers]
    for worker in workers:
        worker.join()
    return {
        step: tuple(sum(part[step][n] for part in spent) / MEASURED / (CORES if n == 0 else 1) for n in (0, 1))
        for step in spent[0]
    }


def manifest_work(study, subjects):
    """Wall and CPU seconds a subject of hashing everything that was made, as the rule does, on as many cores."""
    made = json.loads((study / "results" / "manifest.json").read_text())
    results = study / "results"
    scans = {name: [results / path for path in scan["Files"]] for name, scan in made["Scans"].items()}
    start, before = time.perf_counter(), cpu_seconds(resource.RUSAGE_SELF)
    write_manifest(results / "again.json", scans, [], threads=CORES)
    spent = time.perf_counter() - start, cpu_seconds(resource.RUSAGE_SELF) - before
    print(f"manifest: {spent[0] / subjects:.3f} s, {spent[1] / subjects:.3f} s")
    return spent[0] / subjects, spent[1] / subjects


def say(name, count, wall, cpu, work_wall, work_cpu):
    def share(spent, part):
        return f"{spent - part:.1f} s ({(spent - part) / spent:.0%})"

    print(
        f"| {name} | {count} | {wall:.1f} s | {share(wall, work_wall)} | {cpu:.1f} s | {share(cpu, work_cpu)} "
        f"| {1000 * (wall - work_wall) / count:.0f} ms, {1000 * (cpu - work_cpu) / count:.0f} ms |",
        flush=True,
    )


def measure(arguments, folder):
    images = heads_of_1mm(folder / "heads")
    study = folder / "study"
    scans = make_study(study, images, arguments.subjects)
    config = yaml.safe_load((study / "config" / "config.yaml").read_text())
    per_subject = work(scans, config, study)
    print("work per subject, wall on 2 cores and CPU:")
    for step, spent in per_subject.items():
        print(f"{step}: {spent[0]:.3f} s, {spent[1]:.3f} s")
    print("| what | subjects | wall | of it overhead | CPU | of it overhead | overhead per subject: wall, CPU |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    start = snakemake(study, "--dry-run", "--quiet")
    dry = (study / "terminal.log").stat().st_size
    total = np.zeros(2)
    steps = {"mask": ["mask"], "n4": ["n4"], "qc": ["qc"]}
    if arguments.by_rule:
        for name, parts in steps.items():
            took = np.array(snakemake(study, "--until", parts[-1]))
            total += took
            did = arguments.subjects * sum(np.array(per_subject[part]) for part in parts)
            say(name + ", without planning", arguments.subjects, *(took - start), *did)
    total += snakemake(study)
    per_subject["manifest"] = manifest_work(study, arguments.subjects)
    say("the whole run", arguments.subjects, *total, *(arguments.subjects * sum(map(np.array, per_subject.values()))))
    print(f"planning alone: wall {start[0]:.1f} s, CPU {start[1]:.1f} s")
    log = max((study / ".snakemake" / "log").glob("*.log"))
    sizes = [path.stat().st_size for path in (study / "terminal.log", log)]
    print(f"the terminal got {sizes[0] - dry} bytes, Snakemake's log {sizes[1]}")


def machine_seconds():
    """CPU seconds of everything on this machine: user, nice and system."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def slurm(arguments, folder):
    """What a run costs whose scans are jobs of SLURM, each with its own Snakemake."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "slurm"))
    from cluster import Cluster, what_is_missing

    if problem := what_is_missing():
        sys.exit(problem)
    study = folder / "study"
    scans = make_study(study, heads_of_1mm(folder / "heads"), arguments.subjects)
    per_subject = work(scans, yaml.safe_load((study / "config" / "config.yaml").read_text()), study)
    profile = [
        "--profile",
        REPOSITORY / "workflow" / "profiles" / "slurm",
        "--slurm-init-seconds-before-status-checks",
        1,
    ]
    with Cluster():
        before = machine_seconds()
        wall, _ = snakemake(study, *profile, "--seconds-between-status-checks", 1)
        cpu = machine_seconds() - before
    print("| what | subjects | wall | of it overhead | CPU | of it overhead | overhead per subject: wall, CPU |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    say("SLURM", arguments.subjects, wall, cpu, *(arguments.subjects * sum(map(np.array, per_subject.values()))))


def fill(folder):
    """Empty outputs of everything, as old as each other: as if all had been done."""
    now = time.time()
    command = [*SNAKEMAKE, "--directory", folder, "--summary"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for row in [line.split("\t")[0] for line in table.splitlines()[1:] if "\t" in line]:
        path = folder / row
        if row == "results/qc/bundle":
            path.mkdir(parents=True, exist_ok=True)
            path = path / ".snakemake_timestamp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (now, now))


def graph(arguments, folder):
    """Time to plan a study: fresh, and done."""
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / "image.nii.gz"
    image.write_bytes(bytes(2_000_000))  # more than what is compared by content
    os.utime(image, (1e9, 1e9))
    study = folder / "graph"
    make_study(study, [image], arguments.graph)
    wall, cpu = snakemake(study, "--dry-run", "--quiet")
    print(f"a dry run with everything to do: wall {wall:.1f} s, CPU {cpu:.1f} s", flush=True)
    fill(study)
    wall, cpu = snakemake(study, "--dry-run")
    nothing = "Nothing to be done" in (study / "terminal.log").read_text()[-2000:]
    print(f"a dry run with nothing to do ({nothing}): wall {wall:.1f} s, CPU {cpu:.1f} s", flush=True)


def main():
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=20)
    parser.add_argument("--by-rule", action="store_true", help="run rule by rule")
    parser.add_argument("--slurm", type=int, metavar="SCANS", help="through a SLURM, so many scans a submission")
    parser.add_argument("--graph", type=int, metavar="SUBJECTS", help="time the planning alone")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        chosen = graph if arguments.graph else slurm if arguments.slurm else measure
        chosen(arguments, folder)


if __name__ == "__main__":
    main()
