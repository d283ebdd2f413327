"""One file by the command beside the same file in the workflow: the section "One file" of RESULTS.md.

    python tests/benchmarks/command.py shared/data/bids/sub-01/anat/sub-01_T1w.nii.gz [--repeats 5]

`n4flow correct IN OUT`, with the start of its process, against what the jobs mask and n4 of that image take (by
Snakemake's own benchmark files) in a run of three scans on one core: of the first scan, whose jobs load what the worker
then has, and of the others. Both on the CPU, without the field as an image, in turns; the median of the repeats, and
the least, which says more on a machine that others use too. The bytes of both must be the same.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "workflow" / "scripts"
SUBJECTS = ("1", "2", "3")


def by_command(image, folder):
    """Seconds of the command, and what it wrote."""
    output = folder / "corrected.nii.gz"
    command = [sys.executable, "-m", "n4flow.cli", "correct", image, output, "--device", "cpu"]
    start = time.perf_counter()
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(SCRIPTS)}, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start, output.read_bytes()


def by_workflow(image, folder):
    """Seconds of the jobs mask and n4 of a scan, the first of a run first, and what they wrote."""
    (folder / "config").mkdir(parents=True)
    sheet = "subject\timage\n" + "".join(f"{subject}\t{image}\n" for subject in SUBJECTS)
    (folder / "config/samples.tsv").write_text(sheet)
    config = yaml.safe_load((REPOSITORY / "config/config.yaml").read_text())
    config |= {"device": "cpu", "output": {"bias_field": False}}
    (folder / "config/config.yaml").write_text(yaml.safe_dump(config))
    made = [f"results/sub-{subject}/anat/sub-{subject}_desc-N4_T1w.nii.gz" for subject in SUBJECTS]
    command = [sys.executable, "-m", "snakemake", "-s", REPOSITORY / "Snakefile", "--directory", folder, "--cores", "1"]
    subprocess.run([*command, *made], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    steps = [sorted(folder.glob(f"benchmarks/{step}/**/*.tsv"), key=os.path.getmtime) for step in ("mask", "n4")]
    seconds = [[float(next(csv.DictReader(path.open(), delimiter="\t"))["s"]) for path in paths] for paths in steps]
    return [sum(pair) for pair in zip(*seconds, strict=True)], (folder / made[0]).read_bytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    image = arguments.image.resolve()
    times = {"`n4flow correct`": [], "mask + n4, first scan of a run": [], "mask + n4, further scans": []}
    with tempfile.TemporaryDirectory() as temporary:
        by_command(image, Path(temporary))  # compiles, once a machine
        for repeat in range(arguments.repeats):
            took, bytes_of_command = by_command(image, Path(temporary))
            (first, *further), bytes_of_workflow = by_workflow(image, Path(temporary, str(repeat)))
            assert bytes_of_command == bytes_of_workflow
            for part, seconds in zip(times.values(), (took, first, statistics.mean(further)), strict=True):
                part.append(seconds)
    print("| | median | least | `n4flow correct` takes, of the medians | of the least |")
    print("| --- | --- | --- | --- | --- |")
    ours = times["`n4flow correct`"]
    for name, seconds in times.items():
        middle, least = statistics.median(seconds), min(seconds)
        ratios = statistics.median(ours) / middle, min(ours) / least
        print(f"| {name} | {middle:.2f} s | {least:.2f} s | {ratios[0]:.2f}× | {ratios[1]:.2f}× |")


if __name__ == "__main__":
    main()
