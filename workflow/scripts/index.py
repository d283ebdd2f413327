"""Rule index: the report over all scans."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.qc.dataset import make_index


def main(snakemake):
    page, table = Path(snakemake.output.page), Path(snakemake.output.table)
    make_index([Path(path) for path in snakemake.input.metrics], page, table)
    # what an earlier run that failed had to say is mended now
    for suffix in (".html", ".tsv"):
        page.with_name(f"{snakemake.params.incomplete}{suffix}").unlink(missing_ok=True)


if __name__ == "__main__":
    with reporting(snakemake.log[0]):  # noqa: F821
        main(snakemake)  # noqa: F821
