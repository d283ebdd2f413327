"""Rule index: the report over all scans."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.qc.pages import make_index


def main(snakemake):
    make_index(
        [Path(path) for path in snakemake.input.metrics], Path(snakemake.output.page), Path(snakemake.output.table)
    )


if __name__ == "__main__":
    with reporting(snakemake.log[0]):  # noqa: F821
        main(snakemake)  # noqa: F821
