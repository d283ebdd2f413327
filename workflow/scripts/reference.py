"""Rule reference: correct a scan with SimpleITK at its defaults."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.steps.derivatives import CorrectionFiles
from n4flow.steps.reference import reference_scan


def main(snakemake):
    reference_scan(
        Path(snakemake.input.image),
        Path(snakemake.input.mask),
        CorrectionFiles(**{role: Path(path) for role, path in snakemake.output.items()}),
        keep_dtype=snakemake.params.keep_dtype,
    )


if __name__ == "__main__":
    with reporting(snakemake.log[0]):
        main(snakemake)
