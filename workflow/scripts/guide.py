"""Rule guide: how to read the pages."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.qc.guide import make_guide


def main(snakemake):
    make_guide(
        Path(snakemake.input.tissues),
        Path(snakemake.output.page),
        field_window_log=snakemake.params.field_window_log,
        flags=snakemake.params.flags,
    )


if __name__ == "__main__":
    with reporting(snakemake.log[0]):
        main(snakemake)
