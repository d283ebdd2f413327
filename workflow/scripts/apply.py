"""Rule apply: divide a scan by the field of another one."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.steps.apply import apply_scan
from n4flow.steps.derivatives import CorrectionFiles


def main(snakemake):
    apply_scan(
        Path(snakemake.input.image),
        Path(snakemake.input.lattice),
        CorrectionFiles(**{role: Path(path) for role, path in snakemake.output.items()}),
        keep_dtype=snakemake.params.keep_dtype,
    )


if __name__ == "__main__":
    with reporting(snakemake.log[0]):
        main(snakemake)
