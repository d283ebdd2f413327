"""Rule figures: what Snakemake's report shows of all scans at a glance."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.qc.figures import make_figures
from n4flow.study.failures import Failure


def main(snakemake):
    metrics = [Path(path) for path in snakemake.input.metrics]
    failed = [Failure(*row) for row in snakemake.params.failed]
    make_figures(metrics, **snakemake.output, failed=failed, outlier_z=snakemake.params.outlier_z)


if __name__ == "__main__":
    with reporting(snakemake.log[0]):
        main(snakemake)
