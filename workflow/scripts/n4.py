"""Rule n4: correct a scan."""

from pathlib import Path

from n4flow.console import reporting
from n4flow.derivatives import CorrectionFiles, correct_scan
from n4flow.parameters import N4Parameters


def main(snakemake):
    correct_scan(
        Path(snakemake.input.image),
        Path(snakemake.input.mask),
        CorrectionFiles(**{role: Path(path) for role, path in snakemake.output.items()}),
        parameters=N4Parameters.from_mapping(snakemake.params.settings),
        # --resources gpu=0 is the switch to the CPU
        device=snakemake.config["device"] if snakemake.resources.gpu else "cpu",
        threads=snakemake.threads,
        keep_dtype=snakemake.params.keep_dtype,
    )


if __name__ == "__main__":
    with reporting(snakemake.log[0]):  # noqa: F821
        main(snakemake)  # noqa: F821
