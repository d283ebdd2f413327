"""Rule index: the report over all scans."""

import os
import shutil
from pathlib import Path

from n4flow.console import reporting
from n4flow.qc.dataset import make_index
from n4flow.study.failures import Failure


def link(source, target):
    """A second name for a file, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def main(snakemake):
    page, table = Path(snakemake.output.page), Path(snakemake.output.table)
    metrics, ratings = [Path(path) for path in snakemake.input.metrics], snakemake.input.ratings or None
    failed = [Failure(*row) for row in snakemake.params.failed]
    settings = {name: snakemake.params[name] for name in ("outlier_z", "limits", "groups")}
    make_index(metrics, page, table, failed, ratings=ratings, **settings)
    complete = Path(snakemake.output.bundle)
    bundle = complete.with_name(f"{complete.name}.partial")
    shutil.rmtree(bundle, ignore_errors=True)
    (bundle / "data").mkdir(parents=True)
    out, pages = snakemake.output, snakemake.input.pages
    for file in map(Path, [page, table, out.outliers, out.methods, snakemake.input.guide, *pages]):
        link(file, bundle / file.name)
    for file in map(Path, [*snakemake.input.pictures, *snakemake.input.get("crops", []), *snakemake.output.logs]):
        link(file, bundle / "data" / file.name)
    bundle.replace(complete)


if __name__ == "__main__":
    with reporting(snakemake.log[0]):
        main(snakemake)
