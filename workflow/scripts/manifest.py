"""Rule manifest: hashes of all outputs."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.study.failures import Failure
from n4flow.study.manifest import write_manifest


def main(snakemake):
    files = map(Path, snakemake.input.scans)
    scans = {name: [next(files) for _ in range(count)] for name, count in snakemake.params.scans}
    dataset = [Path(path) for path in snakemake.input.dataset]
    failed = [Failure(*row) for row in snakemake.params.failed]
    write_manifest(Path(snakemake.output.manifest), scans, dataset, failed, threads=snakemake.threads)


if __name__ == "__main__":
    with reporting(snakemake.log[0]):
        main(snakemake)
