"""Rule exclude: the scans that a reviewer failed."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.qc.rendering import read_json
from n4flow.ratings import write_exclusions


def main(snakemake):
    metrics = [read_json(Path(path)) for path in snakemake.input.metrics]
    hashes = {values["name"]: values.get("report_hash") for values in metrics}
    write_exclusions(Path(snakemake.input.ratings), hashes, Path(snakemake.output.table))


if __name__ == "__main__":
    with reporting(snakemake.log[0]):  # noqa: F821
        main(snakemake)  # noqa: F821
